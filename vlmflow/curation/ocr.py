"""The layer `ocr`: the text that stands in an image, read by PP-OCR models, as a label for training the OCR encoder.

POINTS replaces the captions of 20 million web images by their OCR text (spec/points.md 3.2). RapidOCR carries the PP-OCR
models inside its wheel and runs them on ONNX Runtime, so this step needs no network. Three settings make it three times
as fast at equal recall, and one of them more accurate (spec/data-eval-soup.md 3.2): no angle classifier, images are never
enlarged for detection, one thread a process. Small pictures of 56 px, words and handwritten digits, are read best as they
are: enlarging them twice or three times, or padding them, read none more and split groups of digits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow.curation.reading_order import lines_in_order
from vlmflow.dataset.layer import add_layer, read_layer
from vlmflow.dataset.manifest import Manifest
from vlmflow.dataset.shard import ShardReader
from vlmflow.digest import sha256_file
from vlmflow.errors import DataError, ServiceError, StepFailed

if TYPE_CHECKING:
    from vlmflow.step import Context

VERSION = 1  # raise when the same models and settings would give other text
SCHEMA = {"text": "str", "lines": "json", "score": "float"}
CHUNK = 16  # samples handed to a process at a time
MAX_ASPECT = 30  # longer strips are padded: RapidOCR scales the short side up to 30 px, the long one with it
REC_WIDTH = (
    160  # pixels to which short lines are padded; RapidOCR's 320 costs 28 instead of 17 ms a short line, reads no more
)
DEATHS = 3  # worker processes that may die (out of memory, killed) before the step gives up
_engine: Any = None  # one per worker process


def run(ctx: Context, manifest: Manifest) -> Manifest:
    """Read the text of every image of a dataset.

    Returns:
        The manifest with layer `ocr`: text (lines joined by newlines, images of a sample one after the other; empty where
        there is none, which is a result), lines (JSON list of {image, box, text, score}; boxes are four corners in
        pixels), score (mean confidence of the lines, null without text).

    Raises:
        StepFailed: more images cannot be read than `curation.ocr.failure_limit`, or workers keep dying.
        ServiceError: the OCR engine or its models are not installed.
    """
    spec = ctx.recipe.curation.ocr
    models = model_files()
    params = {
        "engine": engine_name(spec.engine),
        "models": {role: sha256_file(path) for role, path in models.items()},
        "min_score": spec.min_score,
        "min_chars": spec.min_chars,
        "limit_side": spec.limit_side,
    }
    settings = {"limit_side": spec.limit_side, "min_score": spec.min_score, "min_chars": spec.min_chars}
    with _Workers(spec.workers, settings, ctx.recipe.pull.max_pixels) as workers:
        return add_layer(
            ctx,
            manifest,
            "ocr",
            params=params,
            version=VERSION,
            schema=SCHEMA,
            compute=lambda reader, _: workers.read(reader),
            failure_limit=spec.failure_limit,
            workers=2,  # threads that feed the processes: the next shard starts while the last samples of one are read
            summary=lambda sealed: _summary(sealed, ctx.scratch),
        )


def engine_name(engine: str) -> str:
    """Name and version of the OCR engine. Raises ServiceError when it is not installed or not known."""
    from importlib.metadata import PackageNotFoundError, version

    if engine != "rapidocr":
        raise ServiceError(f"curation.ocr.engine '{engine}' is not known; use rapidocr")
    try:
        return f"rapidocr {version('rapidocr')}"
    except PackageNotFoundError:
        raise ServiceError("rapidocr is not installed; install vlmflow[ocr] to read text in images") from None


def model_files() -> dict[str, Path]:
    """The detection and recognition models that RapidOCR's wheel carries. Raises ServiceError when there are none."""
    from importlib.util import find_spec

    found = find_spec("rapidocr")
    if found is None or not found.submodule_search_locations:
        raise ServiceError("rapidocr is not installed; install vlmflow[ocr] to read text in images")
    folder = Path(next(iter(found.submodule_search_locations))) / "models"
    models = {}
    for role in ("det", "rec"):
        candidates = sorted(folder.glob(f"*_{role}_*.onnx"))
        if not candidates:
            raise ServiceError(
                f"{folder} holds no PP-OCR {role} model (*_{role}_*.onnx); reinstall rapidocr from its wheel"
            )
        models[role] = candidates[-1]
    return models


