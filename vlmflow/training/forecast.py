"""What a training will need, before anything starts: parameters, operations, memory of a GPU, steps, hours.

`vlmflow plan train` prints it. It needs the recipe alone; with the plan of a stage's packs the numbers of steps and
operations are those that will run, without it they are those of full packs. The rules of counting are those of
`flops` (operations) and `memory` (bytes), which the tests hold against what torch counts and allocates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlmflow.errors import RecipeError

if TYPE_CHECKING:
    from vlmflow.recipe import Recipe
    from vlmflow.recipe.stage import StageSpec
    from vlmflow.training.plan import Plan

PEAK = 989.5  # TFLOP/s of one GPU when none is stated: H100 and H200, bf16 dense (flops.PEAKS)
ALLOWANCE = 0.05  # share of a GPU's memory left to the CUDA context, to NCCL and to fragmentation; not measured
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """GPUs a stage is planned for.

    Attributes:
        gpus: how many.
        memory: bytes of each.
        peak: operations a second of each.
        mfu: share of the peak that model operations are assumed to reach.
    """

    gpus: int
    memory: int
    peak: float
    mfu: float

    @property
    def usable(self) -> int:
        """Bytes that may be planned for."""
        return int(self.memory * (1 - ALLOWANCE))


def machine(gpus: int, gib: float, mfu: float = 0.4, peak_tflops: float | None = None) -> Machine:
    """GPUs of `gib` GiB. Their peak: as given, else as `VLMFLOW_PEAK_TFLOPS` states it, else `PEAK`."""
    from vlmflow.training.flops import peak_flops

    peak = peak_tflops * 1e12 if peak_tflops else peak_flops("") or PEAK * 1e12
    return Machine(gpus, int(gib * GIB), peak, mfu)


@dataclass
class StageForecast:
    """One stage on one machine, as plain data.

    Attributes:
        parameters: total, trainable, and of each row of the stage's table (role, state, count).
        operations: model operations a token, a tile, a target and a squared segment, of a step and of the stage.
        memory: for each ZeRO stage its parts, total, and whether it fits.
        zero: lowest ZeRO stage that fits; None = none does.
        work: tokens, steps, packs a rank and step, seconds a step and hours of the stage; None where it is not known.
        assumed: what was assumed where the data is not known.
        problems: what must or should be changed.
    """

    stage: str
    dtype: str
    parameters: dict[str, Any]
    operations: dict[str, float | None]
    memory: list[dict[str, Any]]
    zero: int | None
    work: dict[str, float | int | None]
    assumed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


def plan_train(
    recipe: Recipe,
    machine: Machine,
    stage: str | None = None,
    tokens: float | None = None,
    plans: dict[str, Plan] | None = None,
) -> list[StageForecast]:
    """Forecast of one stage or of all stages of a recipe, in order.

    Args:
        tokens: language-model tokens that a stage shows, where its plan is not known.
        plans: pack plans of the stages whose data is there.

    Raises:
        RecipeError: an unknown stage, or a rule that matches nothing.
        ModelError: a configuration that is not on this machine.
    """
    from vlmflow.training.run import stage_of
    from vlmflow.training.shape import recipe_config

    names = [*(["bootstrap"] if recipe.bootstrap else []), *recipe.stages] if stage is None else [stage]
    specs = {name: stage_of(recipe, name) for name in names}
    if not specs:
        raise RecipeError("the recipe has no stages, so there is nothing to train")
    config = recipe_config(recipe.model)
    plans = plans or {}
    return [_forecast(recipe, name, spec, config, machine, tokens, plans.get(name)) for name, spec in specs.items()]


def _forecast(
    recipe: Recipe, name: str, spec: StageSpec, config: Any, machine: Machine, tokens: float | None, plan: Plan | None
) -> StageForecast:
    import torch

    from vlmflow import models
    from vlmflow.training import flops, memory
    from vlmflow.training.recompute import recompute
    from vlmflow.training.shape import apply_rules, blank
    from vlmflow.training.trace import rehearse

    family = models.family(recipe.model.family)
    model = blank(config, torch.bfloat16 if spec.dtype == "bf16" else torch.float32)
    table = apply_rules(model, family, spec)
    parts = flops.count(model, family, table.rule_of)
    cost = flops.cost_model(parts)
    size = memory.size_of(model.named_parameters())
    tile_tokens = int(family.tokens_per_tile(config))
    full = _full_pack(spec, tile_tokens, int(config.text_config.vocab_size))
    model.loss_rows = spec.memory.loss_rows
    recompute(model, family, spec.memory.recompute)
    rehearsal = rehearse(model, full["tokens"], full["tiles"], full["rows"])
    micros = math.ceil(spec.packs / machine.gpus)
    footprints = [
        memory.footprint(size, rehearsal, zero, machine.gpus, spec.dtype, micros, spec.ema is not None)
        for zero in memory.STAGES
        if zero or spec.dtype == "fp32"
    ]
    fitting = [made.zero for made in footprints if made.total <= machine.usable]
    again = flops.recomputed(parts, spec.memory.recompute)
    work, operations, assumed = _work(spec, machine, cost, again, full, tokens, plan)
    return StageForecast(
        name,
        spec.dtype,
        {"total": size.total, "trainable": size.trainable, "rows": [vars(row) for row in table.rows]},
        operations,
        [{**made.as_json(), "fits": made.total <= machine.usable} for made in footprints],
        min(fitting, default=None),
        work,
        assumed,
        _problems(name, spec, machine, {made.zero: made.total for made in footprints}, min(fitting, default=None)),
    )


def _full_pack(spec: StageSpec, tile_tokens: int, vocabulary: int) -> dict[str, int]:
    """The largest pack of a stage: as many tiles as its tokens can hold, the rest text that is learned.

    Both answers of a pair have the tokens of its tiles.
    """
    from vlmflow.models.points.modeling_points import LOSS_ELEMENTS
    from vlmflow.training.objective import OBJECTIVES

    tokens = spec.budget.tokens
    tile_tokens *= 1 + OBJECTIVES[spec.objective.kind].paired
    tiles = max(1, min(spec.budget.tiles, tokens // tile_tokens))
    targets = max(1, tokens - tiles * tile_tokens)
    rows = spec.memory.loss_rows or max(1, LOSS_ELEMENTS // vocabulary)
    return {"tokens": tokens, "tiles": tiles, "targets": targets, "rows": max(targets, min(tokens, rows))}


def _work(
    spec: StageSpec,
    machine: Machine,
    cost: Any,
    again: Any,
    full: dict[str, int],
    tokens: float | None,
    plan: Plan | None,
) -> tuple[dict[str, float | int | None], dict[str, float | None], list[str]]:
    """(work, operations, assumptions). Seconds are those of the rank with most packs."""
    steps: int | None
    shown: float | None
    if plan is not None:
        shown, steps = float(plan.pack_tokens.sum()), plan.steps
        sums = (shown, int(plan.pack_squares.sum()), int(plan.pack_tiles.sum()), int(plan.pack_targets.sum()))
        a_step = cost.cost(*sums) / steps
        hardware = again.cost(*sums) / steps
        assumed = []
    else:
        filled = (full["tokens"], full["tokens"] ** 2, full["tiles"], full["targets"])
        a_step, hardware = spec.packs * cost.cost(*filled), spec.packs * again.cost(*filled)
        steps = math.ceil(tokens / (full["tokens"] * spec.packs)) if tokens else None
        if spec.max_steps is not None:
            steps = min(steps, spec.max_steps) if steps else spec.max_steps
        shown = None if steps is None else min(tokens or math.inf, steps * spec.packs * full["tokens"])
        assumed = [
            f"packs are full: {full['tokens']} tokens, {full['tiles']} tiles, {full['targets']} targets, in one sample (shorter "
            "samples need fewer operations)"
        ]
        if steps is None:
            assumed.append("how much is shown is not known: state --tokens, or pull the data first; hours are left out")
    micros = math.ceil(spec.packs / machine.gpus)
    idle = micros * machine.gpus / spec.packs  # ranks wait for the one with most packs
    seconds = a_step * idle / (machine.gpus * machine.peak * machine.mfu)
    hours = None if steps is None else steps * seconds / 3600
    work = {"tokens": shown, "steps": steps, "packs_a_rank": micros, "seconds_a_step": seconds, "hours": hours}
    operations = {
        **cost.as_json(),
        "step": a_step,
        "recomputed": hardware,
        "stage": None if steps is None else steps * a_step,
    }
    return work, operations, assumed


def _problems(name: str, spec: StageSpec, machine: Machine, totals: dict[int, int], fits: int | None) -> list[str]:
    """What stands in the way, each with what to do."""
    found = []
    gpus, packs = machine.gpus, spec.packs
    where = f"stages.{name}" if name != "bootstrap" else name
    if gpus > packs:
        found.append(
            f"{packs} packs of a step cannot be dealt to {gpus} GPUs: {gpus - packs} would only wait; raise {where}.packs to a "
            f"multiple of {gpus}, or plan for {packs} GPUs or fewer"
        )
    elif packs % gpus:
        found.append(
            f"{packs} packs of a step do not divide by {gpus} GPUs: some ranks run {math.ceil(packs / gpus)} packs while others wait "
            f"after {packs // gpus}; {where}.packs={math.ceil(packs / gpus) * gpus} would not"
        )
    if spec.processes != gpus:
        found.append(f"the recipe runs {spec.processes} processes, this plan {gpus}: set {where}.processes={gpus}")
    if fits is None:
        least = min(totals, key=lambda zero: totals[zero])
        found.append(
            f"nothing fits {machine.memory / GIB:g} GiB: ZeRO {least} needs {totals[least] / GIB:.1f} GiB and {ALLOWANCE:.0%} are "
            f"left free. Lower {where}.budget, recompute activations ({where}.memory.recompute), or take more or larger GPUs"
        )
    else:
        runs = max(1, spec.zero) if spec.dtype == "bf16" else spec.zero
        if totals[runs] > machine.usable:
            found.append(
                f"the recipe's ZeRO {runs} needs {totals[runs] / GIB:.1f} GiB and does not fit {machine.memory / GIB:g} GiB less "
                f"{ALLOWANCE:.0%}: set {where}.zero={fits}"
            )
    return found
