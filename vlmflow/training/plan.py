"""The pack plan: which samples make which step, known before training starts.

A plan is a pure function of (examples, stage, seed, cost model). It does not know the number of processes: a step is the
same set of packs on 1 and on 64 ranks, only the dealing differs, so both give the same weights up to the order of float
sums. The position in training is therefore one integer, the step, and a resumed or re-sized run has nothing to replay.

`planner.make_plan` makes one from lengths; ranks only read it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmflow.training import packing
from vlmflow.training.flops import CostModel

if TYPE_CHECKING:
    from vlmflow.training.pool import Dropped, ShardUse

VERSION = 3  # raise when the same arguments would give another plan, or a stage another cost model
MEASURED = 4096  # steps, at most, over which an imbalance is taken

Ints = NDArray[np.int64]
ITEM = np.dtype(
    [
        *(
            (name, "<i4")
            for name in ("use", "shard", "row", "first", "last", "max_tiles", "tokens", "tiles", "targets")
        ),
        ("squares", "<i8"),
    ]
)


class Item(NamedTuple):
    """A sample, or a stretch of it, in a pack.

    Attributes:
        use: number of the ingredient.
        shard: number in ``Plan.shards``.
        row: place in the shard.
        first, last: units of the sample (rounds of a conversation, pairs of answers); -1, -1 = all of it.
        max_tiles: tile limit of an image in its phase of the training.
        tokens, targets: what was planned, over all its parts.
        tiles: what was planned; parts share them.
        squares: sum of the squared lengths of its parts.
    """

    use: int
    shard: int
    row: int
    first: int
    last: int
    max_tiles: int
    tokens: int
    tiles: int
    targets: int
    squares: int


@dataclass(frozen=True)
class Plan:
    """Steps of packs of items, as three flat arrays.

    Attributes:
        items: dtype ``ITEM``, pack after pack.
        pack_start: pack p holds ``items[pack_start[p]:pack_start[p + 1]]``.
        step_start: step s holds packs ``step_start[s]`` to ``step_start[s + 1]``.
        shards: what ``items["shard"]`` counts in.
        cost: by which packs are dealt.
        report: fill, padding, drops: shares and counts for people.
        examples: counts of the samples, and why some cannot be used.
        dropped: what fits no pack; never cut, never silent. Not stored with the plan.
    """

    items: NDArray[Any]
    pack_start: Ints
    step_start: Ints
    shards: list[ShardUse]
    cost: CostModel
    report: dict[str, Any]
    examples: dict[str, Any] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)

    @cached_property
    def pack_tokens(self) -> Ints:
        """Language-model tokens of each pack."""
        return self._sums("tokens")

    @cached_property
    def pack_tiles(self) -> Ints:
        """Vision tiles of each pack."""
        return self._sums("tiles")

    @cached_property
    def pack_targets(self) -> Ints:
        """Target tokens of each pack."""
        return self._sums("targets")

    @cached_property
    def pack_squares(self) -> Ints:
        """Sum of the squared segment lengths of each pack."""
        return self._sums("squares")

    @cached_property
    def pack_cost(self) -> NDArray[np.float64]:
        """Operations of each pack."""
        return np.asarray(self.cost.cost(self.pack_tokens, self.pack_squares, self.pack_tiles, self.pack_targets))

    def _sums(self, name: str) -> Ints:
        return np.add.reduceat(self.items[name].astype(np.int64), self.pack_start[:-1])

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.step_start) - 1

    def packs_of(self, step: int) -> range:
        """Pack numbers of a step."""
        return range(int(self.step_start[step]), int(self.step_start[step + 1]))

    def items_of(self, pack: int) -> list[Item]:
        """Items of a pack, in the order they are laid out."""
        return [Item(*item) for item in self.items[self.pack_start[pack] : self.pack_start[pack + 1]].tolist()]

    def items_in(self, step: int) -> int:
        """Number of items of a step over all ranks (of a preference stage: pairs)."""
        packs = self.packs_of(step)
        return int(self.pack_start[packs.stop] - self.pack_start[packs.start])

    def targets_of(self, step: int) -> int:
        """Target tokens of a step over all ranks: the divisor of its loss."""
        return int(self.pack_targets[self.step_start[step] : self.step_start[step + 1]].sum())

    def digest(self) -> str:
        """sha256 over everything that decides the content of the steps."""
        state = hashlib.sha256("|".join(entry.shard.sha256 for entry in self.shards).encode())
        for array in (self.items, self.pack_start, self.step_start):
            state.update(np.ascontiguousarray(array).tobytes() + b"|")
        return state.hexdigest()

    def deal(self, step: int, world: int) -> list[list[int | None]]:
        """Packs of a step for each rank, balanced by cost and equal in number (None = an empty pack).

        Ranks must run equally many micro-batches, or a collective would wait for ever.
        """
        packs = self.packs_of(step)
        dealt = packing.deal(self.pack_cost[packs.start : packs.stop].tolist(), world)
        room = max(len(mine) for mine in dealt)
        return [[*(packs.start + p for p in mine), *[None] * (room - len(mine))] for mine in dealt]

    def imbalance(self, world: int) -> float:
        """Mean over steps of (cost of the slowest rank / mean cost of a rank); 1.0 is perfect.

        Of a long plan, the mean over `MEASURED` steps at equal distances.
        """
        ratios = []
        for step in range(0, self.steps, max(1, -(-self.steps // MEASURED))):
            loads = [sum(self.pack_cost[p] for p in mine if p is not None) for mine in self.deal(step, world)]
            ratios.append(max(loads) / (sum(loads) / world))
        return float(np.mean(ratios)) if ratios else 1.0
