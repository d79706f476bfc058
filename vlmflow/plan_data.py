"""`vlmflow plan data`: the data plans of a recipe's stages, made from what its last run left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.models.store import ModelRef
    from vlmflow.recipe import Recipe
    from vlmflow.training.plan import Plan

Label = tuple[str, str | None]  # stage and soup candidate


def labels_of(recipe: Recipe, wanted: list[str]) -> list[Label]:
    """(stage, soup candidate) of every training of the recipe. Raises RecipeError for a stage that it lacks."""
    from vlmflow.training.run import stage_of

    for name in wanted:
        stage_of(recipe, name)
    found: list[Label] = []
    for name in [*(["bootstrap"] if recipe.bootstrap else []), *recipe.stages]:
        soup = recipe.soup if recipe.soup and recipe.soup.stage == name else None
        if not wanted or name in wanted:
            found += [(name, candidate) for candidate in (soup.candidates if soup else [None])]
    return found


def given_data(recipe: Recipe, data: list[str]) -> dict[str, str]:
    """URIs of ``--data`` by dataset. Raises RecipeError for anything else than NAME=URI."""
    from vlmflow.errors import RecipeError

    found = {}
    for item in data:
        name, sign, uri = item.partition("=")
        if not sign or name not in recipe.data:
            raise RecipeError(
                f"--data {item}: give NAME=URI with a dataset of the recipe, one of {sorted(recipe.data)}"
            )
        found[name] = uri
    return found


def from_last_run(
    recipe: Recipe, source: str, state: Path, labels: list[Label], given: set[str], model: bool
) -> tuple[dict[str, Manifest], ModelRef | None]:
    """Datasets and the initial model of the last runs, as far as they are not given. Raises DataError that names the
    command to run first."""
    from vlmflow import last_run
    from vlmflow.errors import DataError
    from vlmflow.training.run import ingredients

    needed = {use.dataset for stage, candidate in labels for use in ingredients(recipe, stage, candidate)} - given
    found: dict[str, Manifest] = {}
    init: ModelRef | None = None
    folders = last_run.folders(state, recipe.name)
    for folder in folders:
        if (init or model) and needed <= set(found):
            break
        found = last_run.datasets(folder) | found
        init = init or last_run.initial_model(folder)
    missing = [*sorted(needed - set(found)), *([] if init or model else ["initial model"])]
    if missing:
        where = f"{len(folders)} runs of it in {state}" if folders else f"no run of it in {state}"
        raise DataError(
            f"recipe '{recipe.name}': nothing is known of {', '.join(missing)}; there is {where}, and lengths of samples are "
            f"measured on pulled data with the model's tokenizer. Run `vlmflow run {source}` first (it may be stopped when "
            "training begins), or name them with --data NAME=URI and --model URI."
        )
    return found, init


def plans_of(
    recipe: Recipe,
    labels: list[Label],
    manifests: dict[str, Manifest],
    init: ModelRef,
    processes: int | None,
) -> dict[str, tuple[Plan, dict[str, Any]]]:
    from vlmflow import step
    from vlmflow.training import plan_view, prepare
    from vlmflow.training.run import ingredients, stage_of

    ctx = step.context(recipe, "plan")
    reading = prepare.reading(ctx, init)
    plans = {}
    for name, candidate in labels:
        stage = stage_of(recipe, name)
        examples = prepare.examples_of(ctx, stage, ingredients(recipe, name, candidate), manifests, reading)
        plan = prepare.plan_of(ctx, stage.model_copy(update={"failure_limit": 1.0}), examples, reading)
        numbers = plan_view.summary(plan, stage.budget.tokens, processes or stage.processes)
        counted = plan.examples["failed"] + plan.report["dropped"]
        numbers["above_failure_limit"] = counted > stage.failure_limit * plan.examples["seen"]
        numbers["packs_a_step"] = stage.packs
        plans["-".join(filter(None, [name, candidate]))] = (plan, numbers)
    return plans


def as_text(name: str, n: dict[str, Any]) -> str:
    waste = n["padding_of"]
    lines = [
        name,
        f"  samples    {n['samples']} usable, {n['shown']} shown ({n['split']} stretches of long ones); {n['filtered']} filtered out, "
        f"{n['failed']} unusable, {n['dropped']} with parts too long",
        f"  steps      {n['steps']}, {n['packs']} packs; {n['tokens']} tokens, {n['targets']} targets, {n['tiles']} tiles",
        f"  fill       {n['fill_tokens']:.1%} of tokens, {n['fill_tiles']:.1%} of tiles",
        f"  padding    0.0%; batches of the same samples {waste['batches']:.1%}, by similar length {waste['buckets']:.1%}",
        f"  imbalance  {n['imbalance']:.3f} over {n['processes']} processes",
    ]
    if "text_share" in n:
        shares = " ".join(f"{row['text_share']:.0%}" for row in n["over_time"])
        lines.append(
            f"  text share {n['text_share']:.1%} of samples, over the steps {shares}; passes: text {n['text_passes']:g}, images "
            f"{n['image_passes']:g}"
        )
    for row in n["ingredients"]:
        sources = row["sources"] if isinstance(row["sources"], str) else ", ".join(row["sources"])
        lines.append(
            f"  data       {row['share']:>6.1%}  {row['dataset']} ({sources}), {row['text']}: {row['samples']} samples, {row['shown']} "
            f"shown, {row['tokens']} tokens"
        )
    lines += [f"  left out   {r['count']} x {r['reason']} (e.g. {r['example']})" for r in n["reasons"]]
    if n["above_failure_limit"]:
        lines.append("  WARNING    more samples are left out than failure_limit allows: training would refuse to start")
    if n["processes"] > n["packs_a_step"]:
        lines.append(
            f"  WARNING    a step has {n['packs_a_step']} packs, so {n['processes'] - n['packs_a_step']} of {n['processes']} processes "
            "always wait for the others; raise `packs`"
        )
    return "\n".join(lines)
