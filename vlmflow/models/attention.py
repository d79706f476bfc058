"""Attention over packed sequences without a dense mask, for any causal language model of transformers.

Registered as `vlmflow_varlen`: where a forward carries `cu_seq_lens_q`, every segment attends to itself only; where it
does not (generation with a cache and padding, encoders), it is plain `sdpa`. A dense pack mask costs the square of the
pack and is slower than padding at 4096 tokens (training.md C.1).

On CUDA in 16 bits torch's own varlen flash kernel runs. Elsewhere segments are right-padded into groups of similar
length and go through one causal SDPA a group: a padded key lies behind every real query, so no mask is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "vlmflow_varlen"
SMALL = 64  # segments up to this length share one group whatever their lengths: the waste is below a call's overhead


@dataclass(frozen=True)
class _Group:
    gather: torch.Tensor  # int64 [count * length], positions in the pack; padding repeats the segment's first token
    count: int
    length: int


@dataclass(frozen=True)
class _Plan:
    groups: tuple[_Group, ...]
    restore: torch.Tensor | None  # int64 [N], row of each pack position in the concatenated group outputs


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
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        return _cuda(query, key, value, cu_seq_lens, longest, scaling, sliding_window), None
    return _grouped(query, key, value, cu_seq_lens, dropout, scaling, sliding_window), None


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
    outputs = []
    for group in plan.groups:
        parts = []
        for tensor in (query, key, value):
            rows = tensor[0] if plan.restore is None else tensor[0].index_select(1, group.gather)
            parts.append(rows.unflatten(1, (group.count, group.length)).transpose(0, 1))
        mask = None
        if window and group.length > window:
            at = torch.arange(group.length, device=query.device)
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
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if plan.restore is not None:
        joined = joined.index_select(0, plan.restore)
    return joined.unsqueeze(0)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a plan first made while scoring may serve training later, which saves its indices
def _plan(bounds: tuple[int, ...], total: int, device: torch.device) -> _Plan:
    """Groups of a pack with these segment bounds; every layer asks for the same one, so it is kept."""
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(
            f"{NAME}: cu_seq_lens runs from {bounds[0]} to {bounds[-1]} but the row has {total} tokens; "
            "every token, padding included, must belong to a segment"
        )
    segments = [(end - start, start) for start, end in pairwise(bounds) if end > start]
    if len({length for length, _ in segments}) == 1:
        return _Plan((_Group(torch.empty(0, dtype=torch.long), len(segments), segments[0][0]),), None)
    segments.sort(key=lambda pair: (-pair[0], pair[1]))
    buckets: list[list[tuple[int, int]]] = []
    for segment in segments:
        if not buckets or (buckets[-1][0][0] > SMALL and segment[0] * 2 <= buckets[-1][0][0]):
            buckets.append([])
        buckets[-1].append(segment)
    groups = []
    restore = torch.empty(total, dtype=torch.long)
    offset = 0
    for bucket in buckets:
        length = bucket[0][0]
        lengths = torch.tensor([n for n, _ in bucket])
        starts = torch.tensor([s for _, s in bucket])
        within = torch.arange(length)
        real = within[None, :] < lengths[:, None]
        positions = starts[:, None] + torch.where(real, within[None, :], 0)
        rows = torch.arange(len(bucket) * length).view(len(bucket), length) + offset
        restore[positions[real]] = rows[real]
        groups.append(_Group(positions.flatten().to(device), len(bucket), length))
        offset += len(bucket) * length
    return _Plan(tuple(groups), restore.to(device))
