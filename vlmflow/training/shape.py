"""A stage's model without weights: all that counting, rehearsing and planning need of it.

It is made on the meta device, from a model's configuration or from the recipe alone, and the stage's rules are applied to
it exactly as they are to the real one. A model of 9 billion parameters takes a fraction of a second and no memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmflow.errors import ModelError
from vlmflow.training.flops import CostModel, cost_model, count

if TYPE_CHECKING:
    from vlmflow.models.family import Family
    from vlmflow.recipe.model import ModelSpec, PartSpec
    from vlmflow.recipe.stage import StageSpec
    from vlmflow.training.optimizer import Table

# Published shapes that need no download: config.json of openai/clip-vit-large-patch14-336 (vision) and of
# 01-ai/Yi-1.5-9B-Chat, as far as they decide shapes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 336,
    },
    "01-ai/Yi-1.5-9B-Chat": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 64000, "tie_word_embeddings": False,
    },
}  # fmt: skip


def blank(config: Any, dtype: Any = None) -> Any:
    """The model of a configuration on the meta device."""
    import torch
    from transformers import AutoModelForImageTextToText

    from vlmflow import models

    models.register()
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).to(dtype or torch.bfloat16)


def apply_rules(model: Any, family: Family, stage: StageSpec) -> Table:
    """Set `requires_grad` by the rules of a stage, with its adapters and what its `memory` section recomputes; the table of
    what trains. Raises RecipeError."""
    from vlmflow.training import setup
    from vlmflow.training.recompute import recompute

    table, _ = setup.apply_rules(model, family, stage, 0)
    model.loss_rows = stage.memory.loss_rows
    recompute(model, family, stage.memory.recompute)
    return table


def stage_cost(config: Any, family: Family, stage: StageSpec) -> CostModel:
    """Operations of a stage's packs, for dealing them and for MFU."""
    model = blank(config)
    table = apply_rules(model, family, stage)
    return cost_model(count(model, family, table.rule_of))


def recipe_config(spec: ModelSpec) -> Any:
    """The configuration that a recipe's model will have, without its weights and, where it can be, without the network.

    A hub id is read from the cache of transformers, or is one of `PUBLISHED`. The vocabulary of a trained tokenizer is
    taken as large as it may become; up to four special tokens that a pretrained tokenizer may lack are not counted.

    Raises:
        ModelError: a configuration that is not on this machine (names the file), or parts that do not fit.
    """
    from vlmflow.models import config_fields
    from vlmflow.models.points.configuration_points import PointsConfig

    config_fields.check(spec)
    language = _part(spec.language, "model.language", spec.trust_remote_code)
    if "model_type" not in language:
        raise ModelError("model.language: give a source, or a config with model_type (for instance qwen2)")
    if spec.tokenizer.train_vocab is not None:
        language.setdefault("vocab_size", spec.tokenizer.train_vocab)
    elif "vocab_size" not in language:
        language["vocab_size"] = _vocabulary(str(spec.tokenizer.source), spec.trust_remote_code)
    try:
        return PointsConfig(
            vision_config=_vision(spec.vision, "model.vision"),
            vision_ocr_config=_vision(spec.vision_ocr, "model.vision_ocr"),
            text_config=language,
            ocr_weight=spec.ocr_weight,
            tile=spec.tiling.tile,
            max_tiles=spec.tiling.max_tiles,
        )
    except (ValueError, TypeError) as error:
        raise ModelError(f"the parts of section model do not fit together: {error}") from error


def _part(part: PartSpec, where: str, remote: bool) -> dict[str, Any]:
    """Configuration fields of a part: those of its source, changed by its own."""
    if part.source is None:
        return dict(part.config)
    from transformers import PreTrainedConfig

    try:
        fields, _ = PreTrainedConfig.get_config_dict(part.source, revision=part.revision, local_files_only=True)
    except (OSError, ValueError):
        fields = {}
    if not fields:
        if part.source not in PUBLISHED:
            raise ModelError(
                f"{where}.source: the configuration of '{part.source}' is not on this machine, and a plan downloads nothing. Fetch it "
                f"once (`hf download {part.source} config.json`), or give a local folder, or the sizes in {where}.config"
            ) from None
        fields = dict(PUBLISHED[part.source])
    return {**fields, **part.config}


def _vision(part: PartSpec, where: str) -> dict[str, Any]:
    fields = _part(part, where, False)
    return dict(fields.get("vision_config") or fields)


def _vocabulary(source: str, remote: bool) -> int:
    from vlmflow.models import tokenizer

    return len(tokenizer.pretrained(source, None, remote))
