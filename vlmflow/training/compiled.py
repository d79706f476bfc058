"""torch.compile of the language model's layers (recipe: ``memory.compile``).

One layer is compiled for any pack length and serves all layers, because their weights are its inputs. Varlen attention
stays as it is: its CPU path decides on Python numbers (the pack's borders), so the graph is cut around it; on CUDA the
kernel is one operator inside the graph.

A compiler is needed at run time; that is looked for before training, not in the middle of its first step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmflow.errors import StepFailed
from vlmflow.training.recompute import layers_of

if TYPE_CHECKING:
    import torch

    from vlmflow.models.family import Family


def compile_layers(model: torch.nn.Module, family: Family, device: torch.device, backend: str = "inductor") -> int:
    """Compile the layers of role ``language``, in place; returns how many. They compile when first called.

    Raises:
        RecipeError: the family's language model has no numbered layers.
        StepFailed: no compiler on this machine.
    """
    import torch

    if backend == "inductor":
        check_compiler(device)
    layers = layers_of(model, family, "language", "memory.compile").values()
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)
    return len(layers)


def check_compiler(device: torch.device) -> None:
    """Raise StepFailed, with what to install, when what torch.compile generates could not be built for this device."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda" and not has_triton():
        raise StepFailed(
            "memory.compile: torch.compile generates Triton kernels for this GPU, and the package triton is not installed. Install it "
            "(pip install triton), or set memory.compile: false"
        )
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise StepFailed(
            "memory.compile: torch.compile needs a C++ compiler on every machine that trains, and none was found (looked for $CXX, g++, "
            "clang++). Install one (apt-get install g++), point CXX at it, or set memory.compile: false"
        ) from error


def cost() -> str:
    """What compiling took in this process, in words."""
    from torch._dynamo.utils import calculate_time_spent, counters

    seconds, graphs = calculate_time_spent().get("total_wall_time", 0.0), counters["stats"]["unique_graphs"]
    return f"torch.compile: {graphs} graphs in {seconds:.1f} s, within the first step; a later run on this machine finds them"
