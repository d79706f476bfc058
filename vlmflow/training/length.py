"""The `length` layer: how long each sample of an ingredient is, measured once and kept beside the data.

A row tells text tokens and targets up to the end of each unit (a caption, a round of a conversation, a pair of
answers) and the sizes of the images, from which visual tokens follow for any tile limit. No image is decoded. What
cannot be trained on has a reason instead, and is never silently given a loss of zero (spec: training.md B.2 item 8).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmflow.dataset.layer import add_layer
from vlmflow.dataset.manifest import Manifest
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import ShardReader
from vlmflow.digest import digest
from vlmflow.errors import VlmflowError
from vlmflow.training.examples import KINDS, LAYER_TEXTS, NoText, Row, Unusable, Wording, render

if TYPE_CHECKING:
    from vlmflow.models.family import Family
    from vlmflow.models.store import FileRef
    from vlmflow.recipe.mixture import DataUse
    from vlmflow.recipe.stage import StageSpec
    from vlmflow.step import Context

LAYER = "length"
VERSION = 1  # raise when the same sample would be given another length
NOT_KEPT = "not kept"  # the reason of samples that the perplexity filter left out; not counted as a problem
SCHEMA = {
    "filtered": "str",
    "begin": "list<int>",
    "end": "list<int>",
    "targets": "list<int>",
    "images": "list<int>",
    "widths": "list<int>",
    "heights": "list<int>",
}
_TOKENIZER_FILES = ("vocab", "merges", "added_tokens", "special_tokens_map")


@dataclass(frozen=True)
class Reading:
    """What measuring needs of a model: no weights.

    Attributes:
        tokenizer: a fast one, used for this alone: special tokens that a text spells out stay plain characters in it.
        tokenizer_digest: hash of the tokenizer's files.
    """

    family: Family
    tokenizer: Any
    config: Any
    tokenizer_digest: str

    def __post_init__(self) -> None:
        # `models.family.tokenize` sets this for each call and puts it back, which threads that share the tokenizer cannot.
        self.tokenizer.backend_tokenizer.encode_special_tokens = True

    def expand(self, segments: list[Any], images: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, target flags) of rendered segments as if their images had no tile."""
        ids, target = self.family.expand(segments, self.tokenizer, [0] * images, self.config)
        return np.asarray(ids, dtype=np.int64), np.asarray(target, dtype=bool)


def tokenizer_digest(files: list[FileRef]) -> str:
    """Identity of a model's tokenizer: its files, whatever the weights beside them."""
    mine = [
        f for f in files if "tokenizer" in f.path or f.path.startswith(_TOKENIZER_FILES) or f.path.endswith(".model")
    ]
    return digest(sorted([f.path, f.sha256] for f in mine))


def measured(ctx: Context, manifest: Manifest, use: DataUse, stage: StageSpec, seed: int, reading: Reading) -> Manifest:
    """The dataset's chosen sources with their `length` layer for this ingredient; parts that exist are found again.

    Raises:
        DataError: a source or layer that the ingredient names does not exist.
    """
    chosen = manifest.select(use.sources)
    wording = Wording.of(use, stage, seed)
    reads = [use.text] if use.text in LAYER_TEXTS else []
    params = {
        "text": use.text,
        "style": wording.style,
        "instructions": wording.instructions,
        "seed": seed if wording.instructions else None,
        "keep": use.keep,
        "tokenizer": reading.tokenizer_digest,
        "family": reading.family.name,
    }

    def compute(reader: ShardReader, layers: dict[str, dict[str, Row]]) -> Iterator[Row]:
        for key in reader.keys():
            if use.keep and not layers["keep"][key]["keep"]:
                yield {"key": key, "filtered": NOT_KEPT}
                continue
            sample = Sample(key, reader.meta(key))
            try:
                yield {"key": key, **measure(sample, layers[reads[0]][key] if reads else None, wording, reading)}
            except (Unusable, VlmflowError) as problem:
                reason = str(problem).replace(f"sample '{key}'", "sample")
                yield {"key": key, "filtered" if isinstance(problem, NoText) else "error": reason}

    return add_layer(
        ctx,
        chosen,
        LAYER,
        params=params,
        version=VERSION,
        schema=SCHEMA,
        compute=compute,
        reads=[*reads, *(["keep"] if use.keep else [])],
        workers=os.cpu_count() or 1,  # a tokenizer works outside the interpreter lock
        failure_limit=1.0,  # judged over all ingredients of the stage, by the stage's own limit
    )


def measure(sample: Sample, row: Row | None, wording: Wording, reading: Reading) -> Row:
    """Lengths of one sample, in tokens without those of its images.

    Returns:
        ``begin``, ``end``: units i to j of the sample are ``end[j] - begin[i]`` tokens long; ``targets`` and ``images``:
        targets, and images shown, up to the end of each unit; ``widths``, ``heights`` of all images in pixels.

    Raises:
        NoText, Unusable, DataError: why it cannot be trained on.
    """
    kind, about = KINDS[wording.text], sample.meta.get("images", [])
    sample = kind.of(sample, row)
    sizes = [(int(i.get("width") or 0), int(i.get("height") or 0)) for i in about]
    if bad := [n for n, size in enumerate(sizes) if min(size) < 1]:
        raise Unusable(f"image {bad[0]} has no recorded width and height")
    if not kind.joined:
        lengths, targets = [], []
        for unit in range(len(kind.units(sample))):
            parts = [reading.expand(s, len(about)) for s in render(sample, row, wording, unit, unit)]
            lengths.append(sum(len(ids) for ids, _ in parts))
            targets.append(sum(int(target[1:].sum()) for _, target in parts))
        ends = np.cumsum(lengths)
        found: Row = {"begin": (ends - lengths).tolist(), "end": ends.tolist(), "targets": np.cumsum(targets).tolist()}
    else:
        (segments,) = render(sample, row, wording)
        ids, target = reading.expand(segments, len(about))
        target[:1] = False  # nothing predicts the first token of a segment
        begin, end = _borders(sample, ids, wording, reading)
        found = {"begin": begin, "end": end, "targets": [int(target[:e].sum()) for e in end]}
    if not found["targets"][-1]:
        raise Unusable("no target token")
    return found | {"images": kind.units(sample), "widths": [w for w, _ in sizes], "heights": [h for _, h in sizes]}


def _borders(sample: Sample, ids: np.ndarray, wording: Wording, reading: Reading) -> tuple[list[int], list[int]]:
    """(begin, end) of the units of one sequence. A round that begins a part of its own has earlier images in front of
    its first words, which may be tokenised otherwise there; `begin` accounts for it."""
    from vlmflow.models.chat import START, Segment, render_user_turn, rounds
    from vlmflow.models.family import special_id

    borders = rounds(sample.meta["conversations"]) if KINDS[wording.text].turns else [(0, 0)]
    if len(borders) == 1:
        return [0], [len(ids)]
    turns = sample.meta["conversations"]
    starts = np.flatnonzero(ids == special_id(reading.tokenizer, START)).tolist()
    between = len(reading.expand([Segment(text="\n")], 0)[0])
    shown = KINDS[wording.text].units(sample)
    begin, end = [0], [starts[a] - between for a, _ in borders[1:]] + [len(ids)]
    for unit, (first, _) in enumerate(borders[1:], start=1):
        start = starts[first]
        if before := shown[unit - 1]:
            turn, images = render_user_turn(turns[first], 0, before)
            alone, _ = reading.expand(turn, images)
            start += starts[first + 1] - between - start - len(alone)
        begin.append(start)
    return begin, end
