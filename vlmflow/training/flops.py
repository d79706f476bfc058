"""How many floating-point operations a pack costs, from a model's shapes and from what trains. Needs no weights.

The counting rules (spec: training.md C.3; a multiplication and an addition are two operations):

- A matrix of N weights costs 2N a row forward, 2N for the gradient of its input and 2N for the gradient of its weights.
  So a frozen part without gradient costs 2N, a frozen part that a gradient passes through 4N, a trained part 6N. Which
  of these holds follows from order: the gradient of an input is needed where something trains earlier in the forward
  pass. The first matrix of a tower needs none.
- Attention costs 4 * width * s^2 forward for a sequence of s rows and twice that backward, whichever of queries, keys and
  values need it; in the language model half of it, because it is causal, with s the length of a sample, not of its pack.
- Vision towers are counted on patches (with the class token), their attention on the patches of one tile, the projector
  on the features of a tile, the language model on real tokens, its head on target rows only, since no other row meets it.
- Adapters are matrices like others: two thin ones that train beside a frozen one, in the model that is counted.
- Not counted: embeddings, norms, activations, softmax, the optimizer, dummy tiles, DoRA's row norms.
- What is recomputed for the sake of memory is work of the hardware, not of the model: `recomputed` counts it apart, so
  that MFU never and HFU always includes it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmflow.errors import ModelError, RecipeError

PEAK_ENV = "VLMFLOW_PEAK_TFLOPS"
CAUSAL = 0.5  # share of the score matrix that causal attention computes

# Order of the matrices inside a layer; the first pattern that matches a parameter's name counts.
_WITHIN = (
    (0, re.compile(r"input_layernorm|layer_norm1|ln_1|norm1")),
    (1, re.compile(r"(q_proj|k_proj|v_proj|qkv|c_attn|query_key_value|q_norm|k_norm|lora_magnitude)")),
    (2, re.compile(r"attn|attention")),
    (3, re.compile(r"layernorm|layer_norm|ln_2|norm2")),
    (5, re.compile(r"down_proj|fc2|mlp\.c_proj|w2")),
)
_MLP = 4
_BEFORE, _AFTER, _HEAD = -1, 1 << 20, 1 << 21
Place = tuple[int, float]


@dataclass(frozen=True)
class CostModel:
    """Operations of a training step as a linear function of what is in it.

    Attributes:
        per_token: a token in the language model, image tokens included.
        per_token_squared: times the squared length of each segment.
        per_tile: an image tile: towers and projector.
        per_target: a token that carries a loss: the language head.
    """

    per_token: float = 0.0
    per_token_squared: float = 0.0
    per_tile: float = 0.0
    per_target: float = 0.0

    def cost(self, tokens: Any, squares: Any, tiles: Any, targets: Any = 0) -> Any:
        """Operations of `tokens` in segments whose squared lengths sum to `squares`; numbers or arrays of them."""
        return (
            self.per_token * tokens
            + self.per_token_squared * squares
            + self.per_tile * tiles
            + self.per_target * targets
        )

    def __add__(self, other: CostModel) -> CostModel:
        return CostModel(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[float, float, float, float]:
        """The four numbers, in order."""
        return self.per_token, self.per_token_squared, self.per_tile, self.per_target

    def as_json(self) -> dict[str, float]:
        """The numbers by name."""
        return dict(vars(self))


@dataclass(frozen=True)
class Part:
    """Operations of one role of the model for one unit of its work.

    Attributes:
        unit: token, square (of a segment's length), tile or target.
        forward: operations of the forward pass.
        through: of the gradients that pass to what lies before.
        weights: of the gradients of what trains.
        graph: forward operations that a backward pass needs, so that a recomputing layer does them twice.
    """

    role: str
    unit: str
    forward: float
    through: float = 0.0
    weights: float = 0.0
    graph: float = 0.0

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.through + self.weights


@dataclass(frozen=True)
class _Matrix:
    """One use of a weight: by which role, where in the order of the forward pass, on how many rows of a unit."""

    name: str
    role: str
    order: Place
    size: float
    unit: str
    rows: float


def cost_model(parts: Iterable[Part]) -> CostModel:
    """Sum of the parts, forward and backward: what a step costs."""
    return _summed(parts, lambda part: part.total)


def forward_cost(parts: Iterable[Part]) -> CostModel:
    """Sum of the forward passes: what scoring costs, for instance by the reference model of a preference stage."""
    return _summed(parts, lambda part: part.forward)


def recomputed(parts: Iterable[Part], roles: Collection[str]) -> CostModel:
    """What layers of these roles (`memory.recompute`) compute a second time; add it for HFU."""
    return _summed(parts, lambda part: part.graph if part.role in roles else 0.0)


def count(model: Any, family: Any, trains: Collection[str], causal: float = CAUSAL) -> list[Part]:
    """The parts of a model, with what their training costs.

    Args:
        model: the module tree, adapters attached; the meta device is enough.
        family: its roles and numbered layers (`vlmflow.models.family.Family`).
        trains: names of the parameters that train (`Table.rule_of`).
        causal: share of the language model's score matrix that is computed.

    Raises:
        ModelError: a parameter whose work is not known (a three-dimensional weight without a number of experts).
    """
    trained = set(trains)
    config = model.config
    matrices, order = _matrices(model, family)
    towers = [role for role in family.roles if role.startswith("vision")]
    parts: list[Part] = []
    first: dict[str, Place] = {}  # role -> place of the first thing that trains in it
    for name, (role, place) in order.items():
        if name in trained:
            first[role] = min(first.get(role, place), place)
    never = (_HEAD + 1, 0)

    for tower in towers:
        starts = first.get(tower, never)
        parts += _part([m for m in matrices if m.role == tower], trained, starts)
        vision = _vision_config(config, tower)
        rows = _patches(vision) + 1
        places = sorted({m.order[0] for m in matrices if m.role == tower and 0 <= m.order[0] < _AFTER})
        forward = 4.0 * vision.hidden_size * rows**2
        parts += [_attention(tower, "tile", forward, (layer, 1) >= starts) for layer in places]
    for tower in towers:  # the projector runs once for each tower
        starts = min(first.get("projector", never), (_BEFORE, 0) if tower in first else never)
        parts += _part([m for m in matrices if m.role == "projector"], trained, starts)

    below = any(role in first for role in (*towers, "projector"))
    starts = (_BEFORE, 0) if below else first.get("language", never)
    language = [m for m in matrices if m.role == "language"]
    parts += _part(language, trained, starts)
    text = config.text_config
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    for layer in sorted({m.order[0] for m in language if 0 <= m.order[0] < _AFTER}):
        parts.append(_attention("language", "square", 4.0 * causal * width, (layer, 1) >= starts))
    return _merged(parts)


def _attention(role: str, unit: str, forward: float, gradient: bool) -> Part:
    """Scores and mixing: two products forward, four backward when a gradient reaches queries, keys or values."""
    return Part(role, unit, forward, 2.0 * forward * gradient, 0.0, forward * gradient)


def _part(matrices: list[_Matrix], trained: Collection[str], starts: Place) -> list[Part]:
    """Products with weights. `starts` is the place of the first thing that trains: a gradient passes behind it only."""
    parts = []
    for m in matrices:
        passes = m.order > starts
        reached = passes or m.order == starts
        forward = 2.0 * m.size * m.rows
        parts.append(Part(m.role, m.unit, forward, forward * passes, forward * (m.name in trained), forward * reached))
    return parts


def _matrices(model: Any, family: Any) -> tuple[list[_Matrix], dict[str, tuple[str, Place]]]:
    """Every use of a weight in order, and (role, place) of every parameter by its name in `named_parameters`."""
    config = model.config
    lookups = {id(model.get_input_embeddings().weight)} | {
        id(p) for module in model.modules() if type(module).__name__ == "Embedding" for p in module.parameters(False)
    }
    names = {id(p): name for name, p in model.named_parameters()}
    output = model.get_output_embeddings()
    head = output.weight
    in_head = {id(p) for p in output.parameters()}
    matrices: list[_Matrix] = []
    order: dict[str, tuple[str, Place]] = {}
    for name, parameter in model.named_parameters():
        role = role_of(name, family.roles)
        tied = id(parameter) in lookups
        in_output = id(parameter) in in_head and not tied
        place = _place(name, role, family, in_output)
        order[name] = (role, place)
        if parameter.ndim < 2 or tied:
            continue
        unit, rows = ("target", 1.0) if in_output else _rows(config, role, parameter.ndim)
        matrices.append(_Matrix(name, role, place, parameter.numel() * _active(name, parameter, config), unit, rows))
    if id(head) in lookups:  # tied to the embedding, which is a look-up itself
        matrices.append(_Matrix(names[id(head)], "language", (_HEAD, 0), head.numel(), "target", 1.0))
    return matrices, order


def role_of(name: str, roles: Mapping[str, Any]) -> str:
    """The most specific role of a parameter: the longest role name that matches; `other` without one."""
    found = [role for role, patterns in roles.items() if any(re.match(p, name) for p in patterns)]
    return max(found, key=lambda role: (role.count("."), len(role)), default="other")


def _place(name: str, role: str, family: Any, head: bool) -> Place:
    """(layer, place within it) in the order of the forward pass."""
    late = 0.5 if "lora_B" in name else 0.0  # behind its partner, and behind nothing else that the layer adapts
    if head:
        return _HEAD, late
    found = re.search(family.numbered[role], name) if role in family.numbered else None
    if found is None:
        if role == "projector":
            numbers = re.findall(r"\d+", name)
            return int(numbers[-1]) if numbers else 0, late
        return (_BEFORE, 0) if re.search(r"embed|wte|wpe|pre_layrnorm", name) else (_AFTER, 0)
    rest = name[found.end() :]
    return int(found.group(1)), late + next((place for place, pattern in _WITHIN if pattern.search(rest)), _MLP)


def _rows(config: Any, role: str, ndim: int) -> tuple[str, float]:
    """(unit, rows of it) on which a weight of this role works."""
    if role.startswith("vision"):
        patches = _patches(_vision_config(config, role))
        return "tile", float(patches if ndim == 4 else patches + 1)
    if role == "projector":
        return "tile", float(config.tokens_per_tile)
    return "token", 1.0


def _vision_config(config: Any, role: str) -> Any:
    return getattr(config, "vision_ocr_config" if role.endswith(".ocr") else "vision_config")


def _patches(vision: Any) -> int:
    return (vision.image_size // vision.patch_size) ** 2


def _active(name: str, parameter: Any, config: Any) -> float:
    """Share of a weight that one row meets: 1, or (experts a token) / (experts) for a stack of experts."""
    if parameter.ndim != 3:
        return 1.0
    text = config.text_config
    chosen = getattr(text, "num_experts_per_tok", None)
    if chosen is None:
        raise ModelError(
            f"cannot count the operations of {name} {tuple(parameter.shape)}: a weight of three dimensions is a stack of "
            "experts, but the language model's configuration has no num_experts_per_tok"
        )
    return float(chosen) / parameter.shape[0]


def _merged(parts: Iterable[Part]) -> list[Part]:
    """One part a role and unit."""
    sums: dict[tuple[str, str], list[float]] = {}
    for part in parts:
        total = sums.setdefault((part.role, part.unit), [0.0] * 4)
        for i, value in enumerate((part.forward, part.through, part.weights, part.graph)):
            total[i] += value
    return [Part(role, unit, *values) for (role, unit), values in sums.items()]


def _summed(parts: Iterable[Part], value: Any) -> CostModel:
    sums = dict.fromkeys(("token", "square", "tile", "target"), 0.0)
    for part in parts:
        sums[part.unit] += value(part)
    return CostModel(sums["token"], sums["square"], sums["tile"], sums["target"])


# Dense bf16 tensor-core peaks in TFLOP/s, from NVIDIA's data sheets; where a sheet states the rate with sparsity (H100,
# H200, L4), half of it. H800 and A800 compute as H100 and A100. The first name that is part of the device's name counts.
PEAKS = {
    "H200 NVL": 835.5,
    "H200": 989.5,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.5,
    "H800": 989.5,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.05,
    "L4": 121.0,
    "A40": 149.7,
    "A10": 125.0,
}


def peak_flops(device: str, environment: Mapping[str, str] | None = None) -> float | None:
    """Peak operations a second of a device in bf16, or None when it is not known; it is never guessed.

    Args:
        device: its name, as `torch.cuda.get_device_name()` gives it.
        environment: where `VLMFLOW_PEAK_TFLOPS` may state it, in TFLOP/s; the process's own when None.

    Raises:
        RecipeError: the variable is not a positive number.
    """
    stated = (os.environ if environment is None else environment).get(PEAK_ENV, "")
    if stated:
        try:
            value = float(stated)
        except ValueError:
            value = 0.0
        if not value > 0:
            raise RecipeError(f"{PEAK_ENV} is '{stated}'; give the peak of one device in TFLOP/s, e.g. 989.5")
        return value * 1e12
    words = re.split(r"[\s-]+", device)
    if "MIG" in words:  # a slice of a device has a share of its peak that the name does not tell
        return None
    for name, tera in PEAKS.items():
        if all(word in words for word in name.split()):
            return tera * 1e12
    return None
