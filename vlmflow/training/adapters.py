"""LoRA and DoRA: a rule of a stage puts low-rank adapters on linear layers and trains those instead of the weights.

The layers are peft's (``peft.tuners.lora.Linear``); the model stays the family's own class, so parameter names keep
their place and only gain a suffix: ``q_proj.weight`` becomes ``q_proj.base_layer.weight`` beside
``q_proj.lora_A.default.weight``. Role tables and layer numbers therefore work on adapters too.

What is published is plain: at the end :func:`merge` folds the adapters into the weights in fp32, by name, on whatever
state the engine gives out, and nobody who loads the model needs peft (spec: training.md B.2 items 5 and 9).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlmflow.digest import digest
from vlmflow.errors import ModelError, RecipeError

if TYPE_CHECKING:
    import torch

    from vlmflow.recipe.optimizer import AdapterSpec

ADAPTER = "default"  # peft's name of an adapter; a layer here never has a second one


@dataclass(frozen=True)
class Adaptable:
    """Which parameters of a model an adapter can stand in for.

    Attributes:
        weights: names of linear layers' weights.
        head: those of them that are the language model's output; adapted by a regex only, not by a role.
        others: every other parameter's name -> what it is, for messages.
        tied: name of a linear weight that is shared -> name under which the model knows it.
    """

    weights: frozenset[str]
    head: frozenset[str] = frozenset()
    others: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)

    def refuse_tied(self, index: int, modules: str) -> None:
        """Raise RecipeError when the regex of rule ``index`` names a linear layer whose weight is shared."""
        shared = [n for n in self.tied if modules.startswith("re:") and re.search(modules[3:], n)]
        if shared:
            raise RecipeError(
                f"train[{index}].modules '{modules}' puts an adapter on {shared[0]}, which is the same tensor as {self.tied[shared[0]]}: "
                "merging the adapter of one use would change the other, and the published model would not be the trained one. Narrow the "
                "regex, or train the tensor plainly with a rule without an adapter"
            )

    def choose(self, index: int, modules: str, names: Sequence[str]) -> list[str]:
        """The linear weights among the parameters that rule ``index`` matched.

        Raises:
            RecipeError: none of them is one.
        """
        heads = () if modules.startswith("re:") else self.head
        chosen = [n for n in names if n in self.weights and n not in heads]
        if not chosen:
            raise RecipeError(
                f"train[{index}].adapter: '{modules}' matches {len(names)} parameters but no weight of a linear layer, and adapters stand "
                f"in for those only. It matched {self.left_out(modules, names)}; e.g. {names[0]}. Remove the adapter to train them plainly"
            )
        return chosen

    def left_out(self, modules: str, names: Sequence[str]) -> str:
        """What a rule matches beside linear layers: ``2 Conv2d, 5 LayerNorm``."""
        heads = () if modules.startswith("re:") else self.head
        kinds = Counter(
            "output head" if n in heads else self.others[n] for n in names if n in heads or n in self.others
        )
        return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def adaptable(model: torch.nn.Module) -> Adaptable:
    """Look at every parameter of a model: linear layers can be adapted, the rest is named by its kind.

    A linear layer inside ``MultiheadAttention`` cannot: torch reads its weight without calling it, so an adapter there
    would train nothing.
    """
    from torch import nn

    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weights, heads = set(), set()
    others: dict[str, str] = {}
    tied: dict[str, str] = {}
    for prefix, module in model.named_modules():
        inside = isinstance(_parent(model, prefix), nn.MultiheadAttention)
        for local, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            known, *_ = names = owners[id(parameter)]
            if isinstance(module, nn.Linear) and local == "weight" and not inside:
                if len(names) > 1:
                    tied[name] = next(n for n in names if n != name)
                    others.setdefault(known, "tied embedding and output layer")
                    continue
                weights.add(name)
                if module is head:
                    heads.add(name)
            elif name == known and name not in others:
                kind = type(module).__name__
                others[name] = f"bias of {kind}" if local == "bias" and isinstance(module, nn.Linear) else kind
    return Adaptable(frozenset(weights), frozenset(heads), others, tied)


def _parent(model: Any, name: str) -> Any:
    return model.get_submodule(name.rpartition(".")[0]) if name else None


def attach(model: torch.nn.Module, layers: Mapping[str, AdapterSpec], seed: int) -> dict[str, list[str]]:
    """Put adapters on linear layers, in place, deterministically by (seed, name) and so alike on every rank.

    The model computes what it did before: B is zero, and DoRA's magnitude is the norm of the weight's rows.

    Args:
        layers: weight name -> adapter, as chosen by the table.

    Returns:
        Each weight name -> names of its new trainable parameters.

    Raises:
        ModelError: DoRA on a weight with a row of zeros.
    """
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    made = {}
    for weight, spec in layers.items():
        name = weight.removesuffix(".weight")
        base = model.get_submodule(name)
        config = LoraConfig(r=spec.rank, lora_dropout=spec.dropout, use_dora=spec.kind == "dora")
        alpha: Any = spec.alpha  # peft says int and computes with floats
        with _whole(base):  # DoRA's magnitude begins as the norm of its rows
            layer = Linear(base, ADAPTER, config, r=spec.rank, lora_alpha=alpha)
        _bring_along(layer, base)
        setattr(_parent(model, name), name.rpartition(".")[2], layer)
        made[weight] = [f"{name}.{n}" for n, _ in layer.named_parameters() if not n.startswith("base_layer.")]
        first = layer.lora_A[ADAPTER].weight
        if first.is_meta:  # a model that is only counted
            continue
        generator = torch.Generator().manual_seed(int(digest([seed, weight])[:15], 16))
        bound = 1 / math.sqrt(first.shape[1])  # Kaiming with a = sqrt(5), as LoRA's authors start A
        with torch.no_grad():
            first.copy_((torch.rand(first.shape, generator=generator) * 2 - 1) * bound)
        if spec.kind == "dora" and not bool(layer.lora_magnitude_vector[ADAPTER].weight.all()):
            raise ModelError(
                f"{weight} has a row of zeros, whose direction DoRA would divide by its length of 0; every value after it would be NaN. "
                "Use adapter.kind: lora for this rule, or leave this layer out by a regex"
            )
    return made


def _whole(module: torch.nn.Module) -> AbstractContextManager[Any]:
    """The module's weights, gathered when ZeRO 3 has partitioned them. Collective."""
    parameters = [p for p in module.parameters() if hasattr(p, "ds_id")]
    if not parameters:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters)


