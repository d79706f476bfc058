"""Memory of one rank under each ZeRO stage, by part, before anything is started.

What one pack needs comes from a rehearsal (`vlmflow.training.trace`); what is kept around it follows from the number of
parameters and from what DeepSpeed 0.19.8 does with the configuration of `vlmflow.training.engine`. P = parameters, T = those
that train, N = ranks, w = bytes of a weight (4 or 2):

| bytes | ZeRO 0 (fp32) | 1, fp32 | 1, bf16 | 2 | 3 |
| --- | --- | --- | --- | --- | --- |
| weights | wP | wP | wP | wP | wP/N, and those gathered for use |
| fp32 masters | - | 4T/N | 4T/N | 4T/N | 4T/N |
| AdamW moments | 8T | 8T/N | 8T/N | 8T/N | 8T/N |
| gradients | 4T | 4T | 4T, and 2T not yet added | 4T/N | 4T/N |
| reduction | at the step | bucket of 4 bytes | at the step | bucket of w bytes | bucket of w bytes |

bf16 without ZeRO does not exist: DeepSpeed keeps fp32 masters from stage 1 on only (`engine.zero_stage`).

The peak is the largest of three moments: the backward pass of the first pack of a step, that of a later pack, when
gradients lie there already, and the optimizer's step. `benchmarks/memory_forecast.py` compares it with what is allocated.
Not in it: the CUDA context, the workspaces of cuBLAS and NCCL, and fragmentation of the allocator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmflow.training.trace import Rehearsal

STAGES = (0, 1, 2, 3)
BUCKET = 500_000_000  # gradient elements reduced at once (engine.py: DeepSpeed's default)
PREFETCH = 50_000_000  # elements that ZeRO 3 gathers at once (DeepSpeed's stage3_prefetch_bucket_size)
LIVE = 1_000_000_000  # elements that ZeRO 3 keeps gathered (DeepSpeed's stage3_max_live_parameters)
PERSIST = 100_000  # ZeRO 3 keeps smaller parameters whole in models above SMALL parameters (engine.py)
SMALL = 100_000_000


@dataclass(frozen=True)
class Size:
    """Numbers of parameters (scalars).

    Attributes:
        total: of the model, adapters included.
        trainable: of what trains.
        small: sum over the parameters that ZeRO 3 does not partition.
        largest: of the largest module with weights of its own, which is always gathered whole.
    """

    total: int
    trainable: int
    small: int
    largest: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank at its peak.

    Attributes:
        zero: the stage.
        parts: what is there at the peak, by part; they sum to `total`.
        moment: when the peak occurs: `backward` or `step`.
    """

    zero: int
    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"zero": self.zero, "moment": self.moment, "parts": self.parts, "total": self.total}


def size_of(parameters: Iterable[tuple[str, Any]]) -> Size:
    """Sizes of named parameters whose `requires_grad` flags are set."""
    total = trainable = small = 0
    modules: dict[str, int] = {}
    for name, parameter in parameters:
        count = parameter.numel()
        total += count
        trainable += count * parameter.requires_grad
        small += count * (count <= PERSIST)
        module = name.rpartition(".")[0]
        modules[module] = modules.get(module, 0) + count
    return Size(total, trainable, small if total > SMALL else 0, max(modules.values(), default=0))


def footprint(
    size: Size,
    rehearsal: Rehearsal,
    zero: int,
    ranks: int,
    dtype: str = "bf16",
    micros: int = 1,
    ema: bool = False,
    overlap: bool = True,
) -> Footprint:
    """Memory of one rank at its peak.

    Args:
        zero: ZeRO stage; with bf16 at least 1.
        ranks: GPUs over which optimizer state is divided.
        micros: packs of one optimizer step on a rank; from the second on gradients are there before its backward pass.
        ema: a moving average of the weights is kept.
        overlap: ZeRO 2 reduces gradients while the backward pass goes on (on GPUs), with a second bucket.

    Raises:
        ValueError: bf16 without ZeRO.
    """
    if zero == 0 and dtype == "bf16":
        raise ValueError("bf16 runs at least ZeRO 1")
    width = 2 if dtype == "bf16" else 4
    trained, share = size.trainable, size.trainable / (ranks if zero else 1)
    bucket = min(BUCKET, size.total)
    later = micros > 1
    parts: dict[str, float] = {"weights": width * size.total}
    if zero == 3:
        whole = size.small
        parts["weights"] = width * (whole + (size.total - whole) / ranks)
        # Gathered into one buffer and copied out of it, so what is gathered last is there twice.
        gathered = min(size.total, max(LIVE, size.largest)) + min(size.total, PREFETCH)
        parts["gathered weights"] = width * gathered if ranks > 1 else 0
    parts["fp32 masters"] = 4 * share if zero else 0
    parts["moments"] = 8 * share
    parts["moving average"] = 4 * share if ema else 0

    # What a finished gradient element keeps until the end of the first backward pass, then until the step.
    growing, gradients, buffers, step = _gradients(zero, dtype, trained, share, bucket, ranks, overlap)
    backward = dict(parts, gradients=gradients if later or zero in (2, 3) or dtype == "bf16" else 0)
    if zero == 1 and dtype == "bf16":
        backward["gradients"] = 4 * trained + (2 * trained if later else 0)
    growing = 0.0 if later else growing
    resident = zero == 3 or (zero == 1 and later)  # else the bucket is made with the first gradient
    most = buffers + rehearsal.peak(growing) if resident else rehearsal.peak(growing, buffers)
    held = buffers if most > rehearsal.peak(growing) else 0
    backward |= {"buffers": held, "activations": most - held}
    stepping = dict(parts, gradients=gradients, buffers=step)
    stepping["gathered weights"] = 0
    moments = {"backward": backward, "step": stepping}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Footprint(zero, {name: int(value) for name, value in moments[moment].items() if value}, moment)


def _gradients(
    zero: int, dtype: str, trained: int, share: float, bucket: int, ranks: int, overlap: bool
) -> tuple[float, float, float, float]:
    """(bytes an element keeps while the first backward pass runs, gradients at its end, buffers then, at the step)."""
    width = 2 if dtype == "bf16" else 4
    reduced = min(BUCKET, trained)
    if zero == 0:
        return 4.0, 4 * trained, 0, 4 * reduced if ranks > 1 else 0  # flattened for the all-reduce
    if zero == 1 and dtype == "bf16":  # fp32 gradients, flattened and cast to bf16 for the all-reduce
        return 2.0, 6 * trained, 0, 6 * reduced
    if zero == 1:  # the partition is flattened for the step; the bucket is kept until then
        return 4.0, 4 * trained, 4 * bucket, 4 * bucket + 4 * share
    if zero == 2:
        return 0.0, 4 * share, width * bucket * (2 if overlap else 1), 4 * share if dtype == "fp32" else 0
    return 0.0, 4 * share, width * bucket, width * bucket + 4 * share
