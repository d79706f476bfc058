"""What an engine has learned, by parameter name, whatever its partitioning.

DeepSpeed's own accessors answer for whole parameters, on every rank; a rank that only holds a part needs neither. Here
a rank's part of a parameter is a ``Part``: views into the optimizer's flat fp32 buffers. Capturing puts the parts
together on rank 0's CPU, restoring cuts them out, and an average of the weights is kept in the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlmflow.errors import CheckpointError

WEIGHT, MOMENTS, AVERAGE = "weight", ("exp_avg", "exp_avg_sq"), "average"
TOGETHER = 1 << 25  # elements sent to rank 0 in one collective


def base_optimizer(engine: Any) -> Any:
    """The torch AdamW under whatever DeepSpeed wrapped it in."""
    inner = engine.optimizer
    return getattr(inner, "optimizer", inner)


def trainable(engine: Any) -> dict[str, Any]:
    """Trainable parameters by name, in model order."""
    return {n: p for n, p in engine.module.named_parameters() if p.requires_grad}


def local(parameter: Any) -> torch.Tensor:
    """What this rank holds of a parameter: all of it, or under ZeRO 3 its slice, flat and without padding."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    size = parameter.ds_tensor.numel()
    return parameter.ds_tensor.narrow(0, 0, max(0, min(size, numel(parameter) - torch.distributed.get_rank() * size)))