def _bring_along(layer: torch.nn.Module, base: torch.nn.Module) -> None:
    """Under ZeRO 3 a forward pass finds only its own module's weights; DoRA's reads those of the layer under it too."""
    parameters = [p for p in base.parameters() if hasattr(p, "ds_id")]
    if parameters:
        from deepspeed.runtime.zero import register_external_parameter

        for parameter in parameters:
            register_external_parameter(layer, parameter)


def now(name: str, layers: Mapping[str, AdapterSpec]) -> str:
    """The name that a parameter of the plain model has once adapters are attached."""
    module, _, local = name.rpartition(".")
    return f"{module}.base_layer.{local}" if f"{module}.weight" in layers else name


def is_part(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_" in name


def merge(state: Mapping[str, torch.Tensor], layers: Mapping[str, AdapterSpec]) -> dict[str, torch.Tensor]:
    """The plain model's state: adapters folded into their weights in fp32, every name as it was before.

    LoRA: ``W + s B A``. DoRA: ``m * (W + s B A) / |W + s B A|`` by rows (arXiv 2402.09353), the norm in the weight's dtype as
    the forward pass has it, so an untrained adapter gives back the weight it came from. ``s`` = alpha / rank.

    Args:
        state: the adapted model's; adapters may be fp32 (master weights) over a base in bf16. Left as it is.

    Returns:
        Tensors in the dtype of the base weights.
    """
    merged = {n.replace(".base_layer.", "."): t for n, t in state.items() if not is_part(n)}
    for weight, spec in layers.items():
        name = weight.removesuffix(".weight")
        base = merged[weight]
        a, b = (state[f"{name}.lora_{side}.{ADAPTER}.weight"].to(base.device).float() for side in "AB")
        whole = base.float() + (spec.alpha / spec.rank) * (b @ a)
        if spec.kind == "dora":
            magnitude = state[f"{name}.lora_magnitude_vector.{ADAPTER}.weight"].to(base.device).float()
            norm = whole.norm(dim=1).to(base.dtype).float()
            whole = whole * (magnitude / norm).unsqueeze(1)
        merged[weight] = whole.to(base.dtype)
    return merged


def detach(model: torch.nn.Module, layers: Mapping[str, AdapterSpec]) -> None:
    """Take the adapters off again, in place: the model has its plain modules and the weights that were under them."""
    for weight in layers:
        name = weight.removesuffix(".weight")
        setattr(_parent(model, name), name.rpartition(".")[2], model.get_submodule(name).base_layer)
