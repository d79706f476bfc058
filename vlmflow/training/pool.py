"""All samples that a stage may learn from, as flat arrays built from the `length` layers of its ingredients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from vlmflow.dataset.layer import read_columns
from vlmflow.dataset.manifest import LayerPart, Manifest, ShardRef
from vlmflow.errors import DataError, StepFailed
from vlmflow.training.examples import KINDS, LAYER_TEXTS
from vlmflow.training.length import LAYER, NOT_KEPT

if TYPE_CHECKING:
    from vlmflow.recipe.mixture import DataUse

Ints = NDArray[np.int64]
_TOKENS, _TILES = 3, 4  # columns of `Pieces`
UNIT_COLUMNS = ("begin", "end", "targets", "images")


class ShardUse(BaseModel):
    """One shard as one ingredient reads it: the text's layer part beside it, where the text is a layer's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    use: int
    dataset: str
    shard: ShardRef
    text: LayerPart | None = None


class Dropped(NamedTuple):
    """Something that fits no pack.

    Attributes:
        example: whose it is.
        reason: both numbers, e.g. ``5000 tokens, budget 4096``; for one round of a conversation, which.
        kind: the reason without numbers, for counting.
    """

    example: int
    reason: str
    kind: str


class Pieces(NamedTuple):
    """What may be packed, for one tile limit: whole examples, or stretches of units of those that are too long.

    Arrays of equal length, in the order of the examples; pieces of example e are ``start[e]:start[e + 1]``.

    Attributes:
        first, last: units; -1, -1 = the whole example.
        squares: sum of the squared lengths of its segments.
        dropped: what fits no pack.
    """

    example: Ints
    first: Ints
    last: Ints
    tokens: Ints
    tiles: Ints
    targets: Ints
    squares: Ints
    start: Ints
    dropped: list[Dropped]


@dataclass(frozen=True)
class Visual:
    """How images become tokens.

    Attributes:
        tokens_per_tile: tokens in the language model.
        max_tiles: the model's own limit.
        tiles_for: (width, height, max_tiles) -> tiles, thumbnail included.
    """

    tokens_per_tile: int
    max_tiles: int
    tiles_for: Callable[[int, int, int], int]