def numel(parameter: Any) -> int:
    """Scalars of a parameter, partitioned or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@dataclass
class Part:
    """This rank's part of one trainable parameter.

    Attributes:
        shape: of the whole parameter.
        start: first element of the part in the flattened parameter.
        values: ``weight``, ``exp_avg``, ``exp_avg_sq``, and ``average`` if one is kept -> fp32 [n] views into the
            optimizer's buffers; n may be 0.
    """

    shape: torch.Size
    start: int
    values: dict[str, torch.Tensor]


def parts(engine: Any) -> dict[str, Part]:
    """Parts of all trainable parameters on this rank, in model order. Without ZeRO a part is the whole."""
    state = base_optimizer(engine).state
    found = {name: _part(parameter, state) for name, parameter in trainable(engine).items()}
    if (ema := getattr(engine, "ema", None)) is not None:
        for name, part in found.items():
            part.values[AVERAGE] = ema.averages[name]
    return found


def _part(parameter: Any, state: Any) -> Part:
    if hasattr(parameter, "ds_id"):  # ZeRO 3: equal slices of every parameter, the last one padded
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        values = {WEIGHT: safe_get_local_fp32_param(parameter)}
        values |= {m: safe_get_local_optimizer_state(parameter, m) for m in MOMENTS}
        start = torch.distributed.get_rank() * values[WEIGHT].numel()
        held = max(0, min(values[WEIGHT].numel(), parameter.ds_numel - start))
        return Part(parameter.ds_shape, start, {key: value.narrow(0, 0, held) for key, value in values.items()})
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2: slices of all parameters laid end to end
        mapping = parameter._hp_mapping
        if mapping is None:
            return Part(parameter.shape, 0, {key: torch.empty(0) for key in (WEIGHT, *MOMENTS)})
        values = {WEIGHT: mapping.get_hp_fragment(), **{m: mapping.get_hp_fragment(m) for m in MOMENTS}}
        return Part(parameter.shape, mapping.lp_fragment_address.start, {k: v.detach() for k, v in values.items()})
    values = {WEIGHT: parameter.detach(), **{m: state[parameter][m] for m in MOMENTS}}
    return Part(parameter.shape, 0, {key: value.view(-1) for key, value in values.items()})


def gather(pieces: Mapping[str, tuple[torch.Size, int, torch.Tensor]], everywhere: bool) -> dict[str, torch.Tensor]:
    """Whole fp32 tensors on rank 0's CPU, nothing elsewhere. Collective.

    Args:
        pieces: name -> (shape, start, this rank's elements [n], fp32); the same names in the same order on every rank.
        everywhere: rank 0 has all elements already.
    """
    rank, made = torch.distributed.get_rank(), {}
    if everywhere:
        values = pieces.items() if rank == 0 else ()
        return {name: value.view(shape).to("cpu", copy=True) for name, (shape, _, value) in values}
    for batch in _batches({name: shape.numel() for name, (shape, _, _) in pieces.items()}):
        total = sum(pieces[name][0].numel() for name in batch)
        # Parts do not overlap: adding their bits as integers puts them together exactly, the sign of a zero included.
        bits = torch.zeros(total, dtype=torch.int32, device=_device(pieces))
        at = 0
        for name in batch:
            shape, start, value = pieces[name]
            bits[at + start : at + start + value.numel()] = value.view(torch.int32)
            at += shape.numel()
        torch.distributed.reduce(bits, dst=0)
        if rank:
            continue
        at = 0
        for name in batch:
            shape = pieces[name][0]
            made[name] = bits[at : at + shape.numel()].to("cpu", copy=True).view(torch.float32).view(shape)
            at += shape.numel()
    return made


def _device(pieces: Mapping[str, tuple[torch.Size, int, torch.Tensor]]) -> torch.device:
    devices = {value.device for _, _, value in pieces.values() if value.numel()}
    return devices.pop() if devices else torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in order, in lists of up to TOGETHER elements (a larger parameter is alone)."""
    batch: list[str] = []
    held = 0
    for name, size in sizes.items():
        if batch and held + size > TOGETHER:
            yield batch
            batch, held = [], 0
        batch.append(name)
        held += size
    if batch:
        yield batch


def capture(engine: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(fp32 weights, what belongs to them) of all trainable parameters, whole, on the CPU.

    The second holds AdamW's moments ``NAME.exp_avg`` and ``NAME.exp_avg_sq`` and, if one is kept, the moving average
    ``NAME.average``. Collective: every rank calls it; rank 0 gets the result, which training does not touch afterwards,
    the others get two empty dicts. Beyond the result it takes memory for TOGETHER elements, or for the largest parameter.
    """
    kept = (*MOMENTS, AVERAGE) if engine.ema is not None else MOMENTS
    moments = {f"{name}.{key}": value for key in kept for name, value in whole(engine, key).items()}
    return whole(engine, WEIGHT), moments


@torch.no_grad()  # under ZeRO 3 the fp32 weights are parameters themselves, and a copy of one would keep a graph
def whole(engine: Any, key: str) -> dict[str, torch.Tensor]:
    """One kind of values (``weight``, ``average``, ...) of all trainable parameters on rank 0's CPU, fp32. Collective."""
    held = {name: (part.shape, part.start, part.values[key]) for name, part in parts(engine).items()}
    return gather(held, _replicated(engine))


def _replicated(engine: Any) -> bool:
    """Whether rank 0 holds all state."""
    return torch.distributed.get_world_size() == 1 or engine.zero_optimization_stage() == 0


def restore(engine: Any, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], step: int) -> None:
    """Put captured state back, into any partitioning. ``step`` = optimizer steps done.

    Every rank calls it with the same mappings; each value is looked up once, so a mapping that reads from a file on
    demand never has the whole state in memory.

    Raises:
        CheckpointError: other parameters than this stage trains, or of another shape.
    """
    held = parts(engine)
    if missing := sorted(set(held) ^ set(weights)):
        raise CheckpointError(
            f"the checkpoint holds {len(weights)} trained parameters, this stage trains {len(held)}; they differ in "
            f"{missing[:3]}: it belongs to another stage or recipe"
        )
    for state in base_optimizer(engine).state.values():
        state["step"].fill_(float(step))
    if engine.ema is not None:
        engine.ema.taken = step
    parameters = trainable(engine)
    with torch.no_grad():
        for name, part in held.items():
            value = weights[name]
            cut(name, part, WEIGHT, value)
            _set_model_copy(parameters[name], part, value)
            for key in part.values:
                if key != WEIGHT:
                    cut(name, part, key, moments[f"{name}.{key}"])


def cut(name: str, part: Part, key: str, value: torch.Tensor) -> None:
    """Copy this rank's part out of a whole value. Raises CheckpointError for another shape."""
    if value.shape != part.shape:
        raise CheckpointError(
            f"the checkpoint's '{name}' has shape {tuple(value.shape)}, this model's {tuple(part.shape)}: it belongs to "
            "another model"
        )
    mine = part.values[key]
    mine.copy_(value.reshape(-1)[part.start : part.start + mine.numel()])


def _set_model_copy(parameter: Any, part: Part, value: torch.Tensor) -> None:
    """The weights that the forward pass uses, where they are not the fp32 ones themselves."""
    if hasattr(parameter, "ds_tensor"):
        local(parameter).copy_(part.values[WEIGHT])
    if parameter.data.numel() == numel(parameter):  # not, or not at the moment, partitioned
        parameter.data.copy_(value)


def export_state(engine: Any, exact: Callable[[str], bool] = lambda _: False) -> dict[str, torch.Tensor]:
    """All parameters and saved buffers of the trained model by name, on rank 0's CPU, in the stage's dtype; {} elsewhere.

    Collective. Trained parameters are the optimizer's, or their average if one is kept. A parameter with two names (tied
    embeddings) comes once, under the first.

    Args:
        exact: names of trained parameters that stay in fp32.
    """
    module = engine.module
    trained = whole(engine, WEIGHT if engine.ema is None else AVERAGE)
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    first = torch.distributed.get_rank() == 0
    made: dict[str, torch.Tensor] = {}

    def keep(names: Iterable[str]) -> None:
        made.update({name: frozen[name].detach().to("cpu", copy=True) for name in names})

    if engine.zero_optimization_stage() == 3:
        from deepspeed.runtime.zero import GatheredParameters

        for batch in _batches({name: numel(p) for name, p in frozen.items()}):
            with GatheredParameters([frozen[name] for name in batch]):
                if first:
                    keep(batch)
    elif first:
        keep(frozen)
    if not first:
        return {}
    for name, parameter in trainable(engine).items():
        value = trained.pop(name)
        made[name] = value if exact(name) else value.to(parameter.dtype)
    saved = module.state_dict(keep_vars=True)
    made |= {n: b.detach().cpu().clone() for n, b in module.named_buffers() if n in saved}
    return {name: made[name] for name in saved if name in made}
