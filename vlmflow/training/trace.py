"""Rehearsal of one pack on the meta device: how many bytes are alive, and when, without computing anything.

The model's own forward and backward run on tensors that have shapes but no storage, and every storage is counted from its
birth to its end. So recomputation, chunked losses, adapters and what trains are not modelled: they are what the
rehearsal runs. Weights and finished gradients are left out, because how they are kept depends on the ZeRO stage
(`vlmflow.training.memory`).

Attention is a stand-in with the memory of a flash kernel: it keeps queries, keys, values, output and one fp32 number a
row and head, and needs the queries' gradient in fp32 while it goes back.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ATTENTION = "vlmflow_rehearsal"
LARGE = 1 << 16  # bytes from which on the end of a storage is also looked for, not only waited for


@dataclass(frozen=True)
class Rehearsal:
    """Bytes of one micro-batch, without weights and without gradients that are finished.

    Attributes:
        alive: part of the model -> bytes that it keeps from its forward pass until the backward pass has used them.
        frontier: (gradient elements finished, most bytes alive at that time) over the backward pass.
    """

    alive: dict[str, int]
    frontier: tuple[tuple[int, int], ...]

    def peak(self, per_gradient: float = 0.0, buffer: float = 0.0) -> int:
        """Most bytes at a time, where each finished gradient element keeps `per_gradient` bytes.

        Args:
            buffer: bytes that are there from the first finished gradient on.
        """
        return max(int(alive + done * per_gradient + buffer * (done > 0)) for done, alive in self.frontier)

    @property
    def kept(self) -> int:
        """Bytes alive between forward and backward."""
        return sum(self.alive.values())


class Alive(TorchDispatchMode):
    """Counts bytes of storages from birth to end, except those of ``known`` tensors.

    ``done`` is set from outside; ``frontier`` has the most bytes alive for each of its values.
    """

    def __init__(self, known: Collection[torch.Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.done = 0
        self.frontier: dict[int, int] = {}
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}
        self._large: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, out)
        return out

    def _see(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            size = storage.nbytes()
            self._seen[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            if size >= LARGE:
                self._large[key] = (StorageWeakRef(storage), size)
            self.alive += size
            if self.alive > self.frontier.get(self.done, 0):
                self._sweep()
                self.frontier[self.done] = max(self.frontier.get(self.done, 0), self.alive)
        return tensor

    def _sweep(self) -> None:
        """Python is not told of a storage that ended because its tensor was given another (`tensor.data = ...`)."""
        for key, (storage, size) in list(self._large.items()):
            if storage.expired():
                self._gone(key, size)

    def _gone(self, key: int, size: int) -> None:
        if self._seen.pop(key, None) is not None:
            self._large.pop(key, None)
            self.alive -= size


class _Flash(torch.autograd.Function):
    """Shapes in, shapes out: [B, H, N, D] queries and [B, K, N, D] keys and values to [B, N, H, D]."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, rows, width = query.shape
        out = query.new_empty(batch, rows, heads, width)
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, rows, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # type: ignore[override]
        query, key, value, _, _ = ctx.saved_tensors
        _accumulator = torch.empty_like(query, dtype=torch.float32)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[torch.Tensor, None]:
    return _Flash.apply(query, key, value), None


def rehearse(model: Any, tokens: int, tiles: int, targets: int) -> Rehearsal:
    """Forward and backward of a pack through a model on the meta device, prepared as for training.

    Args:
        tokens: of the pack, image tokens included.
        tiles: image tiles.
        targets: rows that meet the head.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    from vlmflow.models.points.modeling_points import target_loss

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    model.train()
    config = model.config
    parameters = [p for p in model.parameters() if p.requires_grad]
    counter = Alive([*model.parameters(), *model.buffers()])
    kept: dict[str, int] = {}

    def finished(parameter: torch.Tensor) -> None:
        counter.done += parameter.numel()
        counter.frontier[counter.done] = counter.alive
        parameter.grad = None

    def mark(name: str) -> None:
        kept[name] = counter.alive - sum(kept.values())

    hooks = [p.register_post_accumulate_grad_hook(finished) for p in parameters]
    try:
        with counter, torch.device("meta"):
            ids = torch.empty(1, tokens, dtype=torch.long)
            embeds = model.get_input_embeddings()(ids)
            if tiles:
                features = model.get_image_features(torch.empty(tiles, config.tile, config.tile, 3, dtype=torch.uint8))
                mark("vision")
                places = (ids == config.image_token_id).unsqueeze(-1)
                embeds = embeds.masked_scatter(places, features.reshape(-1, features.shape[-1]))
                del features, places
            hidden = model.model(
                inputs_embeds=embeds,
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
                position_ids=torch.empty_like(ids),
                use_cache=False,
            ).last_hidden_state
            del embeds, ids
            rows = hidden[0, :-1][torch.arange(max(1, targets))]
            del hidden
            mark("language")
            values = torch.empty(max(1, targets), dtype=torch.long)
            total = target_loss(rows, values, model.get_output_embeddings(), getattr(model, "loss_rows", None))
            del rows, values
            mark("head")
            total.backward()
            del total
    finally:
        for hook in hooks:
            hook.remove()
    return Rehearsal(kept, tuple(sorted(counter.frontier.items())))
