"""What caption, fuse and perplexity share: pictures of a sample, its texts, bounded windows, whose failure it is.

A sample that has no text because an earlier step failed on it is reported with the reason of that step, marked
UPSTREAM, and does not count against this step's own failure limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from vlmflow import storage
from vlmflow.dataset.layer import failures, judge_failures
from vlmflow.dataset.manifest import Manifest
from vlmflow.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmflow.dataset.sample import Sample
    from vlmflow.models.store import ModelRef
    from vlmflow.step import Context

UPSTREAM = "upstream: "
WINDOW = 256  # samples whose decoded pictures are in memory together, at most ...
SCORED = 2048  # samples that are sorted by length and scored together, at most ...
BYTES = 256 * 2**20  # ... and the bytes of their tiles, at most, if more than one; two such windows are in memory
PIXELS = 128 * 2**20  # ... and their pixels, at most, if more than one (three bytes each)

T = TypeVar("T")
Built = TypeVar("Built")


def scorer(ctx: Context, built: Built) -> ModelRef | Built:
    """POINTS' P: the model that captions and scores. The one the recipe names, else the one built by this run.

    A folder without a model.json is one of transformers' own (a download of the Hugging Face hub, say); its files are hashed.
    """
    from vlmflow.models import store

    if not (named := ctx.recipe.curation.scorer):
        return built
    marker = storage.join(named, store.MARKER)
    return store.load_ref(marker) if storage.exists(marker) else store.plain_folder(named, ctx.scratch)


def prepared_windows(samples: Iterable[Sample], prepare: Callable[[Sample], T]) -> Iterator[list[T]]:
    """Successive lists of what `prepare` makes of the samples, in order: in threads, and a list ahead of the one in use.

    A list holds at most SCORED results and about BYTES of them (their `nbytes`); that is a function of the samples alone.
    """
    from vlmflow.models.inference import in_threads

    made = in_threads(prepare, samples)
    return ahead(weighed(made, lambda item: int(getattr(item, "nbytes", 0)), SCORED, BYTES))


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; each is made by another thread while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def picture_windows(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Successive lists of samples whose decoded pictures fit into memory together: a function of the samples alone."""
    return weighed(samples, _pixels, WINDOW, PIXELS)


def _pixels(sample: Sample) -> int:
    return sum(int(about.get("width") or 0) * int(about.get("height") or 0) for about in sample.meta.get("images", []))


def weighed(items: Iterable[T], weight: Callable[[T], int], size: int, budget: int) -> Iterator[list[T]]:
    """Successive lists of at most `size` items that weigh at most `budget` together; a heavier one stands alone."""
    window: list[T] = []
    load = 0
    for item in items:
        load += weight(item)
        if window and (len(window) == size or load > budget):
            yield window
            window, load = [], weight(item)
        window.append(item)
    if window:
        yield window


def pictures(sample: Sample) -> list[Image]:
    """The sample's pictures as RGB, upright, exactly as training decodes them.

    Raises:
        DataError: it has none, or one cannot be decoded. The message is the reason that goes into a layer.
    """
    return list(_decoded(sample, None))


def check_pictures(sample: Sample) -> None:
    """Raise DataError as `pictures` would. JPEGs are decoded at 1/8: their whole bit stream, for a third of the time."""
    for _ in _decoded(sample, lambda width, height: (1, 1)):
        pass


def _decoded(sample: Sample, least: Callable[[int, int], tuple[int, int]] | None) -> Iterator[Image]:
    from vlmflow.vision.image import decode_scaled

    if not sample.images:
        raise DataError("no image")
    for data in sample.images:
        try:
            yield decode_scaled(data, least).image
        except DataError as error:
            raise DataError(f"image cannot be decoded ({type(error.__cause__ or error).__name__})") from error


def text_of(
    which: str, key: str, meta: Mapping[str, Any], upstream: Mapping[str, Mapping[str, Any]]
) -> tuple[str, str | None]:
    """(text, None), or ("", reason). `which` is alt (the table's text) or the name of a layer with a text column."""
    if which == "alt":
        text = " ".join(str(meta.get("text") or "").split())
        return (text, None) if text else ("", f"{UPSTREAM}the sample has no alt text")
    row = upstream[which][key]
    if row["error"]:
        return "", f"{UPSTREAM}{which}: {str(row['error']).removeprefix(UPSTREAM)}"
    text = " ".join(str(row["text"] or "").split())
    return (text, None) if text else ("", f"{UPSTREAM}{which}: empty text")


def check_own_failures(manifest: Manifest, name: str, limit: float, field: str, scratch: Any = None) -> list[list[Any]]:
    """[reason, count] of this layer's failed rows, commonest first. `field` is the section of the recipe that sets the limit.

    Raises:
        StepFailed: of the samples that reached this step, more than `limit` (share) failed in it.
    """
    listed = list(failures(manifest, name, scratch))
    own = [(key, reason) for key, reason in listed if not reason.startswith(UPSTREAM)]
    judge_failures(name, own, manifest.samples - (len(listed) - len(own)), limit, field)
    counts = Counter(reason for _, reason in listed)
    return [[reason, n] for reason, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
