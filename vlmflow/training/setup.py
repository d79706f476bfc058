"""From a job to a model that trains: weights, what of them moves, and the engine around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmflow.training.job import Job

if TYPE_CHECKING:
    from vlmflow.models.family import Family
    from vlmflow.recipe.stage import StageSpec
    from vlmflow.training.noise import Noise
    from vlmflow.training.optimizer import Rule, Table


@dataclass
class Setup:
    """What a rank trains with.

    Attributes:
        config: the model's transformers config.
        table: frozen and trainable parameters.
        labels: one label for each of the optimizer's parameter groups.
        noise: noise on embeddings, or None.
        notes: what the people who run the training should know.
    """

    family: Family
    tokenizer: Any
    config: Any
    table: Table
    labels: list[str]
    engine: Any
    noise: Noise | None
    notes: list[str]


def prepare(job: Job, device: Any) -> Setup:
    """Load the initial model, apply the stage's rules and wrap it in the engine.

    Raises:
        ModelError: the folder is not a complete model, or a weight in it is not finite.
        RecipeError: a rule that matches nothing, an adapter or recomputation that cannot work.
        StepFailed: compilation is asked for and this machine has no compiler.
    """
    import torch

    from vlmflow import models
    from vlmflow.training import engine as ds
    from vlmflow.training.compiled import compile_layers
    from vlmflow.training.health import check_weights
    from vlmflow.training.noise import Noise
    from vlmflow.training.optimizer import parameter_groups
    from vlmflow.training.recompute import recompute

    stage = job.stage
    family = models.family(job.family)
    folder = job.model_folder()
    model, tokenizer = ds.load_model(folder, stage.zero, stage.dtype)
    check_weights(model, str(folder))

    table, rules = apply_rules(model, family, stage, job.seed)
    groups, labels = parameter_groups(model, table, rules, stage.optimizer.weight_decay)
    model.loss_rows = stage.memory.loss_rows
    if stage.memory.compile:
        compile_layers(model, family, device)
    notes = recompute(model, family, stage.memory.recompute)
    noise = Noise(model, family, stage.noise) if stage.noise is not None else None
    torch.manual_seed(job.seed)
    engine = ds.make_engine(model.to(device), groups, stage.optimizer.model_dump(), stage.zero, stage.dtype, stage.ema)
    engine.train()
    return Setup(family, tokenizer, model.config, table, labels, engine, noise, notes)


def apply_rules(model: Any, family: Family, stage: StageSpec, seed: int) -> tuple[Table, list[Rule]]:
    """Attach the adapters of a stage's rules and set `requires_grad`; the table of what trains, and the rules.

    Raises:
        RecipeError: a rule that matches nothing, or an adapter that cannot work.
    """
    from vlmflow.training import adapters
    from vlmflow.training.engine_state import numel
    from vlmflow.training.optimizer import Rule, make_table, with_adapters

    def sizes() -> dict[str, int]:
        return {name: numel(parameter) for name, parameter in model.named_parameters()}

    rules = [Rule(r.modules, r.lr, r.last, r.weight_decay, r.layer_decay, r.adapter) for r in stage.train]
    table = make_table(sizes(), rules, family.roles, family.unused, family.layers, adapters.adaptable(model))
    if table.adapters:
        made = adapters.attach(model, table.adapters, seed)
        table = with_adapters(table, sizes(), rules, family.roles, made)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in table.rule_of)
    return table, rules
