"""From datasets and a recipe to a stage's plan, before any rank starts: lengths, examples, packs.

It runs once, in the process that launches the ranks, so none of them waits in a collective while another encodes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vlmflow import storage
from vlmflow.training import plan_file, pool
from vlmflow.training.length import Reading, measured, tokenizer_digest
from vlmflow.training.plan import Plan
from vlmflow.training.planner import make_plan
from vlmflow.training.pool import Examples, Visual
from vlmflow.training.shape import stage_cost

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.models.store import ModelRef
    from vlmflow.recipe.mixture import DataUse
    from vlmflow.recipe.stage import StageSpec
    from vlmflow.step import Context


def reading(ctx: Context, init: ModelRef) -> Reading:
    """Tokenizer and configuration of a model, without its weights. Raises ModelError when they cannot be read."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads over shards; not threads for each text as well
    from transformers import AutoConfig, AutoTokenizer

    from vlmflow import models
    from vlmflow.errors import ModelError
    from vlmflow.models import store

    folder = store.fetch(init, ctx.scratch)
    models.register()
    try:
        config = AutoConfig.from_pretrained(str(folder))
        tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the tokenizer and the configuration in {folder}: {error}") from error
    return Reading(models.family(ctx.recipe.model.family), tokenizer, config, tokenizer_digest(init.files))


def visual_of(made: Reading) -> Visual:
    """How the images of this model become tokens."""
    from vlmflow.models.family import limits

    side, most = limits(made.config)

    def tiles_for(width: int, height: int, max_tiles: int) -> int:
        return made.family.tiles_for(width, height, {"tile": side, "max_tiles": max_tiles})

    return Visual(int(made.family.tokens_per_tile(made.config)), most, tiles_for)


def examples_of(
    ctx: Context, stage: StageSpec, uses: list[DataUse], datasets: dict[str, Manifest], made: Reading
) -> Examples:
    """Measure the ingredients of a stage and gather their examples.

    Raises:
        StepFailed: more samples are unusable than `failure_limit` allows (names reasons and samples).
        DataError: nothing is left, or a layer that an ingredient needs is missing.
    """
    lengths = [(use, measured(ctx, datasets[use.dataset], use, stage, ctx.recipe.seed, made)) for use in uses]
    return pool.gather(lengths, ctx.scratch)


def plan_of(ctx: Context, stage: StageSpec, examples: Examples, made: Reading) -> Plan:
    """The plan of a stage, with what did not fit named in its report.

    Raises:
        StepFailed: more samples than `failure_limit` are unusable.
        DataError: there is nothing, or nothing fits.
    """
    report = examples.report
    pool.check_failures(report["failed"], report["seen"], stage.failure_limit, report["reasons"], report["filtered"])
    visual = visual_of(made)
    cost = stage_cost(made.config, made.family, stage)
    plan = make_plan(examples, stage, ctx.recipe.seed, visual, cost)
    for reason in plan.report["dropped_reasons"]:
        reason["example"] = examples.key(reason["example"], ctx.scratch)
    return plan


def prepare(
    ctx: Context, stage: StageSpec, uses: list[DataUse], init: ModelRef, datasets: dict[str, Manifest], uri: str
) -> Plan:
    """The plan below ``uri``: that of an earlier attempt, or made now and stored there.

    Raises: as `examples_of` and `plan_of`.
    """
    plan = plan_file.find(storage.join(uri, plan_file.MARKER), Path(ctx.scratch))
    if plan is None:
        made = reading(ctx, init)
        plan = plan_of(ctx, stage, examples_of(ctx, stage, uses, datasets, made), made)
        plan_file.save(plan, uri)
    check(plan, stage)
    return plan


def check(plan: Plan, stage: StageSpec) -> None:
    """Raise StepFailed when more samples than `failure_limit` are unusable or fit no pack."""
    report, counts = plan.report, plan.examples
    reasons = [*report["dropped_reasons"], *counts["reasons"]]
    pool.check_failures(counts["failed"] + report["dropped"], counts["seen"], stage.failure_limit, reasons)
