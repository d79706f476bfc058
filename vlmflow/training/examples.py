"""From stored samples to token sequences, once, before training.

Every sample of a stage's mixture is rendered by the prompt style, tokenised and measured here, in one pass over the
shards' JSON (no image is decoded: tile counts follow from width and height). What cannot be trained on is counted
with its reason, never silently given a loss of zero (spec: training.md B.2 item 8). The result lies on local disk as
flat arrays that every rank maps, so ranks neither tokenise again nor hold a second copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlmflow.dataset.layer import read_part
from vlmflow.dataset.manifest import Manifest, ShardRef
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import DataError, StepFailed, VlmflowError
from vlmflow.models.family import IGNORED, masked_labels
from vlmflow.training.plan import Lengths

if TYPE_CHECKING:
    from vlmflow.models.chat import Segment
    from vlmflow.recipe.mixture import DataUse
    from vlmflow.recipe.stage import StageSpec

VERSION = 1
ARRAYS = ("ids", "target", "start", "tiles", "tile_start", "shard", "row", "weight")


class Encoded(NamedTuple):
    """One sample as the model reads it: ids [n], target flags [n], tiles of each of its images."""

    ids: list[int]
    target: list[bool]
    tiles: list[int]


@dataclass
class Examples:
    """All examples of a stage, memory-mapped.

    Attributes:
        shards: (reference, dataset name); ``arrays["shard"]`` points in here, ``arrays["row"]`` into the shard.
        report: counts: examples, filtered, failures by reason with an example key each.
    """

    arrays: dict[str, np.ndarray]
    shards: list[tuple[ShardRef, str]]
    report: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrays["shard"])

    def ids(self, number: int) -> np.ndarray:
        """Token ids of an example, int32 [n]."""
        return self.arrays["ids"][self.arrays["start"][number] : self.arrays["start"][number + 1]]

    def labels(self, number: int) -> np.ndarray:
        """Unshifted labels of an example, int64 [n], -100 outside targets."""
        a, b = self.arrays["start"][number], self.arrays["start"][number + 1]
        return masked_labels(self.arrays["ids"][a:b], self.arrays["target"][a:b])

    def tiles(self, number: int) -> list[int]:
        """Tiles of each image of an example."""
        a, b = self.arrays["tile_start"][number], self.arrays["tile_start"][number + 1]
        return [int(n) for n in self.arrays["tiles"][a:b]]

    def lengths(self) -> Lengths:
        """What the pack plan needs."""
        start, tile_start = self.arrays["start"].astype(np.int64), self.arrays["tile_start"].astype(np.int64)
        target = np.asarray(self.arrays["target"], dtype=bool).copy()
        target[start[:-1]] = False  # nothing predicts the first token of a segment
        targets = np.concatenate([[0], np.cumsum(target, dtype=np.int64)])
        tiles = np.concatenate([[0], np.cumsum(self.arrays["tiles"], dtype=np.int64)])
        return Lengths(
            tokens=np.diff(start),
            tiles=np.diff(tiles[tile_start]),
            targets=np.diff(targets[start]),
            weight=np.asarray(self.arrays["weight"], dtype=np.float64),
            shard=np.asarray(self.arrays["shard"], dtype=np.int64),
        )


class Unusable(Exception):
    """A sample that cannot be trained on; the message is the reason it is counted under."""


class NoText(Unusable):
    """The layer ended without a text for this sample: an image without words, a caption its own step dropped.

    That is the layer's result, judged there by its own limit; here the sample is filtered out, and counted.
    """


def segments_of(sample: Sample, row: dict[str, Any] | None, use: DataUse, stage: StageSpec, seed: int) -> list[Segment]:
    """A sample as prompt segments, whatever its text comes from.

    Captions (alt text or a layer's text) become the answer to one of ``stage.instructions``, drawn by (seed, key), or
    the continuation of the image.

    Args:
        sample: key and meta; its image bytes are not needed (``images`` is counted from meta).
        row: the sample's row in the layer named by ``use.text``, if it is one.

    Raises:
        NoText: the layer failed on it, or found no text.
        Unusable: alt text was asked for and there is none.
        DataError: from rendering: an empty answer, or image markers that do not match the images.
    """
    from vlmflow.models.chat import render

    images, style = len(sample.meta.get("images", [])), use.prompt or stage.prompt
    if use.text == "conversations":
        turns = sample.meta.get("conversations") or []
        return render(turns, style, images=images, key=sample.key)
    if row is not None and row.get("error"):
        raise NoText(f"{use.text} failed: {row['error']}")
    text = (sample.meta.get("text") if use.text == "alt" else (row or {}).get("text")) or ""
    if not text.strip():
        raise (Unusable if use.text == "alt" else NoText)(f"no {use.text} text")
    instruction = ""
    if stage.instructions and style == "chat":
        instruction = stage.instructions[_draw(seed, sample.key, len(stage.instructions))]
    return render(None, style, text=text, instruction=instruction, images=images, key=sample.key)


def _draw(seed: int, key: str, n: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") % n


def prepare(
    folder: Path,
    uses: list[tuple[DataUse, Manifest]],
    stage: StageSpec,
    encode: Callable[[list[Segment], list[dict[str, Any]]], Encoded],
    seed: int,
    scratch: Path,
) -> Examples:
    """Encode the mixture of a stage into ``folder``; an earlier finished result there is used as it is.

    Args:
        uses: ingredients with the dataset each takes from.
        encode: (segments, image descriptions of ``meta['images']``) -> Encoded; binds family, tokenizer and tiling.

    Raises:
        StepFailed: more than ``stage.failure_limit`` of the samples are unusable (names reasons and samples).
        DataError: nothing is left, or a layer that the mixture needs is missing.
    """
    if not (folder / "report.json").exists():
        building = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        try:
            _build(building, uses, stage, encode, seed, scratch)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return load(folder)


def load(folder: Path) -> Examples:
    """Map prepared examples from disk."""
    report = json.loads((folder / "report.json").read_text())
    shards = [(ShardRef.model_validate(s), name) for s, name in report.pop("shards")]
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
    return Examples(arrays, shards, report)


class _Sink:
    """Growing flat arrays; token ids go straight to disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ids = open(folder / "ids.raw", "wb")  # noqa: SIM115
        self.target = open(folder / "target.raw", "wb")  # noqa: SIM115
        self.start: list[int] = [0]
        self.tiles: list[int] = []
        self.tile_start: list[int] = [0]
        self.shard: list[int] = []
        self.row: list[int] = []
        self.weight: list[float] = []

    def add(self, example: Encoded, shard: int, row: int, weight: float) -> None:
        self.ids.write(np.asarray(example.ids, dtype="<i4").tobytes())
        self.target.write(np.asarray(example.target, dtype=bool).tobytes())
        self.start.append(self.start[-1] + len(example.ids))
        self.tiles += example.tiles
        self.tile_start.append(len(self.tiles))
        self.shard.append(shard)
        self.row.append(row)
        self.weight.append(weight)

    def seal(self) -> None:
        for name, kind in (("ids", "<i4"), ("target", "bool")):
            getattr(self, name).close()
            raw = self.folder / f"{name}.raw"
            array = np.memmap(raw, dtype=kind, mode="r") if raw.stat().st_size else np.zeros(0, kind)
            np.save(self.folder / f"{name}.npy", array, allow_pickle=False)
            raw.unlink()
        kinds = {"start": "<i8", "tiles": "<i4", "tile_start": "<i8", "shard": "<i4", "row": "<i4", "weight": "<f8"}
        for name, kind in kinds.items():
            np.save(self.folder / f"{name}.npy", np.asarray(getattr(self, name), dtype=kind), allow_pickle=False)


def _build(folder: Path, uses: list, stage: StageSpec, encode: Callable, seed: int, scratch: Path) -> None:
    sink, shards = _Sink(folder), []
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    filtered = failed = 0
    for use, manifest in uses:
        chosen = manifest.select(use.sources)
        for number, shard in enumerate(chosen.shards):
            shards.append((shard, manifest.name))
            reader = ShardReader(shard, scratch)
            for row_number, key, meta, row in _rows(reader, chosen, number, use, scratch):
                if meta is None:
                    filtered += 1
                    continue
                try:
                    segments = segments_of(Sample(key, meta), row, use, stage, seed)
                    example = encode(segments, meta.get("images", []))
                    if not np.any(masked_labels(example.ids, example.target) != IGNORED):
                        raise Unusable("no target token")
                except (Unusable, VlmflowError) as problem:
                    if isinstance(problem, NoText):
                        filtered += 1
                    else:
                        failed += 1
                    reason = str(problem).replace(f"sample '{key}'", "sample")
                    reasons[reason] += 1
                    first.setdefault(reason, key)
                    continue
                sink.add(example, len(shards) - 1, row_number, use.weight)
    sink.seal()
    seen = len(sink.shard) + failed
    report: dict[str, Any] = {
        "examples": len(sink.shard),
        "seen": seen,
        "filtered": filtered,
        "failed": failed,
        "reasons": [{"reason": r, "count": n, "example": first[r]} for r, n in reasons.most_common()],
        "shards": [[s.model_dump(mode="json"), name] for s, name in shards],
    }
    check_failures(failed, seen, stage.failure_limit, report["reasons"], filtered)
    (folder / "report.json").write_text(json.dumps(report, sort_keys=True))


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


def _rows(
    reader: ShardReader, manifest: Manifest, number: int, use: DataUse, scratch: Path
) -> Iterator[tuple[int, str, dict[str, Any] | None, dict[str, Any] | None]]:
    """(row, key, meta or None if filtered out, layer row or None) of one shard, in order."""
    keep = read_part(manifest.layer("keep").parts[number], scratch) if use.keep else None
    layer = None
    if use.text not in ("alt", "conversations"):
        layer = read_part(manifest.layer(use.text).parts[number], scratch)
    for row, key in enumerate(reader.keys()):
        if keep is not None and not keep[key]["keep"]:
            yield row, key, None, None
        else:
            yield row, key, reader.meta(key), None if layer is None else layer[key]
