"""Making a plan: `mixture` draws the samples, `packing` fills bins with them and groups bins into steps."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmflow.errors import DataError
from vlmflow.training import packing
from vlmflow.training.examples import KINDS
from vlmflow.training.flops import CostModel
from vlmflow.training.mixture import Mixer
from vlmflow.training.packing import Packer
from vlmflow.training.plan import ITEM, Ints, Plan

if TYPE_CHECKING:
    from vlmflow.recipe.stage import StageSpec
    from vlmflow.training.pool import Dropped, Examples, Pieces, Visual

BLOCK = 4096  # samples drawn at a time, at most
POINTS = 256  # and at least this many draws over the training, so that a ramp is followed closely
SHARPNESS = 64  # where the mixture changes over the training, a sample moves by at most about this part of it


def make_plan(examples: Examples, stage: StageSpec, seed: int, visual: Visual, cost: CostModel) -> Plan:
    """Plan the whole training of a stage; the same arguments always give the same plan.

    Raises:
        DataError: nothing fits the budget, or nothing is shown, so there is nothing to train on; a text share without
            samples for it.
    """
    budget = stage.budget
    limits = sorted({*(phase.max_tiles for phase in stage.mixture.tiles), visual.max_tiles})
    pieces = {
        limit: examples.pieces(visual, limit, budget.tokens, budget.tiles, budget.too_long == "split")
        for limit in limits
    }
    dropped = [drop for limit in limits for drop in pieces[limit].dropped]
    usable = np.zeros(len(examples), dtype=bool)
    for found in pieces.values():
        usable |= np.diff(found.start) > 0
    if not usable.any():
        raise DataError(_nothing(examples, stage, dropped))
    mixer = Mixer(examples, usable, stage, seed, visual.max_tiles)
    chosen, streams = _pack(examples, stage, mixer, pieces)
    if not streams:
        weights = np.array([use.weight for use in examples.uses])[examples.arrays["use"]][usable]
        raise DataError(
            f"none of {int(usable.sum())} usable samples is shown in {stage.epochs:g} epochs: their weights (passes an epoch) sum to "
            f"{float(weights.sum()):.3g}, which is less than one sample. Raise `weight` in the stage's data, or `epochs`."
        )
    items, sizes, steps = _order(chosen, streams, stage, seed, cost)
    plan = Plan(items, _starts(sizes), _starts(steps), examples.shards, cost, {}, examples.report, dropped)
    plan.report.update(_report(plan, examples, stage, dropped) | mixer.report())
    return plan


def _pack(
    examples: Examples, stage: StageSpec, mixer: Mixer, pieces: dict[int, Pieces]
) -> tuple[NDArray[Any], list[list[list[int]]]]:
    """(items drawn [n], bins of item numbers for each stream, in the order of their oldest items)."""
    budget, grouped = stage.budget, stage.mixture.group == "modality"
    wanted = None if stage.max_steps is None else stage.max_steps * stage.packs
    longest = np.concatenate([found.tokens for found in pieces.values()])
    shown = mixer.total if wanted is None else min(mixer.total, int(wanted * budget.tokens / longest.mean()) + 1)
    buffer = min(packing.BUFFER, max(1, shown // SHARPNESS)) if _ordered(stage) else packing.BUFFER
    packers = [Packer(budget.tokens, budget.tiles, buffer) for _ in range(1 + grouped)]
    blocks: list[NDArray[Any]] = []
    block = int(np.clip(shown // POINTS, 1, BLOCK))
    count = closed = tokens_drawn = tiles_drawn = 0
    while wanted is None or closed < wanted:
        # how many bins the items drawn so far need at least; bins themselves lag behind by the buffer
        done = max(tokens_drawn / budget.tokens, tiles_drawn / budget.tiles) / wanted if wanted else 0.0
        drawn, limit = mixer.take(block, done)
        for start, end in pairwise([0, *(np.flatnonzero(np.diff(limit)) + 1).tolist(), len(limit)]):
            if start == end:
                continue
            phase = int(limit[start])
            made = _items(examples, pieces[phase], drawn[start:end], phase)
            blocks.append(made)
            for number, (tokens, tiles) in enumerate(zip(made["tokens"].tolist(), made["tiles"].tolist(), strict=True)):
                packers[grouped and tiles > 0].add(count + number, tokens, tiles)
            count += len(made)
            tokens_drawn += int(made["tokens"].sum())
            tiles_drawn += int(made["tiles"].sum())
        if not len(drawn):
            break
        closed = sum(packer.closed for packer in packers)
    for packer in packers:  # also where the steps end first: what waits longest still comes in its turn
        packer.flush()
    bins = sorted((taken[0], number, taken) for number, packer in enumerate(packers) for taken in packer.bins)
    streams: list[list[list[int]]] = [[] for _ in packers]
    for _, number, taken in bins[:wanted]:
        streams[number].append(taken)
    return np.concatenate(blocks) if blocks else np.zeros(0, ITEM), [stream for stream in streams if stream]


def _ordered(stage: StageSpec) -> bool:
    """Whether the mixture changes over the training, so that samples must stay near their place in it."""
    return stage.mixture.text_share is not None or bool(stage.mixture.tiles)


def _items(examples: Examples, pieces: Pieces, drawn: Ints, limit: int) -> NDArray[Any]:
    """Items of drawn examples in their order; an example that fits no pack in this phase gives none."""
    counts = (pieces.start[1:] - pieces.start[:-1])[drawn]
    inner = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    at = np.repeat(pieces.start[:-1][drawn], counts) + inner
    made = np.zeros(len(at), dtype=ITEM)
    example = pieces.example[at]
    for name in ("use", "shard", "row"):
        made[name] = examples.arrays[name][example]
    for name in ("first", "last", "tokens", "tiles", "targets", "squares"):
        made[name] = getattr(pieces, name)[at]
    made["max_tiles"] = limit
    return made


def _order(
    items: NDArray[Any], streams: list[list[list[int]]], stage: StageSpec, seed: int, cost: CostModel
) -> tuple[NDArray[Any], Ints, Ints]:
    """(items pack after pack, items of each pack, packs of each step)."""
    random = np.random.Generator(np.random.PCG64([seed, 3]))
    steps: list[tuple[float, int, list[list[int]]]] = []
    for number, bins in enumerate(streams):
        sums = [_bin_sums(items, bins, name) for name in ("tokens", "squares", "tiles", "targets")]
        place = np.array([taken[0] for taken in bins], dtype=np.float64)
        done = 0
        window = max(1, len(bins) // (SHARPNESS * stage.packs)) if _ordered(stage) else None
        for step in packing.group(np.asarray(cost.cost(*sums)), stage.packs, random, window):
            steps.append((float(place[done : done + len(step)].mean()), number, [bins[b] for b in step]))
            done += len(step)
    steps.sort(key=lambda step: step[:2])
    steps = steps[: stage.max_steps]  # two streams may end in two unfinished steps
    packs = [pack for _, _, step in steps for pack in step]
    order = np.array([i for pack in packs for i in pack], dtype=np.int64)
    sizes = np.array([len(pack) for pack in packs], dtype=np.int64)
    return items[order], sizes, np.array([len(step) for _, _, step in steps], dtype=np.int64)


def _bin_sums(items: NDArray[Any], bins: list[list[int]], name: str) -> Ints:
    values = items[name].astype(np.int64)[np.array([i for b in bins for i in b], dtype=np.int64)]
    return np.add.reduceat(values, _starts(np.array([len(b) for b in bins], dtype=np.int64))[:-1])


def _starts(sizes: Ints) -> Ints:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _nothing(examples: Examples, stage: StageSpec, dropped: list[Dropped]) -> str:
    if not len(examples):
        return "no training sample is left after filtering; look at the counts of skipped samples and their reasons"
    return (
        f"none of {len(examples)} samples fits a pack of {stage.budget.tokens} tokens and {stage.budget.tiles} tiles (first: "
        f"{dropped[0].reason}); samples are never cut inside an image, so raise budget.tokens / budget.tiles or lower "
        "model.tiling.max_tiles"
    )


def _report(plan: Plan, examples: Examples, stage: StageSpec, dropped: list[Dropped]) -> dict[str, Any]:
    tokens, items = plan.pack_tokens, plan.items
    losing = len({drop.example for drop in dropped})
    kinds: dict[str, dict[int, str]] = {}
    for drop in dropped:
        kinds.setdefault(drop.kind, {}).setdefault(drop.example, drop.reason)
    joined = np.array([KINDS[use.text].joined for use in examples.uses], dtype=bool)
    ingredients = []
    for number, use in enumerate(examples.uses):
        mine = items["use"] == number
        ingredients.append(
            {
                "dataset": use.dataset,
                "sources": use.sources or "all",
                "text": use.text,
                "samples": int((examples.arrays["use"] == number).sum()),
                "shown": int(mine.sum()),
                "tokens": int(items["tokens"][mine].sum()),
                "share": round(float(items["tokens"][mine].sum() / tokens.sum()), 4),
            }
        )
    return {
        "samples": len(examples),
        "shown": len(items),
        "packs": len(tokens),
        "steps": plan.steps,
        "tokens": int(tokens.sum()),
        "targets": int(plan.pack_targets.sum()),
        "tiles": int(plan.pack_tiles.sum()),
        "fill_tokens": round(float(tokens.mean() / stage.budget.tokens), 4),
        "fill_tiles": round(float(plan.pack_tiles.mean() / stage.budget.tiles), 4),
        "padding": 0.0,  # packs are laid end to end: no pad token exists
        # a pair is an item of its own, not a stretch of a conversation
        "split": int(((items["first"] >= 0) & joined[items["use"]]).sum()),
        "dropped": losing,
        "dropped_share": round(losing / max(1, len(examples)), 4),
        "dropped_reasons": [
            {"reason": f"{kind} ({next(iter(found.values()))})", "count": len(found), "example": next(iter(found))}
            for kind, found in kinds.items()
        ],
        "ingredients": ingredients,
    }
