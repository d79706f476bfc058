"""Candidates in a real MLflow server, as the register step leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import registry_samples as samples

from vlmflow.evaluation.scores import Scores
from vlmflow.registry import run as registry


def candidate(folder: Path, right: int, model: str, content: bytes | None = None) -> Any:
    """Register a candidate of `model` that answers `right` of 40 questions; its weights are its own."""
    folder.mkdir(parents=True, exist_ok=True)
    ctx = samples.context(folder, registry={"model": model, "gates": {"floors": {"digits": 0.3}}})
    ref = samples.published(ctx, folder, content or f"weights {folder.name} {right}".encode(), key=f"k{right}")
    table: dict[str, Scores] = {
        "untrained": samples.scores("0" * 64, 4),
        "final": samples.scores(ref.weights_sha256, right),
    }
    return registry.run(ctx, ref, table, None, {"sft": samples.manifest()}), ref