class Reader:
    """Reads text in single images; not thread-safe. Construction loads the models (about 0.3 s), one thread each."""

    def __init__(self, limit_side: int = 960, min_score: float = 0.5, min_chars: int = 2):
        import cv2
        from rapidocr import RapidOCR

        cv2.setNumThreads(1)
        models = model_files()
        self.min_score, self.min_chars = min_score, min_chars
        self._ocr = RapidOCR(
            params={
                "Global.log_level": "critical",
                "Global.use_cls": False,
                "Global.text_score": 0.0,
                "Det.limit_type": "max",
                "Det.limit_side_len": limit_side,
                "Det.model_path": str(models["det"]),
                "Rec.model_path": str(models["rec"]),
                "Rec.rec_img_shape": [3, 48, REC_WIDTH],
                "Rec.rec_batch_num": 1,  # so that a short line is not padded to its longest neighbour
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, image: Any) -> tuple[str, list[dict[str, Any]]]:
        """Text and lines of one PIL image (RGB). Lines are boxes in reading order, those of one line of text joined by
        spaces in the text."""
        import cv2
        import numpy as np

        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
        height, width = pixels.shape[:2]
        below, right = max(0, -(-width // MAX_ASPECT) - height), max(0, -(-height // MAX_ASPECT) - width)
        if below or right:
            pixels = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
        found: Any = self._ocr(pixels)
        if found.boxes is None or not found.txts:
            return "", []
        kept = [
            {"box": np.rint(box).astype(int).tolist(), "text": text.strip(), "score": round(float(score), 4)}
            for box, text, score in zip(found.boxes, found.txts, found.scores, strict=True)
            if score >= self.min_score and len("".join(text.split())) >= self.min_chars
        ]
        ordered = lines_in_order([line["box"] for line in kept])
        text = "\n".join(" ".join(kept[i]["text"] for i in line) for line in ordered)
        return text, [kept[i] for line in ordered for i in line]


class _Workers:
    """Processes that read chunks of samples; started with the first chunk, replaced when one of them dies."""

    def __init__(self, count: int, settings: dict[str, Any], max_pixels: int):
        self.count, self.settings, self.max_pixels = count, settings, max_pixels
        self._pool: ProcessPoolExecutor | None = None
        self._lock = threading.Lock()
        self._deaths = 0

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _get(self, broken: ProcessPoolExecutor | None = None) -> ProcessPoolExecutor:
        import multiprocessing

        with self._lock:
            if broken is not None and broken is self._pool:
                self._deaths += 1
                self._pool = None
                if self._deaths > DEATHS:
                    raise StepFailed(
                        f"ocr: worker processes died {self._deaths} times (out of memory?), {self.count} run at once. A page "
                        "needs up to 2.3 GB: lower curation.ocr.workers or curation.ocr.limit_side, or give the step more memory."
                    )
            if self._pool is None:
                spawn = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(self.count, spawn, _start, (self.settings,))
            return self._pool

    def read(self, reader: ShardReader) -> Iterator[dict[str, Any]]:
        """Rows of one shard, in order."""
        keys = reader.keys()
        chunks = [[(key, reader.index[key]) for key in keys[i : i + CHUNK]] for i in range(0, len(keys), CHUNK)]
        done: dict[int, list[dict[str, Any]]] = {}
        while len(done) < len(chunks):
            pool = self._get()
            try:
                todo = [n for n in range(len(chunks)) if n not in done]
                futures = {n: pool.submit(_read_chunk, str(reader.path), chunks[n], self.max_pixels) for n in todo}
                for n, future in futures.items():
                    done[n] = future.result()
            except BrokenProcessPool:
                self._get(broken=pool)
        for n in range(len(chunks)):
            yield from done[n]


def _start(settings: dict[str, Any]) -> None:
    """Initialise a worker process: load the models, and end with the parent whatever kills it."""
    import multiprocessing

    global _engine
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _engine = Reader(**settings)


def _read_chunk(path: str, chunk: list[tuple[str, dict[str, list[int]]]], max_pixels: int) -> list[dict[str, Any]]:
    """Rows of some samples of a local tar; members are (offset, length) as in the shard's index."""
    from vlmflow.vision.image import decode

    rows = []
    with open(path, "rb") as file:
        for key, members in chunk:
            texts, lines = [], []
            row: dict[str, Any] = {"key": key, "text": "", "lines": [], "score": None, "error": None}
            images = [span for name, span in members.items() if name != "json"]
            try:
                for number, (offset, length) in enumerate(images):
                    file.seek(offset)
                    text, found = _engine.read(decode(file.read(length), max_pixels))
                    texts.append(text)
                    lines += [{"image": number, **line} for line in found]
            except DataError as error:
                row["error"] = f"image {number}: {error}"
            except (
                Exception
            ) as error:  # OpenCV and ONNX Runtime raise their own kinds; one image must not stop the others
                row["error"] = f"image {number}: {type(error).__name__}"
            else:
                row |= {"text": "\n".join(t for t in texts if t), "lines": lines}
                row["score"] = round(sum(line["score"] for line in lines) / len(lines), 4) if lines else None
            rows.append(row)
    return rows


def _summary(manifest: Manifest, scratch: Path) -> dict[str, Any]:
    rows = read_layer(manifest, "ocr", scratch).values()
    with_text = [row for row in rows if row["text"]]
    return {
        "samples": len(rows),
        "with_text": len(with_text),
        "characters": sum(len(row["text"]) for row in with_text),
        "mean_score": round(sum(row["score"] for row in with_text) / len(with_text), 4) if with_text else None,
    }
