"""Model families. `FAMILIES[recipe.model.family]` is all that the rest of vlmflow needs to know about one.

Importing this package is cheap: torch and transformers load on the first call that needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmflow.errors import ModelError
from vlmflow.models.family import Family
from vlmflow.models.points.family import POINTS

FAMILIES: dict[str, Family] = {POINTS.name: POINTS}


def family(name: str) -> Family:
    """The family of that name. Raises ModelError that lists the known ones."""
    if name not in FAMILIES:
        raise ModelError(f"unknown model family '{name}'; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def register() -> None:
    """Teach transformers our classes (AutoConfig, AutoModelForImageTextToText, AutoProcessor) and `vlmflow_varlen`."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vlmflow.models import attention
    from vlmflow.models.points.configuration_points import PointsConfig
    from vlmflow.models.points.modeling_points import PointsForConditionalGeneration
    from vlmflow.models.points.processing_points import PointsProcessor

    AutoConfig.register("points", PointsConfig, exist_ok=True)
    AutoModelForImageTextToText.register(PointsConfig, PointsForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(PointsConfig, PointsProcessor, exist_ok=True)
    attention.register()


def load_model(folder: str | Path, dtype: Any = "auto", attention: str = "vlmflow_varlen") -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a model folder, ready for packed training and generation.

    Raises ModelError when the folder is not a complete model.
    """
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    register()
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a model from {folder}: {error}") from error
    wrong = sorted(str(key) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[name])
    if wrong:
        raise ModelError(
            f"the weights in {folder} do not fit its config.json: {len(wrong)} tensors missing, unknown or of another "
            f"shape, e.g. {wrong[0]}"
        )
    return model.eval(), tokenizer
