"""Layer-wise decay of the learning rate: lower layers move less, because what they know is more general.

The rate of a layer is the rule's times ``layer_decay`` once for every layer above it (BEiT, arXiv 2106.08254; Qwen-VL
trains its ViT with 0.95). Parameters of a role that come before its first layer (embeddings) lie below all layers, those
that come after (final norm, head) above all; a tensor that is both, tied embeddings, counts as the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from vlmflow.errors import ModelError


def layers_above(
    role_of: Mapping[str, str], layers: Callable[[str], str | None] | None, dead: Iterable[str] = ()
) -> dict[str, int]:
    """How many layers lie above each parameter, for parameters of roles that have layers.

    Args:
        role_of: parameter name -> role, in model order.
        layers: role -> regex whose first group is a layer number; None (or ModelError) for a role without layers.
        dead: parameters that never reach the output; their layers do not count.
    """
    names: dict[str, list[str]] = {}
    unused = set(dead)
    for name, role in role_of.items():
        if name not in unused:
            names.setdefault(role, []).append(name)
    above: dict[str, int] = {}
    for role, members in names.items():
        pattern = _pattern(layers, role)
        number = {n: int(m.group(1)) for n in members if pattern and (m := re.search(pattern, n))}
        present = sorted(set(number.values()))
        begun = False
        for name in members if present else ():
            begun = begun or name in number
            over = sum(other > number[name] for other in present) if name in number else 0
            above[name] = over if begun else len(present)
    return above


def _pattern(layers: Callable[[str], str | None] | None, role: str) -> str | None:
    try:
        return None if layers is None else layers(role)
    except ModelError:
        return None
