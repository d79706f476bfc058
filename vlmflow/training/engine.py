"""The DeepSpeed engine as this trainer uses it, and per-parameter access to its state.

Three decisions, each against a measured trap:

- The loss is a sum over target tokens divided by the targets of the whole step, so DeepSpeed must not average over
  ranks (``gradient_allreduce_op: sum``) nor over accumulation (``managed_gradient_accumulation: false``, where the
  caller's ``step()`` is the boundary). A step of uneven packs then has the gradient of one large batch.
- On CPUs DeepSpeed would compile a shared-memory operator for a minute and needs a compiler; a killed build leaves a
  lock that hangs later runs (spec: training.md B.3). It consults ``deepspeed.ops.__compatible_ops__``, which it keeps
  as an editable dict; an empty one means "build nothing" and gloo does the communication.
- State is read and written per parameter by name, so a checkpoint does not know how it was partitioned.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

from vlmflow.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


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


def make_engine(model: Any, groups: list[dict[str, Any]], optimizer: dict[str, Any], zero: int, dtype: str) -> Any:
    """Wrap a model whose ``requires_grad`` flags are set.

    Args:
        groups: AdamW parameter groups.
        optimizer: betas, eps, clip.
        zero: 0, 1 or 2; the recipe's schema lets nothing else through.
    """
    deepspeed = import_deepspeed()
    stage = zero_stage(zero, dtype)
    options = {"betas": tuple(optimizer["betas"]), "eps": optimizer["eps"]}
    clip = float(optimizer["clip"] or 0.0)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "sum",
        "torch_adam": True,
        "zero_allow_untested_optimizer": True,  # it compares types, and ours is a subclass of torch's AdamW
        "steps_per_print": None,
        "gradient_clipping": 0.0 if stage == 0 else clip,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
    }
    if dtype == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if stage == 0:
        client: Any = ClippedAdamW(groups, clip, fused=True, **options)
    else:
        client = HeldAdamW(groups, fused=True, **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=client, config=config, dist_init_required=False)
    _allocate_moments(engine)
    if stage == 0 and torch.distributed.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # it would flatten and copy every gradient for nobody
    return engine


def _allocate_moments(engine: Any) -> None:
    """Make AdamW's state now instead of at the first step, and link it to the parameters.

    DeepSpeed 0.19.8 links moments after the first parameter group's first step, when the other groups have none yet,
    so ``safe_get_full_optimizer_state`` would know those of the first group only.
    """
    base = _base(engine)
    for group in base.param_groups:
        for parameter in group["params"]:
            moments = {m: torch.zeros_like(parameter, memory_format=torch.preserve_format) for m in MOMENTS}
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            base.state[parameter] = {"step": step, **moments}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def join(rendezvous: str, rank: int, world: int) -> torch.device:
    """Join the process group, once a process; returns this rank's device.

    Args:
        rendezvous: ``env://`` (torchrun's variables) or ``file://`` on one machine.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
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


def _base(engine: Any) -> Any:
    """The torch AdamW under whatever DeepSpeed wrapped it in."""
    inner = engine.optimizer
    return getattr(inner, "optimizer", inner)


def trainable(engine: Any) -> dict[str, Any]:
    """Trainable parameters by name, in model order."""
    return {n: p for n, p in engine.module.named_parameters() if p.requires_grad}


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
    base = _base(engine)
    base.held = held
    engine.step()
    base.held = False
    return float(engine.get_global_grad_norm() or 0.0)


def capture(engine: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(fp32 weights, AdamW moments ``NAME.exp_avg``...) of all trainable parameters, whole, on the CPU.

    Collective: every rank must call it; every rank gets the result.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weights, moments = {}, {}
    plain = not hasattr(next(iter(trainable(engine).values())), "_hp_mapping")
    state = _base(engine).state
    for name, parameter in trainable(engine).items():
        if plain:
            weights[name] = _copied(parameter)
            values = {m: state[parameter][m] for m in MOMENTS}
        else:
            weights[name] = _copied(safe_get_full_fp32_param(parameter))
            values = {m: safe_get_full_optimizer_state(parameter, m) for m in MOMENTS}
        moments.update({f"{name}.{m}": _copied(v) for m, v in values.items()})
    return weights, moments


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """Never the tensor's own memory: it is written to disk while training changes the tensor."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def restore(engine: Any, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], step: int) -> None:
    """Put captured state back, into any partitioning. ``step`` = steps that the optimizer took.

    Raises:
        CheckpointError: other parameters than this stage trains.
    """
    parameters = trainable(engine)
    if missing := sorted(set(parameters) ^ set(weights)):
        raise CheckpointError(
            f"the checkpoint holds {len(weights)} trained parameters, this stage trains {len(parameters)}; they differ in "
            f"{missing[:3]}: it belongs to another stage or recipe"
        )
    base = _base(engine)
    for state in base.state.values():
        state["step"].fill_(float(step))
    if not hasattr(next(iter(parameters.values())), "_hp_mapping"):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(weights[name])
                for moment in MOMENTS:
                    base.state[parameter][moment].copy_(moments[f"{name}.{moment}"])
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    with torch.no_grad():
        for name, parameter in parameters.items():
            safe_set_full_fp32_param(parameter, weights[name])
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, moments[f"{name}.{moment}"], moment)
            parameter.copy_(weights[name])
