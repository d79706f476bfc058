"""Recipe fields ``stages.*.train``, ``optimizer`` and ``schedule``: which parameters move, and how fast."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlmflow.recipe.base import Section, Share


class AdapterSpec(Section):
    """LoRA or DoRA; merged into the weights before the model is published."""

    kind: Literal["lora", "dora"] = Field("lora", description="dora also learns the magnitude of every row")
    rank: int = Field(16, ge=1, le=4096, description="rank of the update (SmolVLM: 64)")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / rank (SmolVLM: 16)")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")


class TrainRule(Section):
    """Modules that train, and how fast. First matching rule wins; what no rule matches is frozen."""

    modules: str = Field(
        description="a role (vision, vision.ocr, projector, language) or 're:' + a regex on parameter names"
    )
    last: int | None = Field(None, ge=1, description="only the last n layers that reach the output")
    lr: float = Field(
        gt=0, lt=1, description="peak learning rate (POINTS 4.3 states 2e-4 for encoders, 2e-5 otherwise)"
    )
    weight_decay: float | None = Field(
        None, ge=0, lt=1, description="decoupled weight decay of these modules; None = the optimizer's"
    )
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="the rate of a layer is lr times this, once for every layer above it"
    )
    adapter: AdapterSpec | None = Field(
        None, description="train low-rank adapters of these modules' linear layers instead of the weights themselves"
    )

    @model_validator(mode="after")
    def _compiles(self) -> TrainRule:
        if self.modules.startswith("re:"):
            try:
                re.compile(self.modules[3:])
            except re.error as error:
                raise ValueError(f"modules: '{self.modules}' is not a regular expression ({error})") from error
        return self


class OptimizerSpec(Section):
    """AdamW and clipping."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's two decay rates; POINTS does not state them"
    )
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decoupled weight decay of matrices; norms, biases and embeddings of positions have none",
    )
    clip: float = Field(1.0, gt=0, description="largest global gradient norm (POINTS1.5: 1.0)")


class ScheduleSpec(Section):
    """Learning rate over the steps."""

    name: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="shape after the warm-up (POINTS 4.3: cosine)"
    )
    warmup: Share = Field(0.03, description="share of the steps spent warming up linearly (POINTS 4.3: 0.03)")
    final: Share = Field(0.0, description="rate at the end, as a share of the peak")
