"""A model without weights for tests of what happens around a model: it answers from the image and the prompt."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vlmflow.errors import DataError


@dataclass
class Request:
    images: list[Any]
    prompt: str


@dataclass
class Generation:
    text: str
    finish: str = "stop"


class FakeVLM:
    """`answer(folder, request) -> text`; remembers what it was asked."""

    def __init__(self, folder: Path, answer: Callable[[Path, Request], str], log: list[dict[str, Any]]) -> None:
        self.folder, self.answer, self.log = folder, answer, log
        self.model = types.SimpleNamespace(config=types.SimpleNamespace(max_tiles=4))

    def generate(
        self, requests: list[Request], max_new_tokens: int, batch: int, progress: Callable[[int], Any] | None = None
    ) -> list[Generation]:
        tiles = self.model.config.max_tiles
        self.log.append({"n": len(requests), "max_new_tokens": max_new_tokens, "batch": batch, "max_tiles": tiles})
        for i, request in enumerate(requests):
            if "<image>" in request.prompt:
                raise DataError(f"request {i} spells an image token")
        return [Generation(self.answer(self.folder, r)) for r in requests]


def install(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Path, Request], str]) -> list[dict[str, Any]]:
    """Put the fake in the place of vlmflow.models.inference; returns its log: one entry a load and one a generate."""
    import vlmflow.models

    log: list[dict[str, Any]] = []

    def load(folder: Path, threads: int | None = None) -> FakeVLM:
        log.append({"load": str(folder)})
        return FakeVLM(Path(folder), answer, log)

    module = types.ModuleType("vlmflow.models.inference")
    module.Request, module.load = Request, load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vlmflow.models.inference", module)
    monkeypatch.setattr(vlmflow.models, "inference", module, raising=False)
    return log
