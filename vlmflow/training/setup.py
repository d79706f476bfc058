"""From a job to a model that trains: weights, what of them moves, and the engine around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmflow.training.job import Job

if TYPE_CHECKING:
    from vlmflow.models.family import Family
    from vlmflow.training.optimizer import Table


@dataclass
class Setup:
    """What a rank trains with.

    Attributes:
        config: the model's transformers config.
        table: frozen and trainable parameters.
        labels: one label for each of the optimizer's parameter groups.
    """

    family: Family
    tokenizer: Any
    config: Any
    table: Table
    labels: list[str]
    engine: Any


def prepare(job: Job, device: Any) -> Setup:
    """Load the initial model, apply the stage's rules and wrap it in the engine.

    Raises:
        ModelError: the folder is not a complete model, or a weight in it is not finite.
        RecipeError: a rule that matches nothing.
    """
    import torch

    from vlmflow import models
    from vlmflow.training import engine as ds
    from vlmflow.training.engine_state import numel
    from vlmflow.training.health import check_weights
    from vlmflow.training.optimizer import Rule, make_table, parameter_groups

    stage = job.stage
    family = models.family(job.family)
    folder = job.model_folder()
    model, tokenizer = ds.load_model(folder, stage.zero, stage.dtype)
    check_weights(model, str(folder))
    rules = [Rule(r.modules, r.lr, r.last, r.weight_decay, r.layer_decay) for r in stage.train]
    sizes = {name: numel(p) for name, p in model.named_parameters()}
    table = make_table(sizes, rules, family.roles, family.unused, family.layers)
    groups, labels = parameter_groups(model, table, rules, stage.optimizer.weight_decay)
    torch.manual_seed(job.seed)
    engine = ds.make_engine(model.to(device), groups, stage.optimizer.model_dump(), stage.zero, stage.dtype, stage.ema)
    engine.train()
    return Setup(family, tokenizer, model.config, table, labels, engine)
