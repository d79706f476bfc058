"""Configuration of POINTS: two CLIP encoders of one shape family, one shared projector, any causal language model."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

# Fields of language models that change how logits follow from hidden states; the head of POINTS is a plain Linear.
UNSUPPORTED_HEADS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


class PointsConfig(PreTrainedConfig):
    """Everything that fixes the shape of a POINTS model.

    Args:
        vision_config: CLIP vision fields of the general encoder; `image_size` must equal `tile`.
        vision_ocr_config: the same for the OCR encoder; patch size, hidden size and tile must agree with the general
            one, because both pass through one projector. None: as `vision_config`.
        text_config: any causal language model's configuration (dict with `model_type`, or a configuration).
        ocr_weight: features = ocr_weight * ocr + (1 - ocr_weight) * general, after the projector (points.md 2.1).
        tile, max_tiles: CATTY limits, kept with the weights so that inference tiles as training did.
        image_token_id: id of the placeholder token that image features overwrite.
        shuffle: patches per side that are merged into one token (2: 24x24 patches -> 144 tokens).
        image_mean, image_std: normalisation of pixels scaled to 0..1 (CLIP's values).

    Raises ValueError when the two encoders or the tile do not fit together.
    """

    model_type = "points"
    sub_configs = {  # noqa: RUF012 - read by transformers as a class attribute
        "vision_config": CLIPVisionConfig,
        "vision_ocr_config": CLIPVisionConfig,
        "text_config": AutoConfig,
    }

    def __init__(
        self,
        vision_config: dict[str, Any] | CLIPVisionConfig | None = None,
        vision_ocr_config: dict[str, Any] | CLIPVisionConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        ocr_weight: float = 0.5,
        tile: int = 336,
        max_tiles: int = 8,
        image_token_id: int = 0,
        shuffle: int = 2,
        projector_hidden_act: str = "gelu",
        image_mean: tuple[float, ...] | list[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: tuple[float, ...] | list[float] = (0.26862954, 0.26130258, 0.27577711),
        **kwargs: Any,
    ) -> None:
        self.vision_config = _vision(vision_config, tile)
        self.vision_ocr_config = _vision(vision_ocr_config if vision_ocr_config is not None else vision_config, tile)
        self.text_config = _text(text_config)
        self.ocr_weight = ocr_weight
        self.tile = tile
        self.max_tiles = max_tiles
        self.image_token_id = image_token_id
        self.shuffle = shuffle
        self.projector_hidden_act = projector_hidden_act
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        kwargs["tie_word_embeddings"] = bool(self.text_config.tie_word_embeddings)  # the language model decides
        super().__init__(**kwargs)
        self._check()

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile after the pixel shuffle (336 px, patch 14, shuffle 2: 144)."""
        patch: Any = self.vision_config.patch_size
        return (self.tile // patch // self.shuffle) ** 2

    def _check(self) -> None:
        general, ocr = self.vision_config, self.vision_ocr_config
        for name in ("hidden_size", "patch_size"):
            if getattr(general, name) != getattr(ocr, name):
                raise ValueError(
                    f"POINTS: {name} is {getattr(general, name)} in the general encoder and {getattr(ocr, name)} in "
                    "the OCR encoder; they share one projector and must agree"
                )
        for name, vision in (("general", general), ("OCR", ocr)):
            if vision.image_size != self.tile:
                raise ValueError(
                    f"POINTS: the {name} encoder takes images of {vision.image_size} px but tile is {self.tile}; "
                    "set both to the same side"
                )
            if vision.num_hidden_layers < 2:
                raise ValueError(
                    f"POINTS: the {name} encoder has {vision.num_hidden_layers} layer(s); features are the "
                    "penultimate hidden state, so at least 2 are needed"
                )
        patch: Any = general.patch_size
        side = self.tile // patch
        if side * patch != self.tile or side % self.shuffle:
            raise ValueError(
                f"POINTS: a tile of {self.tile} px gives {self.tile / patch:g} patches a side at patch {patch}; it must be a whole multiple of shuffle={self.shuffle}"
            )
        for name in UNSUPPORTED_HEADS:
            if getattr(self.text_config, name, None) not in (None, 1, 1.0):
                raise ValueError(f"POINTS: language models with {name} are not supported (their head is not linear)")


def _vision(value: dict[str, Any] | CLIPVisionConfig | None, tile: int) -> CLIPVisionConfig:
    if isinstance(value, CLIPVisionConfig):
        return value
    fields = dict(value or {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                            "num_attention_heads": 16, "patch_size": 14})  # fmt: skip
    fields.pop("model_type", None)
    fields.setdefault("image_size", tile)
    return CLIPVisionConfig(**fields)


def _text(value: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value or {"model_type": "qwen2"})
    return AutoConfig.for_model(fields.pop("model_type", "qwen2"), **fields)
