"""Attention over packed sequences without a dense mask, for any causal language model of transformers.

Registered as `vlmflow_varlen`: where a forward carries `cu_seq_lens_q`, every segment attends to itself only; where it
does not (generation with a cache and padding, encoders), it is plain `sdpa`. A dense pack mask costs the square of the
pack and is slower than padding at 4096 tokens (training.md C.1).

On CUDA in 16 bits torch's own varlen flash kernel runs, where it takes the heads and the GPU. Elsewhere every segment goes
through a causal SDPA of its own, on views of the pack: half the time of padding segments of similar length into one call,
because the padding costs its square and the copies. Only short segments, whose work is less than a call, are right-padded
into common ones: a padded key lies behind every real query, so no mask is needed. Each is padded to its own next multiple
of STEP, never to its neighbours' length, so that its result has the same bits whatever it is packed with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "vlmflow_varlen"
SMALL = (
    64  # segments up to this length share calls with others of about their length: the waste is below a call's overhead
)
STEP = 16  # ... after padding to a multiple of this


@dataclass(frozen=True)
class _Plan:
    """How a pack is cut into calls.

    Attributes:
        lengths: of all segments, in order; each of those in ``alone`` is a call.
        alone: numbers of segments.
        groups: calls of short segments.
        restore: int64 [N], row of each pack position in the calls' joined outputs; None = they are in order.
    """

    lengths: list[int]
    alone: list[int]
    groups: list[_Group]
    restore: torch.Tensor | None


@dataclass(frozen=True)
class _Group:
    """Segments padded to one length. ``gather``: int64 [count * length], their positions in the pack, padding repeats a
    first token; None = all segments of the pack, none padded."""

    gather: torch.Tensor | None
    count: int
    length: int


def register() -> None:
    """Make `attn_implementation="vlmflow_varlen"` known to transformers. Safe to call again."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, varlen_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def varlen_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers attention function: query [B, H, N, D], key/value [B, Hkv, M, D] -> ([B, N, H, D], None).

    With `cu_seq_lens_q` (int32, leading 0, last = N) the batch must be one row and attention is causal per segment;
    `attention_mask` is then ignored. Raises ValueError when the lengths do not cover the row.
    """
    cu_seq_lens = kwargs.pop("cu_seq_lens_q", None)
    kwargs.pop("cu_seq_lens_k", None)
    longest = kwargs.pop("max_length_q", None)
    kwargs.pop("max_length_k", None)
    if cu_seq_lens is None or not getattr(module, "is_causal", False):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None:
        raise ValueError(f"{NAME} has no softcap; use attn_implementation='flex_attention' for this model")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{NAME}: packed attention takes one row and no cache, got {query.shape[0]} rows, "
            f"{query.shape[2]} queries and {key.shape[2]} keys"
        )
    if _fits_kernel(query, dropout):
        return _cuda(query, key, value, cu_seq_lens, longest, scaling, sliding_window), None
    return _grouped(query, key, value, cu_seq_lens, dropout, scaling, sliding_window), None


def _fits_kernel(query: torch.Tensor, dropout: float) -> bool:
    """Whether torch's varlen kernel takes queries [1, H, N, D]: 16 bits, D a multiple of 8 up to 256, no dropout, and a GPU
    of compute capability 8.0 or later. It would raise for anything else."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and dropout == 0.0
        and _flash_gpu(query.device)
    )


@torch.compiler.assume_constant_result
def _flash_gpu(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int | torch.Tensor | None,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return _grouped(query, key, value, cu_seq_lens, 0.0, scaling, window)
    longest = int(longest) if longest is not None else int(cu_seq_lens.diff().max())
    out = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens,
        cu_seq_lens,
        longest,
        longest,
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=key.shape[1] != query.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out.unsqueeze(0)


@torch.compiler.disable  # it decides on the pack's borders: compiled, it would be compiled again for every pack
def _grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    plan = _plan(tuple(cu_seq_lens.tolist()), query.shape[2], query.device)
    grouped_query = key.shape[1] != query.shape[1]

    def call(parts: list[torch.Tensor]) -> torch.Tensor:
        """[count, H, length, D] of queries, keys and values -> [count * length, H, D]."""
        length, mask = parts[0].shape[2], None
        if window and length > window:
            at = torch.arange(length, device=query.device)
            mask = (at[:, None] >= at[None, :]) & (at[:, None] - at[None, :] < window)
        out = scaled_dot_product_attention(
            parts[0],
            parts[1],
            parts[2],
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped_query,
        )
        return out.transpose(1, 2).flatten(0, 1)

    outputs = []
    if plan.alone:
        pieces = [tensor.split(plan.lengths, dim=2) for tensor in (query, key, value)]
        outputs = [call([piece[number] for piece in pieces]) for number in plan.alone]
    for group in plan.groups:
        rows = [t[0] if group.gather is None else t[0].index_select(1, group.gather) for t in (query, key, value)]
        outputs.append(call([r.unflatten(1, (group.count, group.length)).transpose(0, 1) for r in rows]))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if plan.restore is not None:
        joined = joined.index_select(0, plan.restore)
    return joined.unsqueeze(0)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a plan first made while scoring may serve training later, which saves its indices
def _plan(bounds: tuple[int, ...], total: int, device: torch.device) -> _Plan:
    """Calls of a pack with these segment bounds; every layer asks for the same one, so it is kept."""
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(
            f"{NAME}: cu_seq_lens runs from {bounds[0]} to {bounds[-1]} but the row has {total} tokens; "
            "every token, padding included, must belong to a segment"
        )
    segments = [(start, end - start) for start, end in pairwise(bounds) if end > start]
    lengths = [length for _, length in segments]
    padded = [-(-length // STEP) * STEP if length <= SMALL else length for length in lengths]
    if len(set(padded)) == 1 and padded == lengths:
        return _Plan(lengths, [], [_Group(None, len(lengths), lengths[0])], None)
    alone = [number for number, length in enumerate(lengths) if length > SMALL]
    if len(alone) == len(lengths):
        return _Plan(lengths, alone, [], None)
    groups = []
    order = [torch.arange(start, start + length) for start, length in (segments[number] for number in alone)]
    rows = [torch.arange(behind := sum(lengths[number] for number in alone))]
    for length in sorted({padded[number] for number in range(len(lengths)) if lengths[number] <= SMALL}):
        short = [number for number in range(len(lengths)) if padded[number] == length and lengths[number] <= SMALL]
        starts = torch.tensor([segments[number][0] for number in short])
        real = torch.arange(length)[None, :] < torch.tensor([lengths[number] for number in short])[:, None]
        positions = starts[:, None] + torch.where(real, torch.arange(length)[None, :], 0)
        groups.append(_Group(positions.flatten().to(device), len(short), length))
        order.append(positions[real])
        rows.append(torch.arange(len(short) * length).view_as(real)[real] + behind)
        behind += len(short) * length
    restore = torch.empty(total, dtype=torch.long)
    restore[torch.cat(order)] = torch.cat(rows)
    return _Plan(lengths, alone, groups, restore.to(device))
