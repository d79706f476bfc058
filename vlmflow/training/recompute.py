"""Activation checkpointing by role: a layer keeps its input only and runs again in the backward pass.

It costs about a fifth of a step, so it is chosen for each role (spec: training.md C.1 item 6), and only the layers of the
role that need it do it: where neither the input nor a weight of a layer takes a gradient, nothing is kept anyway.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from vlmflow.errors import RecipeError

if TYPE_CHECKING:
    import torch

    from vlmflow.models.family import Family


def layers_of(model: torch.nn.Module, family: Family, role: str, field: str) -> dict[str, Any]:
    """The numbered layers of a role: module name -> module, in order.

    Args:
        field: recipe field that named the role, for the message.

    Raises:
        RecipeError: the role is unknown or has no layers.
    """
    if role not in family.numbered:
        known = "has no numbered layers" if role in family.roles else "is not a role of this model"
        raise RecipeError(
            f"{field}: '{role}' {known}; roles of family '{family.name}' with layers: {', '.join(sorted(family.numbered))}"
        )
    pattern = re.compile(family.layers(role))
    found = (pattern.match(name) for name, _ in model.named_parameters())
    names = dict.fromkeys(match.group(0).rstrip(".") for match in found if match)
    return {name: model.get_submodule(name) for name in names}


def recompute(model: torch.nn.Module, family: Family, roles: Sequence[str]) -> list[str]:
    """Make the layers of these roles recompute, in place; returns notes for people. ``requires_grad`` must be set.

    Raises:
        RecipeError: a role without layers.
    """
    notes = []
    for role in dict.fromkeys(roles):
        layers = layers_of(model, family, role, "memory.recompute")
        for layer in layers.values():
            layer.forward = _recomputed(layer, layer.forward)
        if not any(p.requires_grad for layer in layers.values() for p in layer.parameters()):
            notes.append(
                f"memory.recompute: '{role}' is frozen; its {len(layers)} layers are recomputed only if a gradient passes through them to "
                "something before them that trains"
            )
    return notes


def _recomputed(layer: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from torch.utils.checkpoint import checkpoint

    trains = any(p.requires_grad for p in layer.parameters())

    @wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if not trains and not any(isinstance(a, torch.Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)  # dropout's random state is put back by it

    return again
