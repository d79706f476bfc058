"""Recipe fields ``stages.*.data`` and ``stages.*.mixture``: what a stage learns from, and in which proportions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlmflow.recipe.base import Name, Section, Share

TextKind = Literal["alt", "ocr", "synthetic", "fused", "described", "docqa", "conversations", "preferences"]
CURATED_TEXTS = ("ocr", "synthetic", "fused", "described", "docqa")  # kinds whose text is a layer of curation
Prompt = Literal["continuation", "chat"]


class DataUse(Section):
    """One ingredient of a stage's mixture."""

    dataset: Name = Field(description="a dataset of section data")
    sources: list[Name] | None = Field(None, description="only these sources; None = all")
    text: TextKind = Field(
        description="which text is learned: the table's alt text, conversations or preferences (chosen and rejected "
        "answers), or a curation layer: its text, or (docqa) its questions and answers as a conversation"
    )
    keep: bool = Field(False, description="only samples that the perplexity filter kept")
    prompt: Prompt | None = Field(None, description="prompt style of this ingredient; None = the stage's")
    weight: float = Field(
        1.0, gt=0, le=100, description="passes over this ingredient in one epoch (0.5 = half of it, 2 = twice)"
    )
    cap: int | None = Field(
        None,
        ge=1,
        description="most samples of each source in one epoch (Cambrian-1's threshold t), drawn anew every epoch",
    )


class TextShareSpec(Section):
    """Share of text-only samples among those shown, falling or rising linearly (DeepSeek-VL: 1.0 to 0.7).

    Kept at every point of the training; the kind of samples that runs out is shown again, in further passes.
    """

    start: Share = Field(1.0, description="share at the first step")
    end: Share = Field(description="share after the warm-up, until the last step")
    warmup: Share = Field(0.0, description="share of the training over which it moves from start to end")


class TilePhase(Section):
    """Up to a point of the training, images are cut into fewer tiles (Idefics3: longest side grows from 364 to 1820)."""

    until: float = Field(gt=0, le=1, description="share of the training at which the next phase begins")
    max_tiles: int = Field(ge=1, description="most tiles of an image in this phase")


class MixtureSpec(Section):
    """How the ingredients are mixed over the steps."""

    text_share: TextShareSpec | None = Field(
        None, description="share of text-only samples over the training; None = as the data has it"
    )
    group: Literal["none", "modality"] = Field(
        "none", description="modality: a step is all text-only or all with images (DeepSeek-VL)"
    )
    tiles: list[TilePhase] = Field(
        default_factory=list,
        description="image-size ramp; after the last phase, and when empty, model.tiling.max_tiles",
    )

    @model_validator(mode="after")
    def _rising(self) -> MixtureSpec:
        points = [phase.until for phase in self.tiles]
        if points != sorted(set(points)):
            raise ValueError(f"tiles: the phases' `until` must rise, found {points}")
        return self
