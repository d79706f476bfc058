"""Layer `phash`: what global steps compare samples by, as numbers, so that they read columns instead of images.

Perceptual hashes of every image (vlmflow/vision/phash.py), and 64-bit digests of the image bytes and of the texts. Near
duplicates and contamination read nothing else of a sample, so a million samples are compared from some 50 MB.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vlmflow.curation.words import number, turns, wording
from vlmflow.dataset.layer import add_layer, failures
from vlmflow.errors import DataError
from vlmflow.vision import phash

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.sample import Sample
    from vlmflow.dataset.shard import ShardReader
    from vlmflow.step import Context

LAYER = "phash"
VERSION = 1
SCHEMA = {
    "plain": "list<int64>", "trimmed": "list<int64>", "mirrored": "list<int64>", "content": "int", "text": "int",
    "turns": "int", "pixels": "int",
}  # fmt: skip
Row = dict[str, Any]


def run(ctx: Context, manifest: Manifest) -> Manifest:
    """Add layer `phash` when a step of the recipe needs it: clean, dedup or contamination.

    Columns: plain, trimmed, mirrored (one hash an image, in order; 0 = flat), content (digest of the images' bytes), text
    (of the alt text), turns (of conversations and preferences), pixels (of all images). What a sample lacks is null or
    empty. A sample with an image that cannot be decoded has its reason in `error`, no hashes, and is counted in the
    summary; `clean` drops it.
    """
    curation = ctx.recipe.curation
    if curation.clean is None and curation.dedup is None and curation.contamination is None:
        return manifest

    def compute(reader: ShardReader, _: Any) -> Iterator[Row]:
        return (row(sample) for sample in reader)

    def summary(sealed: Manifest) -> dict[str, Any]:
        reasons = Counter(reason for _, reason in failures(sealed, LAYER, ctx.scratch))
        return {"failures": [list(pair) for pair in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))]}

    return add_layer(
        ctx, manifest, LAYER, params={}, version=VERSION, schema=SCHEMA, compute=compute, failure_limit=1.0, workers=2,
        summary=summary,
    )  # fmt: skip


def row(sample: Sample) -> Row:
    """The layer's row of one sample."""
    meta, said = sample.meta, turns(sample.meta)
    found: Row = {
        "key": sample.key, "plain": [], "trimmed": [], "mirrored": [],
        "content": _content(sample.images) if sample.images else None,
        "text": number(wording([str(meta["text"])])) if str(meta.get("text") or "").strip() else None,
        "turns": number(wording(said)) if said else None,
        "pixels": sum(int(about.get("width") or 0) * int(about.get("height") or 0) for about in meta.get("images") or []),
    }  # fmt: skip
    try:
        hashed = [_hashes(data) for data in sample.images]
    except DataError as error:
        return {**found, "error": str(error)}
    for name, values in zip(("plain", "trimmed", "mirrored"), zip(*hashed, strict=True), strict=False):
        found[name] = list(values)
    return found


def _hashes(data: bytes) -> tuple[int, int, int]:
    try:
        return phash.of_bytes(data)
    except DataError as error:
        raise DataError(f"image cannot be decoded ({type(error.__cause__ or error).__name__})") from error


def _content(images: tuple[bytes, ...]) -> int:
    return number(b"".join(hashlib.sha256(data).digest() for data in images))
