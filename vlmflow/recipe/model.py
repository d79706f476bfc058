"""Recipe section ``model``: the parts a vision-language model is composed of."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from vlmflow.recipe.base import Name, Section, Share


class PartSpec(Section):
    """One encoder or language model: pretrained (``source``) or randomly initialised (``config``)."""

    source: str | None = Field(
        None, description="hub id or local folder of a transformers model; None = random weights"
    )
    revision: str | None = Field(None, description="commit of the hub model, to pin it")
    config: dict[str, Any] = Field(
        default_factory=dict, description="transformers config fields; with source, they override"
    )

    @model_validator(mode="after")
    def _something(self) -> PartSpec:
        if self.source is None and not self.config:
            raise ValueError("give 'source' (a hub id or folder) or 'config' (sizes of a random model)")
        return self


class TokenizerSpec(Section):
    """The tokenizer: taken from ``source`` or trained (byte-level BPE)."""

    source: str | None = Field(None, description="hub id or folder; None = train one, or take the language model's")
    train_vocab: int | None = Field(
        None,
        ge=300,
        description="vocabulary size of a trained tokenizer in tokens, the 256 bytes and 4 specials included",
    )
    train_on: list[Name] = Field(default_factory=list, description="datasets whose text trains it")

    @model_validator(mode="after")
    def _trainable(self) -> TokenizerSpec:
        if self.train_vocab is not None and (self.source or not self.train_on):
            raise ValueError("train_vocab needs train_on (datasets) and no source")
        return self


class TilingSpec(Section):
    """CATTY tiling (POINTS 3.1)."""

    tile: int = Field(336, ge=14, description="tile side in pixels = encoder input (POINTS: 336)")
    max_tiles: int = Field(
        8, ge=1, le=64, description="largest number of tiles an image, thumbnail not counted (POINTS: 8)"
    )


class ModelSpec(Section):
    """A dual-encoder VLM of the POINTS family."""

    family: Literal["points"] = Field("points", description="model family")
    vision: PartSpec = Field(description="general encoder (CLIP architecture)")
    vision_ocr: PartSpec = Field(description="OCR encoder (CLIP architecture)")
    ocr_weight: Share = Field(
        0.5,
        description="weight of the OCR encoder's projected features; the general encoder gets the rest (released code: 0.5)",
    )
    language: PartSpec = Field(description="language model: any AutoModelForCausalLM")
    tokenizer: TokenizerSpec = Field(default_factory=TokenizerSpec, description="the tokenizer")
    tiling: TilingSpec = Field(default_factory=TilingSpec, description="how images are cut")
    trust_remote_code: bool = Field(False, description="run code shipped with hub models; off unless you trust them")

    @model_validator(mode="after")
    def _fits(self) -> ModelSpec:
        for name, part in (("vision", self.vision), ("vision_ocr", self.vision_ocr)):
            patch = part.config.get("patch_size")
            if part.source is None and patch is None:
                raise ValueError(f"model.{name}.config.patch_size is required for a random encoder")
            if patch is not None and (not isinstance(patch, int) or patch < 1):
                raise ValueError(
                    f"model.{name}.config.patch_size must be a whole number of pixels above 0 (got {patch!r})"
                )
            if patch is not None and (self.tiling.tile % patch or (self.tiling.tile // patch) % 2):
                raise ValueError(
                    f"model.tiling.tile {self.tiling.tile} with model.{name}.config.patch_size {patch}: the tile must hold an even "
                    f"number of patches a side for the 2x2 pixel shuffle; use a multiple of {2 * patch}"
                )
        if self.language.source is None and "model_type" not in self.language.config:
            raise ValueError(
                "model.language.config.model_type is required for a random language model, e.g. qwen2 or llama"
            )
        if self.language.source is None and not (self.tokenizer.source or self.tokenizer.train_vocab):
            raise ValueError("a random language model needs model.tokenizer.source or model.tokenizer.train_vocab")
        return self
