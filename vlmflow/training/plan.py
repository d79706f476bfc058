"""The pack plan: which samples make which step, known before training starts.

A plan is a pure function of (lengths, weights, budgets, packs, epochs or steps, seed). It does not know the number of
processes: a step is the same set of packs on 1 and on 64 ranks, only the dealing differs, so both give the same
weights up to the order of float sums. The position in training is therefore one integer, the step, and a resumed or
re-sized run has nothing to replay.

Samples are shuffled by (seed, epoch) inside windows of shards (a window's shards are what a loader holds in cache),
packed into bins under two budgets (language-model tokens and vision tiles) by first-fit over a look-ahead of open
bins, and bins are grouped into steps. Removing padding is the largest single gain of a VLM trainer and the second
budget keeps image-heavy packs from running out of memory (spec: training.md C.1, B.2 item 4).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmflow.errors import DataError

VERSION = 1
LOOK_AHEAD = 32  # bins that stay open while samples stream by
WINDOW = 64  # shards whose samples are shuffled together
TILE_COST = 0.5  # cost of one tile, in tokens per token-per-tile; only used to deal packs evenly

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Lengths:
    """What the plan needs to know of each sample; arrays of equal length n.

    Attributes:
        tokens: tokens in the language model, image tokens included.
        tiles: vision tiles.
        targets: tokens that carry a loss.
        weight: how often an epoch shows the sample, 1.0 = once.
        shard: number of the shard the sample lies in.
    """

    tokens: Ints
    tiles: Ints
    targets: Ints
    weight: NDArray[np.float64]
    shard: Ints

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Budget:
    """Upper bounds of one pack."""

    tokens: int
    tiles: int


@dataclass(frozen=True)
class Plan:
    """Steps of packs of samples, as three flat arrays.

    Attributes:
        order: sample numbers, pack after pack.
        pack_start: pack p holds ``order[pack_start[p]:pack_start[p + 1]]``.
        step_start: step s holds packs ``step_start[s]`` to ``step_start[s + 1]``.
        pack_tokens, pack_tiles, pack_targets: sums of each pack.
        dropped: (sample number, reason) of samples that fit no pack; never cut, never silent.
        report: fill, padding, drops: shares and counts for people.
    """

    order: Ints
    pack_start: Ints
    step_start: Ints
    pack_tokens: Ints
    pack_tiles: Ints
    pack_targets: Ints
    dropped: list[tuple[int, str]]
    report: dict[str, Any]

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.step_start) - 1

    def packs_of(self, step: int) -> range:
        """Pack numbers of a step."""
        return range(int(self.step_start[step]), int(self.step_start[step + 1]))

    def samples_of(self, pack: int) -> list[int]:
        """Sample numbers of a pack, in the order they are laid out."""
        return [int(i) for i in self.order[self.pack_start[pack] : self.pack_start[pack + 1]]]

    def targets_of(self, step: int) -> int:
        """Target tokens of a step over all ranks: the divisor of its loss."""
        return int(self.pack_targets[self.step_start[step] : self.step_start[step + 1]].sum())

    def digest(self) -> str:
        """sha256 over everything that decides the content of the steps."""
        state = hashlib.sha256()
        for array in (self.order, self.pack_start, self.step_start):
            state.update(np.ascontiguousarray(array, dtype="<i8").tobytes() + b"|")
        return state.hexdigest()

    def deal(self, step: int, world: int, tile_tokens: float = 16.0) -> list[list[int | None]]:
        """Packs of a step for each rank, balanced by cost and equal in number (None = an empty pack).

        Longest first onto the least loaded rank that still has room; ranks must run equally many micro-batches,
        or a collective would wait for ever.
        """
        packs = list(self.packs_of(step))
        room = -(-len(packs) // world)
        cost = {p: self.cost(p, tile_tokens) for p in packs}
        ranks: list[list[int]] = [[] for _ in range(world)]
        load = [0.0] * world
        for pack in sorted(packs, key=lambda p: (-cost[p], p)):
            rank = min((r for r in range(world) if len(ranks[r]) < room), key=lambda r: (load[r], r))
            ranks[rank].append(pack)
            load[rank] += cost[pack]
        return [[*sorted(mine), *[None] * (room - len(mine))] for mine in ranks]

    def cost(self, pack: int, tile_tokens: float = 16.0) -> float:
        """Relative time of a pack: its tokens, plus its tiles counted at half a token per image token."""
        return float(self.pack_tokens[pack]) + TILE_COST * tile_tokens * float(self.pack_tiles[pack])

    def imbalance(self, world: int, tile_tokens: float = 16.0) -> float:
        """Mean over steps of (cost of the slowest rank / mean cost of a rank); 1.0 is perfect."""
        ratios = []
        for step in range(self.steps):
            loads = [
                sum(self.cost(p, tile_tokens) for p in mine if p is not None)
                for mine in self.deal(step, world, tile_tokens)
            ]
            ratios.append(max(loads) / (sum(loads) / world))
        return float(np.mean(ratios)) if ratios else 1.0


def make_plan(
    lengths: Lengths,
    budget: Budget,
    packs: int,
    seed: int,
    epochs: float = 1.0,
    max_steps: int | None = None,
    look_ahead: int = LOOK_AHEAD,
    window: int = WINDOW,
) -> Plan:
    """Plan the whole training.

    Args:
        packs: packs per optimizer step, over all processes.
        epochs: passes over the weighted data; 1.5 shows half of the second pass. Ignored beyond ``max_steps``; with
            ``max_steps`` and epochs 0, as many passes as the steps need.

    Raises:
        DataError: nothing fits the budget, so there is nothing to train on.
    """
    dropped = _too_long(lengths, budget)
    usable = np.ones(len(lengths), dtype=bool)
    usable[[i for i, _ in dropped]] = False
    if not usable.any():
        raise DataError(_nothing(lengths, budget, dropped))
    wanted = None if max_steps is None else max_steps * packs
    bins: list[list[int]] = []
    opened: list[_Bin] = []
    epoch = 0
    while epoch < epochs or (wanted is not None and epochs <= 0 and len(bins) < wanted):
        stream = _epoch_order(lengths, usable, seed, epoch, window)
        if 0 < epochs < epoch + 1:
            stream = stream[: max(1, round(len(stream) * (epochs - epoch)))]
        for sample in stream.tolist():
            _first_fit(
                sample, int(lengths.tokens[sample]), int(lengths.tiles[sample]), budget, opened, bins, look_ahead
            )
            if wanted is not None and len(bins) >= wanted:
                break
        epoch += 1
        if wanted is not None and len(bins) >= wanted:
            break
    bins += [b.samples for b in opened]
    if not bins:
        raise DataError(
            f"none of {int(usable.sum())} usable samples is shown in {epochs:g} epochs: their weights (passes an epoch) sum to "
            f"{float(lengths.weight[usable].sum()):.3g}, and chance left all of them out. Raise `weight` in the stage's data, or "
            "`epochs`."
        )
    if wanted is not None:
        bins = bins[:wanted]
    return _seal(bins, lengths, budget, packs, dropped)


@dataclass
class _Bin:
    tokens: int
    tiles: int
    samples: list[int]


def _first_fit(
    sample: int, tokens: int, tiles: int, budget: Budget, opened: list[_Bin], closed: list[list[int]], look_ahead: int
) -> None:
    """Put a sample into the first open bin with room; else open a bin, closing the oldest when too many are open."""
    for number, b in enumerate(opened):
        if b.tokens + tokens <= budget.tokens and b.tiles + tiles <= budget.tiles:
            b.tokens += tokens
            b.tiles += tiles
            b.samples.append(sample)
            if b.tokens == budget.tokens:
                closed.append(opened.pop(number).samples)
            return
    if len(opened) >= look_ahead:
        closed.append(opened.pop(0).samples)
    opened.append(_Bin(tokens, tiles, [sample]))


def _too_long(lengths: Lengths, budget: Budget) -> list[tuple[int, str]]:
    tokens, tiles = lengths.tokens > budget.tokens, lengths.tiles > budget.tiles
    reasons = []
    for i in np.flatnonzero(tokens | tiles).tolist():
        if tokens[i]:
            reasons.append((i, f"{lengths.tokens[i]} tokens, budget {budget.tokens}"))
        else:
            reasons.append((i, f"{lengths.tiles[i]} tiles, budget {budget.tiles}"))
    return reasons


def _nothing(lengths: Lengths, budget: Budget, dropped: list[tuple[int, str]]) -> str:
    if not len(lengths):
        return "no training sample is left after filtering; look at the counts of skipped samples and their reasons"
    return (
        f"none of {len(lengths)} samples fits a pack of {budget.tokens} tokens and {budget.tiles} tiles (first: "
        f"{dropped[0][1]}); samples are never cut inside an image, so raise budget.tokens / budget.tiles or lower "
        "model.tiling.max_tiles"
    )


def _epoch_order(lengths: Lengths, usable: NDArray[np.bool_], seed: int, epoch: int, window: int) -> Ints:
    """Sample numbers of one epoch, shuffled by (seed, epoch) inside windows of shuffled shards, weights applied."""
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    shards = int(lengths.shard.max()) + 1
    rank_of_shard = random.permutation(shards)
    whole = np.floor(lengths.weight).astype(np.int64)
    extra = random.random(len(lengths)) < (lengths.weight - whole)
    copies = np.where(usable, whole + extra, 0)
    order = np.repeat(np.arange(len(lengths), dtype=np.int64), copies)
    draw = random.random(len(order))
    return order[np.lexsort((draw, rank_of_shard[lengths.shard[order]] // window))]


def _seal(bins: list[list[int]], lengths: Lengths, budget: Budget, packs: int, dropped: list[tuple[int, str]]) -> Plan:
    sizes = np.array([len(b) for b in bins], dtype=np.int64)
    order = np.array([i for b in bins for i in b], dtype=np.int64)
    pack_start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    step_start = np.append(np.arange(0, len(bins), packs), len(bins)).astype(np.int64)

    def sums(values: Ints) -> Ints:
        return np.add.reduceat(values[order], pack_start[:-1]).astype(np.int64)

    tokens, tiles = sums(lengths.tokens), sums(lengths.tiles)
    report = {
        "samples": len(lengths),
        "shown": len(order),
        "packs": len(bins),
        "steps": len(step_start) - 1,
        "tokens": int(tokens.sum()),
        "targets": int(lengths.targets[order].sum()),
        "tiles": int(tiles.sum()),
        "fill_tokens": round(float(tokens.mean() / budget.tokens), 4),
        "fill_tiles": round(float(tiles.mean() / max(1, budget.tiles)), 4),
        "padding": 0.0,  # packs are laid end to end: no pad token exists
        "dropped": len(dropped),
        "dropped_share": round(len(dropped) / max(1, len(lengths)), 4),
    }
    return Plan(order, pack_start, step_start, tokens, tiles, sums(lengths.targets), dropped, report)
