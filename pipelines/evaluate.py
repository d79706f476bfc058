"""Scores of any models on the recipe's benchmarks, side by side."""

from kfp import dsl

from components.contestants import contestants
from components.preflight import preflight
from components.scoreboard import scoreboard
from pipelines import parts
from pipelines.platform import once

LITERALS = {"split": ["report", "selection"]}


@dsl.pipeline(name="vlmflow-evaluate", display_name="Evaluation: models on the recipe's benchmarks")
def evaluate(recipe: str, models: list, split: str = "report", evaluators: int = 8, overrides: list = []):  # noqa: B006
    """Score models on every benchmark of the recipe.

    Args:
        recipe: Recipe (YAML or JSON), as a path in the image or a URI in the object store, such as s3://bucket/recipe.yaml.
        models: Models to score, each the URI of its folder or a registered version, such as ["models:/NAME@champion"].
        split: Which questions are asked: `report`, which take part in no choice, or `selection`, by which soups and gates decide.
        evaluators: Number of tasks that the models are dealt to.
        overrides: Changes to the recipe, each `section.key=value`, such as ["evaluation.batch=32"].
    """
    with parts.finished():
        checked = once(preflight(source=recipe, overrides=overrides, pipeline="evaluate"))
        resolved = checked.outputs["recipe"]
        dealt = once(contestants(recipe=resolved, models=models, evaluators=evaluators))
        table = parts.scored(resolved, dealt, split)
        once(scoreboard(recipe=resolved, scores=table()))
