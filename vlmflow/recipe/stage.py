"""Recipe sections ``bootstrap`` and ``stages``: a stage is data, not code.

What trains, on what, at which rate: lists that the one training loop reads. Nothing in the code asks for a stage's name.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlmflow.recipe.base import Name, Section, Share

TextKind = Literal["alt", "ocr", "synthetic", "fused", "conversations"]
Prompt = Literal["continuation", "chat"]


class DataUse(Section):
    """One ingredient of a stage's mixture."""

    dataset: Name = Field(description="a dataset of section data")
    sources: list[Name] | None = Field(None, description="only these sources; None = all")
    text: TextKind = Field(
        description="which text is learned: the table's alt text or conversations, or the text of a curation layer"
    )
    keep: bool = Field(False, description="only samples that the perplexity filter kept")
    prompt: Prompt | None = Field(None, description="prompt style of this ingredient; None = the stage's")
    weight: float = Field(
        1.0, gt=0, le=100, description="passes over this ingredient in one epoch (0.5 = half of it, 2 = twice)"
    )


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


class BudgetSpec(Section):
    """What one pack (micro-batch) may hold."""

    tokens: int = Field(4096, ge=64, description="language-model tokens, image tokens included")
    tiles: int = Field(32, ge=1, description="image tiles, thumbnails included")


class CheckpointSpec(Section):
    """When state is saved."""

    every: int = Field(200, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(2, ge=1, description="complete checkpoints kept")


class StageSpec(Section):
    """One stage of training."""

    prompt: Prompt = Field(description="continuation = image, text, end; chat = the chat template")
    instructions: list[str] = Field(
        default_factory=list, description="for chat style on captions: one is drawn per sample"
    )
    data: list[DataUse] = Field(min_length=1, description="the mixture")
    train: list[TrainRule] = Field(
        min_length=1, description="what trains and how fast; the first rule that matches a parameter wins"
    )
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec, description="AdamW and clipping")
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec, description="learning rate over the steps")
    epochs: float = Field(1.0, gt=0, le=10_000, description="passes over the mixture")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    budget: BudgetSpec = Field(default_factory=BudgetSpec, description="what one pack may hold")
    packs: int = Field(1, ge=1, description="packs in one optimizer step, over all processes")
    processes: int = Field(1, ge=1, le=1024, description="ranks (GPUs, or CPU processes)")
    threads: int = Field(1, ge=1, le=256, description="CPU threads of one rank")
    zero: Literal[0, 1, 2] = Field(
        0, description="DeepSpeed ZeRO stage; bf16 runs at least stage 1 (fp32 master weights)"
    )
    dtype: Literal["fp32", "bf16"] = Field("bf16", description="dtype of weights and of the published model")
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec, description="when state is saved")
    failure_limit: Share = Field(0.01, description="largest share of samples that may be unusable")

    @model_validator(mode="after")
    def _instructed(self) -> StageSpec:
        for number, use in enumerate(self.data):
            if problem := self.misfit(use):
                raise ValueError(f"data[{number}].{problem}")
        return self

    def misfit(self, use: DataUse) -> str | None:
        """Why this stage cannot learn an ingredient, its own or a soup candidate's; None when it can."""
        style = use.prompt or self.prompt
        if style == "chat" and use.text != "conversations" and not self.instructions:
            return f"text: '{use.text}' in chat style needs at least one of the stage's `instructions` to answer"
        if style == "continuation" and use.text == "conversations":
            return "prompt: conversations can only be learned in chat style; use prompt: chat"
        return None
