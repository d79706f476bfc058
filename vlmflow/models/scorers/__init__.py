"""Who captions and scores: a model of our own families, or a plain folder of transformers' own classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vlmflow.errors import ModelError
from vlmflow.models import FAMILIES

if TYPE_CHECKING:
    from vlmflow.models.inference import Scorer


def _own(folder: Path) -> Scorer:
    from vlmflow.models.inference import VLM

    return VLM.load(folder)


def _transformers(folder: Path) -> Scorer:
    from vlmflow.models.scorers.huggingface import HuggingFaceScorer

    return HuggingFaceScorer.load(folder)


SCORERS: dict[str, Callable[[Path], Scorer]] = {"vlmflow": _own, "transformers": _transformers}
"""Kind -> loader of a model folder."""


def kind(folder: Path) -> str:
    """Which of SCORERS reads this folder. Raises ModelError when it has no config.json with a model type."""
    try:
        model_type = json.loads((folder / "config.json").read_bytes())["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{folder} is no model folder: its config.json with a model_type cannot be read ({type(error).__name__}: {error})"
        ) from error
    return "vlmflow" if model_type in FAMILIES else "transformers"


def load(folder: Path) -> Scorer:
    """The scorer of a model folder, loaded. Raises ModelError when it is not complete."""
    return SCORERS[kind(folder)](folder)
