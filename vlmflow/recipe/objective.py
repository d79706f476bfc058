"""Recipe fields ``stages.*.objective`` and ``noise``: what a stage minimises."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vlmflow.recipe.base import Section


class ObjectiveSpec(Section):
    """Cross-entropy on the answers, or preference optimisation on pairs of answers."""

    kind: Literal["sft", "dpo"] = Field(
        "sft", description="sft = cross-entropy of target tokens; dpo = direct preference optimisation"
    )
    beta: float = Field(
        0.1, gt=0, description="dpo: strength of the tie to the reference model (the stage's initial model)"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo: probability that a preference is the wrong way round (conservative DPO)"
    )
    sft_weight: float = Field(
        0.0, ge=0, description="dpo: weight of the chosen answers' cross-entropy per token, added to the loss"
    )


class NoiseSpec(Section):
    """NEFTune: uniform noise on embeddings, of size alpha / sqrt(length * width) for each sample of a pack."""

    alpha: float = Field(5.0, gt=0, description="NEFTune's alpha (SmolVLM: 5.0)")
    on: Literal["text", "merged"] = Field(
        "text", description="text = word embeddings only, as the Hugging Face hook does; merged = image features too"
    )
