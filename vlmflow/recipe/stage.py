"""Recipe sections ``bootstrap`` and ``stages``: a stage is data, not code.

What trains, on what, at which rate: lists that the one training loop reads. Nothing in the code asks for a stage's name.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlmflow.recipe.base import Section, Share
from vlmflow.recipe.mixture import DataUse, MixtureSpec, Prompt
from vlmflow.recipe.objective import NoiseSpec, ObjectiveSpec
from vlmflow.recipe.optimizer import OptimizerSpec, ScheduleSpec, TrainRule


class BudgetSpec(Section):
    """What one pack (micro-batch) may hold."""

    tokens: int = Field(4096, ge=64, description="language-model tokens, image tokens included")
    tiles: int = Field(32, ge=1, description="image tiles, thumbnails included")
    too_long: Literal["split", "drop"] = Field(
        "split", description="a conversation over the budget: split at a turn (its images are repeated) or dropped"
    )


class CheckpointSpec(Section):
    """When state is saved, and what is kept."""

    every: int = Field(200, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest complete checkpoints kept")
    keep_every: int | None = Field(
        None,
        ge=1,
        description="also keep the checkpoints whose step is a multiple of this, until the model is published",
    )
    background: bool = Field(
        True, description="write from a thread of its own while training goes on; false = the step waits for the store"
    )


class HealthSpec(Section):
    """What happens when a step is not healthy. The samples of the step are named either way."""

    not_finite: Literal["stop", "skip"] = Field("stop", description="loss or gradient norm is NaN or infinite")
    spike: float | None = Field(
        None, gt=1, description="a step's loss above this times the running median is a spike; None = not watched"
    )
    on_spike: Literal["stop", "skip"] = Field("skip", description="what a spike does")
    skips: int = Field(10, ge=0, description="skipped steps after which training stops all the same")


class MemorySpec(Section):
    """Time for memory. Nothing here changes what is learned (up to the order of float sums)."""

    recompute: list[str] = Field(
        default_factory=list, description="roles (vision, language, ...) whose layers recompute their activations"
    )
    loss_rows: int | None = Field(
        None, ge=16, description="rows of logits in memory at once; None = chunks only above 2^25 logits"
    )
    compile: bool = Field(False, description="torch.compile of the language model's layers")


class StageSpec(Section):
    """One stage of training."""

    objective: ObjectiveSpec = Field(default_factory=ObjectiveSpec, description="what is minimised")
    prompt: Prompt = Field(description="continuation = image, text, end; chat = the chat template")
    instructions: list[str] = Field(
        default_factory=list, description="for chat style on captions: one is drawn per sample"
    )
    data: list[DataUse] = Field(min_length=1, description="the ingredients")
    mixture: MixtureSpec = Field(
        default_factory=MixtureSpec, description="how the ingredients are mixed over the steps"
    )
    train: list[TrainRule] = Field(
        min_length=1, description="what trains and how fast; the first rule that matches a parameter wins"
    )
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec, description="AdamW and clipping")
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec, description="learning rate over the steps")
    noise: NoiseSpec | None = Field(None, description="noise on embeddings while training (NEFTune)")
    ema: float | None = Field(
        None, gt=0, lt=1, description="publish an exponential moving average of the weights with this decay; None = off"
    )
    epochs: float = Field(1.0, gt=0, le=10_000, description="passes over the mixture")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    budget: BudgetSpec = Field(default_factory=BudgetSpec, description="what one pack may hold")
    packs: int = Field(1, ge=1, description="packs in one optimizer step, over all processes")
    processes: int = Field(1, ge=1, le=16384, description="ranks (GPUs, or CPU processes) over all nodes")
    threads: int = Field(1, ge=1, le=256, description="CPU threads of one rank")
    decode: Literal["whole", "scaled"] = Field(
        "whole",
        description="scaled: JPEGs of at least twice the size that tiles are cut from are decoded at 1/2, 1/4 or 1/8 (2 to 4 times "
        "less CPU); pixels then differ by 0.3 to 2 of 255 from what scoring, evaluation and exported models see",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        0, description="DeepSpeed ZeRO stage; bf16 runs at least stage 1 (fp32 master weights)"
    )
    dtype: Literal["fp32", "bf16"] = Field("bf16", description="dtype of weights and of the published model")
    memory: MemorySpec = Field(default_factory=MemorySpec, description="time for memory")
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec, description="when state is saved")
    health: HealthSpec = Field(default_factory=HealthSpec, description="NaN and spike policy")
    failure_limit: Share = Field(0.01, description="largest share of samples that may be unusable")

    @model_validator(mode="after")
    def _instructed(self) -> StageSpec:
        for number, use in enumerate(self.data):
            if problem := self.misfit(use):
                raise ValueError(f"data[{number}].{problem}")
        return self

    @model_validator(mode="after")
    def _compilable(self) -> StageSpec:
        if self.memory.compile and self.zero == 3:
            raise ValueError(
                "memory.compile does not go with zero: 3, which gathers weights in hooks around every linear layer: they cut a compiled "
                "layer into pieces that are compiled again and again (measured: 16 graphs where zero 0 to 2 have 5). Take zero: 2 or less, "
                "or compile: false"
            )
        return self

    def misfit(self, use: DataUse) -> str | None:
        """Why this stage cannot learn an ingredient, its own or a soup candidate's; None when it can."""
        style = use.prompt or self.prompt
        preferred = self.objective.kind == "dpo"
        if preferred != (use.text == "preferences"):
            return (
                f"text: '{use.text}' does not fit objective.kind '{self.objective.kind}': dpo learns from text: preferences "
                "(pairs of a chosen and a rejected answer) and sft from any other"
            )
        if style == "chat" and use.text not in WITH_TURNS and not self.instructions:
            return f"text: '{use.text}' in chat style needs at least one of the stage's `instructions` to answer"
        if style == "continuation" and use.text in WITH_TURNS:
            return f"prompt: {use.text} can only be learned in chat style; use prompt: chat"
        return None


WITH_TURNS = ("conversations", "preferences", "docqa")
