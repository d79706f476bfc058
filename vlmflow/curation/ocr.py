"""The layer `ocr`: the text that stands in an image, read by PP-OCR models, as a label for training the OCR encoder.

POINTS replaces the captions of 20 million web images by their OCR text (spec/points.md 3.2). RapidOCR carries the PP-OCR
models inside its wheel and runs them on ONNX Runtime, so this step needs no network. How the models are run is in
`ocr_engine`, in which processes in `ocr_workers`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow.curation.ocr_engine import Settings, choose_provider, engine_name, model_files
from vlmflow.curation.ocr_workers import Workers
from vlmflow.dataset.layer import add_layer, read_columns
from vlmflow.dataset.manifest import Manifest
from vlmflow.digest import sha256_file
from vlmflow.recipe.curation import OcrSpec

if TYPE_CHECKING:
    from vlmflow.step import Context

LAYER = "ocr"
VERSION = 2  # raise when the same models and settings would give other text
SCHEMA = {"text": "str", "lines": "json", "score": "float", "language": "str"}


def run(ctx: Context, manifest: Manifest) -> Manifest:
    """Read the text of every image of a dataset.

    Returns:
        The manifest with layer `ocr`: text (lines joined by newlines, images of a sample one after the other; empty where
        there is none, which is a result), lines (JSON list of {image, box, text, score}; boxes are four corners in
        pixels), score (mean confidence of the lines, null without text), language (by script, null without text).

    Raises:
        StepFailed: more images cannot be read than `curation.ocr.failure_limit`, or every image ends its worker process
            or holds it beyond `curation.ocr.timeout`.
        ServiceError: the OCR engine or its models are not installed, or CUDA is asked and missing.
    """
    spec = ctx.recipe.curation.ocr
    params: dict[str, Any] = {
        "engine": engine_name(spec.engine),
        "models": {role: sha256_file(path) for role, path in model_files().items()},
        "min_score": spec.min_score,
        "min_chars": spec.min_chars,
        "limit_side": spec.limit_side,
    }
    if (
        spec.provider == "cuda"
    ):  # scores differ from a CPU's in their last digits; with auto, parts of both may be mixed
        params["provider"] = "cuda"
    if (
        spec.timeout != OcrSpec.model_fields["timeout"].default
    ):  # a row that was given up would stay whatever the new limit
        params["timeout"] = spec.timeout
    settings = Settings(spec.limit_side, spec.min_score, spec.min_chars, choose_provider(spec.provider))
    with Workers(spec.workers, settings, ctx.recipe.pull.max_pixels, spec.timeout) as workers:
        return add_layer(
            ctx,
            manifest,
            LAYER,
            params=params,
            version=VERSION,
            schema=SCHEMA,
            compute=lambda reader, _: workers.read(reader),
            failure_limit=spec.failure_limit,
            workers=2,  # threads that feed the processes: the next shard starts while the last samples of one are read
            summary=lambda sealed: _summary(sealed, ctx.scratch),
        )


def _summary(manifest: Manifest, scratch: Path) -> dict[str, Any]:
    samples, with_text, characters, scores, languages = 0, 0, 0, 0.0, Counter[str]()
    for part in manifest.layer(LAYER).parts:  # one at a time: a million rows with their boxes do not fit in memory
        table = read_columns(part, scratch, ["text", "score", "language"])
        samples += len(table)
        for text, score, language in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
            if text:
                with_text, characters, scores = with_text + 1, characters + len(text), scores + score
                languages[language or "none"] += 1
    return {
        "samples": samples,
        "with_text": with_text,
        "characters": characters,
        "languages": dict(sorted(languages.items())),
        "mean_score": round(scores / with_text, 4) if with_text else None,
    }
