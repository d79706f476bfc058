"""What each pipeline needs of a recipe and of the installation: data for preflight, so that no task asks twice.

A recipe may hold more than a pipeline runs; it is refused only where the pipeline would leave out in silence what the
recipe asks for, or lacks what the pipeline works by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmflow.errors import RecipeError
from vlmflow.ports import DATASETS, STAGES

if TYPE_CHECKING:
    from vlmflow.recipe import Recipe


@dataclass(frozen=True)
class Needs:
    """Which parts of a recipe a pipeline works by.

    Attributes:
        tables: pulls the recipe's datasets (those that were not given as manifests).
        curation: runs the curation section and its services.
        stages: runs every stage, in the pipeline's order.
        training: trains at least one stage.
        soup: trains candidates and combines them.
        benchmarks: scores models.
        mlflow: registers, or reads the registry.
    """

    tables: bool = False
    curation: bool = False
    stages: bool = False
    training: bool = False
    soup: bool = False
    benchmarks: bool = False
    mlflow: bool = False


PIPELINES = {
    "points": Needs(tables=True, curation=True, stages=True, training=True, soup=True, benchmarks=True, mlflow=True),
    "curate": Needs(tables=True, curation=True, training=True),
    "train": Needs(tables=True, training=True),
    "soup": Needs(tables=True, training=True, soup=True, benchmarks=True, mlflow=True),
    "evaluate": Needs(benchmarks=True),
    "export": Needs(benchmarks=True),
}


def needs_of(pipeline: str) -> Needs:
    """Raises RecipeError for a pipeline that works by no recipe, or that does not exist."""
    if pipeline not in PIPELINES:
        raise RecipeError(f"no pipeline '{pipeline}' works by a recipe; those that do: {', '.join(PIPELINES)}")
    return PIPELINES[pipeline]


def suits(recipe: Recipe, pipeline: str) -> None:
    """Refuse a recipe that the pipeline would silently not run. Raises RecipeError listing everything that is wrong."""
    needs, problems = needs_of(pipeline), []
    if needs.tables and (unknown := sorted(set(recipe.data) - set(DATASETS))):
        problems.append(
            f"data: the {pipeline} pipeline carries the datasets {list(DATASETS)}, the recipe also has {unknown}; rename them: web is "
            "what curation works on, sft the conversations, seed a small clean set; what belongs together may be sources of one dataset"
        )
    if needs.stages:
        problems += _order(recipe, pipeline)
    if needs.curation and recipe.curation.dataset not in (None, "web"):
        problems.append(
            f"curation.dataset: the {pipeline} pipeline curates 'web', the recipe says '{recipe.curation.dataset}'"
        )
    if pipeline == "curate" and recipe.curation.dataset is None:
        problems.append("curation.dataset: null, so there is nothing to curate; set it to web")
    if needs.soup and recipe.soup is None:
        problems.append(f"soup: the {pipeline} pipeline ends in a soup; name at least one candidate")
    if needs.benchmarks and not recipe.evaluation.benchmarks:
        problems.append(f"evaluation.benchmarks: the {pipeline} pipeline scores models; name at least one benchmark")
    if problems:
        raise RecipeError(
            f"the recipe does not fit the pipeline '{pipeline}':\n" + "\n".join(f"  - {p}" for p in problems)
        )


def _order(recipe: Recipe, pipeline: str) -> list[str]:
    if unknown := [name for name in recipe.stages if name not in STAGES]:
        return [
            f"stages: the {pipeline} pipeline runs {list(STAGES)}, the recipe also has {unknown}; rename them, or train them one by one "
            "with the pipeline train"
        ]
    order = [name for name in STAGES if name in recipe.stages]
    if list(recipe.stages) == order:
        return []
    return [f"stages: the {pipeline} pipeline runs them in the order {order}, the recipe has {list(recipe.stages)}"]
