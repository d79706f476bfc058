"""The DeepSpeed engine as this trainer uses it: ZeRO 0 to 3 on CPUs (gloo) and GPUs (NCCL).

Four decisions, each against a measured trap:

- The loss is a sum over target tokens divided by the targets of the whole step, so DeepSpeed must not average over
  ranks nor over accumulation (``managed_gradient_accumulation: false``, where the caller's ``step()`` is the
  boundary). ZeRO 0 to 2 sum gradients (``gradient_allreduce_op: sum``); ZeRO 3 only knows the mean, so there ``backward``
  multiplies by the number of ranks first. A step of uneven packs then has the gradient of one large batch.
- On CPUs DeepSpeed would compile a shared-memory operator for a minute and needs a compiler; a killed build leaves a
  lock that hangs later runs (spec: training.md B.3). It consults ``deepspeed.ops.__compatible_ops__``, which it keeps
  as an editable dict; an empty one means "build nothing" and gloo does the communication.
- ZeRO 3 records the order in which modules run and repeats it, so every rank must run the same modules in every
  micro-batch: a text-only pack has a dummy tile, one without a target still meets the head once.
- A step whose gradient norm is not finite changes nothing, under every stage.

State goes in and out by parameter name (``engine_state``), so a checkpoint does not know how it was partitioned.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from vlmflow.errors import StepFailed
from vlmflow.training.ema import Ema
from vlmflow.training.engine_state import (
    MOMENTS,
    WEIGHT,
    base_optimizer,
    capture,
    export_state,
    numel,
    parts,
    restore,
    trainable,
)

__all__ = [
    "backward",
    "capture",
    "export_state",
    "join",
    "load_model",
    "make_engine",
    "restore",
    "set_rates",
    "step",
    "trainable",
]

PERSIST = 100_000  # DeepSpeed's default: ZeRO 3 keeps parameters up to this size whole, because gathering costs more
SMALL = 100_000_000  # a model up to this many parameters is partitioned to the last one
BUCKET = 500_000_000  # DeepSpeed's default: gradient elements reduced at once


def import_deepspeed() -> Any:
    """Import DeepSpeed without its tuner's optional import of MLflow (a second) and without operator builds."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    missing = object()
    known = sys.modules.get("mlflow", missing)
    if known is missing:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if known is missing:
            del sys.modules["mlflow"]
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # DeepSpeed calls torch.distributed by its old names, and the warning about it would come with every collective.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if os.environ["DS_ACCELERATOR"] == "cpu":
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    return deepspeed


class HeldAdamW(torch.optim.AdamW):
    """AdamW that can sit out a step.

    Whatever wraps it reduces, measures and clears gradients as ever, under every ZeRO stage; while ``held`` is set the
    weights, the moments and the count of steps stay as they were.
    """

    held = False

    def step(self, closure: Any = None) -> Any:
        return None if self.held else super().step(closure)


class ClippedAdamW(HeldAdamW):
    """AdamW that clips by global norm first and remembers it, for the engine without ZeRO.

    DeepSpeed clips there too but forgets the norm; ZeRO's own optimizer keeps it, and does not step by a gradient that
    is not finite.
    """

    _global_grad_norm = 0.0

    def __init__(self, groups: Any, clip: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.clip = clip

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for g in self.param_groups for p in g["params"]]
        self._global_grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.clip or float("inf")))
        return super().step(closure) if math.isfinite(self._global_grad_norm) else None


def zero_stage(zero: int, dtype: str) -> int:
    """The ZeRO stage that runs: bf16 needs fp32 master weights, which DeepSpeed keeps only from stage 1 on."""
    return max(1, zero) if dtype == "bf16" else zero


