"""Reading text in pictures with the PP-OCR models of RapidOCR's wheel, in batches over many pictures.

RapidOCR's own steps before and after the models (resizing, boxes, crops, CTC decoding) are used as they are, so the text is
the same; how the models run is ours (spec/data-eval-soup.md 3.2, measured by ``benchmarks/curation.py ocr``):

- no angle classifier, pictures are never enlarged for detection, one thread a process;
- a crop is padded to a multiple of 32 pixels of its own width: RapidOCR pads to 320 and to the longest of six neighbours;
- memory is kept between calls: RapidOCR turns ONNX Runtime's arena off and then spends a seventh of its time in the kernel.

Crops of many pictures are recognised together, pictures of one size detected together, in batches that one table fixes for
each shape; a batch that is not full is filled with zeros, so what is read never depends on neighbours (ONNX Runtime's last bits
change with a batch's size). On CUDA the shapes are few and the batches large, which is what counts there (RapidOCR #442,
PaddleOCR #17959). On a CPU a batch is one: four crops together save 15 % below 100 pixels of width, less than filling them up
costs, and lose a tenth above 600. Squeezing crops, which saves what it shrinks, was tried and costs text: at 0.9 of their width
the character error rate of small print rises by half.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlmflow.curation.reading_order import lines_in_order
from vlmflow.errors import ServiceError

Provider = Literal["cpu", "cuda"]
Line = dict[str, Any]  # box, text, score

MAX_ASPECT = 30  # longer strips are padded: RapidOCR scales the short side up to 30 px, the long one with it
MIN_SIDE, MAX_SIDE = 30, 2000  # RapidOCR's bounds: pictures outside are scaled before anything else
STRIP_ASPECT = 8  # RapidOCR adds a border above and below wider pictures
LINE_HEIGHT = 48  # pixels, of the recognition model
STEP = 32  # pixels: widths of crops and, by the detection model, sides of pictures
CUDA_STEP = 128  # coarser on CUDA, where every new shape costs a search for kernels
CUDA_LINE_PIXELS = 32 * 640  # width of all crops in a batch on CUDA
CUDA_PICTURES = 4  # pictures of one shape detected together on CUDA


@dataclass(frozen=True)
class Settings:
    """What decides the text, beside the models. `limit_side` in pixels; lines below `min_score` or shorter are dropped."""

    limit_side: int = 960
    min_score: float = 0.5
    min_chars: int = 2
    provider: Provider = "cpu"


@dataclass(frozen=True)
class Crop:
    """One text box: four corners in the picture (clockwise from the top left, pixels) and its pixels [h, w, 3], BGR."""

    box: list[list[int]]
    pixels: np.ndarray


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


def choose_provider(asked: str) -> Provider:
    """Where the models run: what the recipe asks, or (auto) CUDA where ONNX Runtime offers it and a device is there.

    Raises:
        ServiceError: cuda is asked and this ONNX Runtime has none.
    """
    import onnxruntime

    offered = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if asked == "cuda" and not offered:
        raise ServiceError(
            f"curation.ocr.provider is cuda, but onnxruntime {onnxruntime.__version__} on this machine offers only "
            f"{', '.join(onnxruntime.get_available_providers())}. Replace it by onnxruntime-gpu in the image of the ocr step, "
            "or set the provider to cpu (equal text, about 0.1 s an image and core) or auto."
        )
    if asked == "cpu" or not offered:
        return "cpu"
    return "cuda" if asked == "cuda" or any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"


class Reader:
    """Reads text in pictures; not thread-safe. Construction loads the models (about 0.3 s), one thread each.

    Raises:
        ServiceError: the models are missing, or CUDA is asked and cannot be started.
    """

    def __init__(self, settings: Settings = Settings()):
        import cv2
        from rapidocr.ch_ppocr_det.utils import DBPostProcess, DetPreProcess
        from rapidocr.ch_ppocr_rec.utils import CTCLabelDecode

        cv2.setNumThreads(1)
        self.settings = settings
        models = model_files()
        self._detector, self._recogniser = (_session(models[role], settings.provider) for role in ("det", "rec"))
        characters = self._recogniser.get_modelmeta().custom_metadata_map["character"].splitlines()
        self._decode = CTCLabelDecode(character=characters)
        self._shrink = DetPreProcess(settings.limit_side, "max").resize
        # what rapidocr/config.yaml sets for these models
        self._boxes = DBPostProcess(thresh=0.3, box_thresh=0.5, unclip_ratio=1.6, use_dilation=True)

    @property
    def pictures(self) -> int:
        """How many pictures `detect` takes at a time with profit."""
        return CUDA_PICTURES if self.settings.provider == "cuda" else 1

    def read(self, image: Any) -> tuple[str, list[Line]]:
        """Text and lines of one PIL image (RGB); see `read_many`."""
        return self.read_many([image])[0]

    def read_many(self, images: Iterable[Any]) -> list[tuple[str, list[Line]]]:
        """Text and lines of PIL images (RGB). Lines are boxes in reading order, those of one line of text joined by spaces
        in the text."""
        group: list[Any] = []
        found: list[list[Crop]] = []
        for image in images:
            group.append(image)
            if len(group) == self.pictures:
                found += self.detect(group)
                group = []
        return self.recognise([*found, *self.detect(group)])

    def detect(self, images: Sequence[Any]) -> list[list[Crop]]:
        """Text boxes of PIL images (RGB), each cut out and turned upright."""
        import cv2
        from rapidocr.utils.process_img import apply_vertical_padding, resize_image_within_bounds

        prepared = []
        for image in images:
            pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
            height, width = pixels.shape[:2]
            below, right = max(0, -(-width // MAX_ASPECT) - height), max(0, -(-height // MAX_ASPECT) - width)
            if below or right:
                pixels = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
            whole = pixels.shape[:2]
            pixels, ratio_h, ratio_w = resize_image_within_bounds(pixels, MIN_SIDE, MAX_SIDE)
            record = {"preprocess": {"ratio_h": ratio_h, "ratio_w": ratio_w}}
            pixels, record = apply_vertical_padding(pixels, record, STRIP_ASPECT, MIN_SIDE)
            prepared.append((pixels, record, whole))
        maps = self._text_maps([self._shrink(pixels) for pixels, _, _ in prepared])
        return [self._crops(*about, text_map) for about, text_map in zip(prepared, maps, strict=True)]

    def _text_maps(self, pictures: list[Any]) -> list[np.ndarray | None]:
        """Probability of text [1, 1, h, w] of each picture [h, w, 3]; None for one that shrinks to nothing."""
        shapes: dict[tuple[int, int], list[int]] = {}
        step = CUDA_STEP if self.settings.provider == "cuda" else STEP
        for i, picture in enumerate(pictures):
            if picture is not None:
                shapes.setdefault((_up(picture.shape[0], step), _up(picture.shape[1], step)), []).append(i)
        maps: list[np.ndarray | None] = [None] * len(pictures)
        for (height, width), members in shapes.items():
            for start in range(0, len(members), self.pictures):
                batch = np.zeros((self.pictures, 3, height, width), np.float32)
                some = members[start : start + self.pictures]
                for row, i in enumerate(some):
                    h, w = pictures[i].shape[:2]
                    batch[row, :, :h, :w] = _normalised(pictures[i])
                result = self._detector.run(None, {self._detector.get_inputs()[0].name: batch})[0]
                for row, i in enumerate(some):
                    h, w = pictures[i].shape[:2]
                    maps[i] = result[row : row + 1, :, :h, :w]
        return maps

    def _crops(
        self, pixels: np.ndarray, record: dict[str, Any], whole: tuple[int, int], text_map: np.ndarray | None
    ) -> list[Crop]:
        from rapidocr.ch_ppocr_det import TextDetector
        from rapidocr.utils.process_img import get_rotate_crop_image, map_boxes_to_original

        if text_map is None:
            return []
        boxes, _ = self._boxes(text_map, pixels.shape[:2])
        if not len(boxes):
            return []
        boxes = TextDetector.sorted_boxes(boxes)
        cut = [get_rotate_crop_image(pixels, box.copy()) for box in boxes]
        corners = np.rint(map_boxes_to_original(boxes, record, *whole)).astype(int).tolist()
        return [Crop(box, crop) for box, crop in zip(corners, cut, strict=True)]

    def recognise(self, pages: Sequence[Sequence[Crop]]) -> list[tuple[str, list[Line]]]:
        """Text and lines of pictures, given their crops; all crops are read together."""
        read = iter(self.read_crops([crop.pixels for page in pages for crop in page]))
        return [self._page([(crop, *next(read)) for crop in page]) for page in pages]

    def _page(self, read: list[tuple[Crop, str, float]]) -> tuple[str, list[Line]]:
        kept: list[Line] = [
            {"box": crop.box, "text": text.strip(), "score": round(score, 4)}
            for crop, text, score in read
            if score >= self.settings.min_score and len("".join(text.split())) >= self.settings.min_chars
        ]
        ordered = lines_in_order([line["box"] for line in kept])
        text = "\n".join(" ".join(kept[i]["text"] for i in line) for line in ordered)
        return text, [kept[i] for line in ordered for i in line]

    def read_crops(self, crops: Sequence[np.ndarray]) -> list[tuple[str, float]]:
        """(text, confidence from 0 to 1) of crops [h, w, 3], BGR, each one line of text."""
        buckets: dict[int, list[int]] = {}
        widths = [max(1, math.ceil(LINE_HEIGHT * crop.shape[1] / crop.shape[0])) for crop in crops]
        for i, width in enumerate(widths):
            buckets.setdefault(self._bucket(width), []).append(i)
        read: list[tuple[str, float]] = [("", 0.0)] * len(crops)
        for bucket, members in buckets.items():
            size = self._batch(bucket)
            for start in range(0, len(members), size):
                some = members[start : start + size]
                for i, line in zip(some, self._read_batch([crops[i] for i in some], bucket, size), strict=True):
                    read[i] = line
        return read

    def _bucket(self, width: int) -> int:
        """The width to which a crop is padded: multiples of 32, on CUDA eight widths for every doubling."""
        if self.settings.provider == "cpu":
            return _up(width, STEP)
        return _up(width, max(STEP, 2 ** (width.bit_length() - 3)))

    def _batch(self, bucket: int) -> int:
        if self.settings.provider == "cpu":
            return 1
        return max(1, min(64, CUDA_LINE_PIXELS // bucket))

    def _read_batch(self, crops: list[np.ndarray], bucket: int, size: int) -> list[tuple[str, float]]:
        import cv2

        batch = np.zeros((size, 3, LINE_HEIGHT, bucket), np.float32)
        for row, crop in enumerate(crops):
            width = max(1, math.ceil(LINE_HEIGHT * crop.shape[1] / crop.shape[0]))
            batch[row, :, :, :width] = _normalised(cv2.resize(crop, (width, LINE_HEIGHT)))
        result = self._recogniser.run(None, {self._recogniser.get_inputs()[0].name: batch})[0]
        return [(text, float(score)) for text, score in self._decode(result[: len(crops)])[0]]


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _normalised(pixels: np.ndarray) -> np.ndarray:
    """[h, w, 3] of 0..255 as [3, h, w] of -1..1."""
    return (pixels.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)).transpose(2, 0, 1)


def _session(path: Path, provider: Provider) -> Any:
    """An ONNX Runtime session on one thread. Raises ServiceError when CUDA does not start."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    providers: list[Any] = ["CPUExecutionProvider"]
    if provider == "cuda":
        # the default search tries every kernel for every new shape, which costs seconds each
        providers.insert(0, ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}))
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if provider == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise ServiceError(
            f"curation.ocr.provider is cuda, but ONNX Runtime could not start it and runs on {session.get_providers()[0]}: its "
            "CUDA and cuDNN versions must be those that onnxruntime-gpu was built for, and a GPU must be visible. Mend that, or "
            "set the provider to cpu."
        )
    return session
