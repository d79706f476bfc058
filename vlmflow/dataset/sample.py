"""One training example before any model sees it: images as stored bytes, and what is known about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IMAGE_EXTENSIONS = {"jpeg": "jpg", "jpg": "jpg", "png": "png", "webp": "webp"}


@dataclass(frozen=True)
class Sample:
    """A sample of a shard.

    Attributes:
        key: unique in the dataset; no dots, no slashes (WebDataset splits member names at the first dot).
        meta: ``id``, ``url``, ``source``, ``text`` and/or ``conversations`` (LLaVA style: ``{"from", "value"}``, with
            ``<image>`` where an image stands), ``preferences`` (list of ``{"conversations", "chosen", "rejected"}``: a
            prompt and two answers to it), ``images`` (list of ``{"sha256", "width", "height", "format"}``),
            ``licence`` if known, ``extra`` (any other columns of the input table).
        images: encoded bytes (JPEG, PNG or WebP), in the order of ``meta["images"]``.
    """

    key: str
    meta: dict[str, Any]
    images: tuple[bytes, ...] = field(default=())