def _config(stage: int, dtype: str, clip: float, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration. ``parameters`` = scalars in the model."""
    cuda = torch.cuda.is_available()
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": cuda and stage > 1}
    if stage:
        zero["reduce_bucket_size"] = min(BUCKET, max(1, parameters))
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSIST if parameters > SMALL else 0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "torch_adam": True,
        "zero_allow_untested_optimizer": True,  # it compares types, and ours is a subclass of torch's AdamW
        "steps_per_print": None,
        "gradient_clipping": 0.0 if stage == 0 else clip,
        "zero_optimization": zero,
    }
    if dtype == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return config


def load_model(folder: str | Path, zero: int, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a model folder, on the CPU; under ZeRO 3 on the device and already partitioned. Collective.

    Under ZeRO 3 no rank ever holds the whole model: every module is partitioned when it is made, and rank 0 reads the
    weights (mapped from disk) and sends them out module by module.

    Raises:
        ModelError: the folder is not a complete model.
    """
    from vlmflow import models

    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    if zero_stage(zero, dtype) != 3:
        return models.load_model(folder, dtype=kind)
    import_deepspeed()
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept = HfDeepSpeedConfig(_config(3, dtype, 0.0, 0))  # transformers looks it up through a weak reference
    try:
        model, tokenizer = models.load_model(folder, dtype=kind)
    finally:
        unset_hf_deepspeed_config()
        del kept
    # Saving undoes the renamings of loading; this path of transformers also lists those that no weight needed.
    model._weight_conversions = [c for c in getattr(model, "_weight_conversions", []) if c.was_used()]
    return model, tokenizer


def make_engine(
    model: Any,
    groups: list[dict[str, Any]],
    optimizer: dict[str, Any],
    zero: int,
    dtype: str,
    ema: float | None = None,
) -> Any:
    """Wrap a model whose ``requires_grad`` flags are set.

    Args:
        groups: AdamW parameter groups.
        optimizer: betas, eps, clip.
        zero: 0 to 3. Under 3 a model from ``load_model`` stays partitioned; a whole one becomes it here.
        ema: decay of the moving average of the weights; None = none is kept.
    """
    deepspeed = import_deepspeed()
    stage = zero_stage(zero, dtype)
    options = {"betas": tuple(optimizer["betas"]), "eps": optimizer["eps"]}
    clip = float(optimizer["clip"] or 0.0)
    config = _config(stage, dtype, clip, sum(numel(p) for p in model.parameters()))
    if stage == 0:
        client: Any = ClippedAdamW(groups, clip, fused=True, **options)
    else:
        client = HeldAdamW(groups, fused=True, **options)
    if stage != 3:
        _plain_linear()
    engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=config, dist_init_required=False)
    _allocate_moments(engine)
    if stage == 0 and torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # it would flatten and copy every gradient for nobody
    engine.ema = None
    if ema is not None:
        held = stage > 0 or torch.distributed.get_rank() == 0
        engine.ema = Ema(ema, {n: p.values[WEIGHT] if held else torch.empty(0) for n, p in parts(engine).items()})
    return engine


def _plain_linear() -> None:
    """Undo ZeRO 3's replacement of ``torch.nn.functional.linear``, which stays for the life of the process.

    The replacement keeps a gathered weight from being held by the graph; without partitions it is only slower.
    """
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patch

    torch.nn.functional.linear = getattr(Patch, "linear_bk", torch.nn.functional.linear)


def _allocate_moments(engine: Any) -> None:
    """Make AdamW's state now instead of at the first step, and link it to the parameters.

    DeepSpeed 0.19.8 links moments after the first parameter group's first step, when the other groups have none yet,
    so ``safe_get_full_optimizer_state`` would know those of the first group only.
    """
    base = base_optimizer(engine)
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3 keeps them out of the groups
    for parameter in flat or [p for group in base.param_groups for p in group["params"]]:
        moments = {m: torch.zeros_like(parameter, memory_format=torch.preserve_format) for m in MOMENTS}
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        base.state[parameter] = {"step": step, **moments}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def join(rendezvous: str, rank: int, world: int) -> torch.device:
    """Join the process group, once a process; returns this rank's device.

    Args:
        rendezvous: ``env://`` (torchrun's variables) or ``file://`` on one machine.

    Raises:
        StepFailed: more ranks on this machine than it has GPUs.
    """
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if local >= (gpus := torch.cuda.device_count()):
            raise StepFailed(
                f"rank {rank} of {world} is number {local} on its machine, which has {gpus} GPUs, and each rank needs one of its "
                f"own: set the stage's processes to {gpus}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU"
            )
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        import_deepspeed().init_distributed(
            dist_backend="nccl" if cuda else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            init_method=None if rendezvous == "env://" else rendezvous,
            rank=rank,
            world_size=world,
            dist_init_required=True,
        )
    return device


def backward(engine: Any, loss: torch.Tensor) -> None:
    """Add this micro-batch's gradient to the step's: ranks and micro-batches are summed, never averaged."""
    if engine.zero_optimization_stage() == 3:
        loss = loss * torch.distributed.get_world_size()
    engine.backward(loss, scale_wrt_gas=False)


def set_rates(engine: Any, multiplier: float) -> list[float]:
    """Set every group's rate to its peak times ``multiplier``; returns the rates."""
    rates = []
    for group in engine.optimizer.param_groups:
        group["lr"] = group["peak"] * multiplier
        rates.append(group["lr"])
    return rates


def step(engine: Any, held: bool = False) -> float:
    """End the step: reduce the gradients and let the optimizer move, unless ``held`` or the gradient is not finite.

    Collective. Returns the global gradient norm before clipping, inf or nan when it is not finite; whatever it is, the
    gradients are cleared.
    """
    base = base_optimizer(engine)
    base.held = held
    engine.step()
    base.held = False
    norm = float(engine.get_global_grad_norm() or 0.0)
    if engine.ema is not None and not held and math.isfinite(norm):
        engine.ema.update()
    return norm