@dataclass
class Examples:
    """Usable samples of a stage; e counts examples, u their units, i their images.

    Attributes:
        uses: the stage's ingredients.
        shards: ``arrays["shard"]`` points in here, ``arrays["row"]`` into the shard.
        arrays: use, shard, row [e]; unit_start [e + 1] into begin, end, targets, images [u] (see `length.measure`);
            image_start [e + 1] into size [i], a row of sizes [s, 2] in pixels.
        report: counts: examples, seen, filtered, failed, and reasons with an example key each.
    """

    uses: list[DataUse]
    shards: list[ShardUse]
    arrays: dict[str, NDArray[Any]]
    report: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrays["shard"])

    @property
    def text_only(self) -> NDArray[np.bool_]:
        """Which examples have no image [e]."""
        return np.diff(self.arrays["image_start"]) == 0

    @property
    def sources(self) -> list[str]:
        """Source of each entry of ``shards``."""
        return [entry.shard.source for entry in self.shards]

    def key(self, number: int, scratch: Path) -> str:
        """Sample key of an example."""
        from vlmflow.dataset.shard import ShardReader

        shard = self.shards[int(self.arrays["shard"][number])].shard
        return ShardReader(shard, scratch).keys()[int(self.arrays["row"][number])]

    def pieces(self, visual: Visual, max_tiles: int, tokens: int, tiles: int, split: bool) -> Pieces:
        """What can be packed under a tile limit and the two budgets of a pack.

        Args:
            split: stretches of a too long conversation are tried; else it is dropped.
        """
        a = self.arrays
        counts = np.array([visual.tiles_for(int(w), int(h), max_tiles) for w, h in a["sizes"]], dtype=np.int64)
        cumulative = np.concatenate([[0], np.cumsum(counts[a["size"]], dtype=np.int64)])
        parts = np.array([KINDS[use.text].parts for use in self.uses], dtype=np.int64)[a["use"]]
        joined = np.array([KINDS[use.text].joined for use in self.uses], dtype=bool)[a["use"]]
        of_unit = np.repeat(np.arange(len(self), dtype=np.int64), np.diff(a["unit_start"]))
        # tiles of all images shown up to the end of a unit
        shown = cumulative[a["image_start"][of_unit] + a["images"]] - cumulative[a["image_start"][of_unit]]
        base = a["unit_start"][:-1]

        def table(example: Ints, first: Ints, last: Ints, whole: bool) -> Ints:
            """Rows of the columns of `Pieces`, for units ``first`` to ``last`` of examples."""
            part, i, j = parts[example], base[example] + first, base[example] + last
            tiles = shown[j]  # encoded once; each part has their tokens
            tokens = a["end"][j] - a["begin"][i] + tiles * part * visual.tokens_per_tile
            targets = a["targets"][j] - np.where(first > 0, a["targets"][i - 1], 0)
            none = np.full(len(example), -1)
            stretch = (none, none) if whole else (first, last)
            return np.stack([example, *stretch, tokens, tiles, targets, tokens * tokens // part], axis=1)

        one = np.flatnonzero(joined)
        single = np.flatnonzero(~joined[of_unit])
        units = np.diff(a["unit_start"])
        inner = single - base[of_unit[single]]
        made = np.concatenate(
            [table(one, np.zeros_like(one), units[one] - 1, True), table(of_unit[single], inner, inner, False)]
        )
        fits = (made[:, _TOKENS] <= tokens) & (made[:, _TILES] <= tiles)
        long = made[~fits, 0]
        cut = long[joined[long] & (units[long] > 1)] if split else long[:0]
        stretches = [
            (int(e), *stretch)
            for e in cut
            for stretch in _stretches(
                a["begin"][base[e] : base[e] + units[e]].tolist(),
                a["end"][base[e] : base[e] + units[e]].tolist(),
                shown[base[e] : base[e] + units[e]].tolist(),
                visual.tokens_per_tile,
                tokens,
                tiles,
            )
        ]
        which, first, last = np.array(stretches, dtype=np.int64).reshape(-1, 3).T
        tried = table(which, first, last, whole=False)
        short = (tried[:, _TOKENS] <= tokens) & (tried[:, _TILES] <= tiles)
        lost = np.concatenate([made[~fits & ~np.isin(made[:, 0], cut)], tried[~short]])
        lost = lost[np.lexsort((lost[:, 1], lost[:, 0]))]
        dropped = [_too_long(row, tokens, tiles) for row in lost.tolist()]
        made = np.concatenate([made[fits], tried[short]])
        made = made[np.lexsort((made[:, 1], made[:, 0]))]
        start = np.searchsorted(made[:, 0], np.arange(len(self) + 1))
        return Pieces(*made.T.copy(), start=start, dropped=dropped)  # type: ignore[misc]


def _stretches(
    begin: list[int], end: list[int], shown: list[int], tile_tokens: int, tokens: int, tiles: int
) -> list[tuple[int, int]]:
    """(first, last) of the fewest stretches of units that fit; a unit that is too long by itself is a stretch."""
    found = []
    first = 0
    while first < len(end):
        last = first
        while last + 1 < len(end) and shown[last + 1] <= tiles:
            if end[last + 1] - begin[first] + shown[last + 1] * tile_tokens > tokens:
                break
            last += 1
        found.append((first, last))
        first = last + 1
    return found


def _too_long(row: list[int], tokens: int, tiles: int) -> Dropped:
    where = f"round {row[1] + 1}: " if row[1] >= 0 else ""
    if row[_TOKENS] > tokens:
        return Dropped(row[0], f"{where}{row[_TOKENS]} tokens, budget {tokens}", "too many tokens for a pack")
    return Dropped(row[0], f"{where}{row[_TILES]} tiles, budget {tiles}", "too many tiles for a pack")


def gather(uses: Sequence[tuple[DataUse, Manifest]], scratch: Path) -> Examples:
    """Examples of ingredients whose manifests carry the `length` layer (of these sources alone)."""
    import pyarrow.compute as pc

    shards: list[ShardUse] = []
    columns: dict[str, list[Any]] = {
        name: [] for name in ("use", "shard", "row", "units", "n", "w", "h", *UNIT_COLUMNS)
    }
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for number, (use, manifest) in enumerate(uses):
        texts = manifest.layer(use.text).parts if use.text in LAYER_TEXTS else [None] * len(manifest.shards)
        for shard, part, text in zip(manifest.shards, manifest.layer(LAYER).parts, texts, strict=True):
            table = read_columns(part, scratch)
            for column in ("filtered", "error"):
                bad = table.filter(table[column].is_valid())
                counts[column] += len(bad)
                for key, reason in zip(bad["key"].to_pylist(), bad[column].to_pylist(), strict=True):
                    if reason != NOT_KEPT:
                        reasons[reason] += 1
                        first.setdefault(reason, key)
            good = pc.and_(table["filtered"].is_null(), table["error"].is_null()).to_numpy()
            table = table.filter(good)
            rows = np.flatnonzero(good)
            columns["use"].append(np.full(len(rows), number))
            columns["shard"].append(np.full(len(rows), len(shards)))
            columns["row"].append(rows)
            for name, source in (("units", "end"), ("n", "widths")):
                columns[name].append(pc.list_value_length(table[source]).to_numpy())
            for name in UNIT_COLUMNS:
                columns[name].append(pc.list_flatten(table[name]).to_numpy())
            for name, source in (("w", "widths"), ("h", "heights")):
                columns[name].append(pc.list_flatten(table[source]).to_numpy())
            shards.append(ShardUse(use=number, dataset=manifest.name, shard=shard, text=text))
    flat = {k: np.concatenate(v).astype(np.int64) if v else np.zeros(0, np.int64) for k, v in columns.items()}
    sizes, size = np.unique(flat["w"] << 32 | flat["h"], return_inverse=True)
    arrays = {name: flat[name] for name in ("use", "shard", "row", *UNIT_COLUMNS)} | {
        "unit_start": np.concatenate([[0], np.cumsum(flat["units"])]),
        "image_start": np.concatenate([[0], np.cumsum(flat["n"])]),
        "size": size,
        "sizes": np.stack([sizes >> 32, sizes & 0xFFFFFFFF], axis=1),
    }
    examples = len(arrays["row"])
    report = {
        "examples": examples,
        "seen": examples + counts["error"],
        "filtered": counts["filtered"],
        "failed": counts["error"],
        "reasons": [{"reason": r, "count": n, "example": first[r]} for r, n in reasons.most_common()],
    }
    return Examples([use for use, _ in uses], shards, arrays, report)


def check_failures(failed: int, seen: int, limit: float, reasons: list[dict[str, Any]], filtered: int = 0) -> None:
    """Raise StepFailed above the limit, DataError when there is nothing at all."""
    if not seen:
        raise DataError(
            f"the stage has no sample to train on: {filtered} were filtered out by the keep layer or have no text; check stages.*.data"
        )
    if failed > limit * seen:
        top = "; ".join(f"{r['count']} x {r['reason']} (e.g. {r['example']})" for r in reasons[:4])
        raise StepFailed(
            f"{failed} of {seen} samples ({failed / seen:.1%}) cannot be trained on, more than failure_limit {limit:.1%}: {top}. "
            "Repair or filter the data, or raise failure_limit if this loss is acceptable."
        )
