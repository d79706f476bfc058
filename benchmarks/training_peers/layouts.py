"""Batches as others make them: padded rows, packs under a dense mask, packs without isolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from training_peers.world import Row


def pixels(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """``pixel_values`` of all rows, or nothing when they hold no image."""
    tiles = np.concatenate([row.tiles for row in rows])
    return {"pixel_values": torch.from_numpy(tiles)} if len(tiles) else {}


def padded(rows: Sequence[Row], pad: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded rows with an attention mask [B, N], as every VLM collator of transformers makes them."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.from_numpy(row.ids)
        labels[number, : len(row.ids)] = torch.from_numpy(row.labels)
        mask[number, : len(row.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **pixels(rows)}


def dense(batch: dict[str, Any]) -> dict[str, Any]:
    """One of our packs under a block-diagonal causal mask [1, 1, N, N] instead: exact, and quadratic in the pack."""
    bounds = torch.as_tensor(batch["cu_seq_lens_q"]).long()
    segment = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    at = torch.arange(len(segment))
    allowed = (segment[:, None] == segment) & (at[:, None] >= at)
    kept = {k: v for k, v in batch.items() if not k.startswith(("cu_seq_lens", "max_length"))}
    return {**kept, "attention_mask": allowed[None, None].numpy()}


def knapsack(rows: Sequence[Row], capacity: int, delta: int = 0) -> list[list[Row]]:
    """nanoVLM's packing (`_balanced_greedy_knapsack`): longest first into the emptiest of just enough knapsacks."""
    order = sorted(rows, key=lambda row: -len(row.ids))
    total = sum(len(row.ids) for row in rows)
    sacks: list[list[Row]] = [[] for _ in range((total + capacity - 1) // capacity + delta)]
    loads = [0] * len(sacks)
    for row in order:
        best = min(range(len(sacks)), key=lambda number: loads[number])
        if loads[best] + len(row.ids) > capacity:
            sacks.append([])
            loads.append(0)
            best = len(sacks) - 1
        sacks[best].append(row)
        loads[best] += len(row.ids)
    return [sack for sack in sacks if sack]


def leaking(rows: Sequence[Row], length: int) -> dict[str, Any]:
    """nanoVLM's batch: a knapsack padded to the fixed length, one causal row, positions running through it."""
    ids = np.concatenate([row.ids for row in rows])
    labels = np.concatenate([row.labels for row in rows])
    short = length - len(ids)
    tiles = np.concatenate([row.tiles for row in rows])
    return {
        "input_ids": np.pad(ids, (0, short))[None],
        "labels": np.pad(labels, (0, short), constant_values=-100)[None],
        "position_ids": np.arange(length)[None],
        "attention_mask": np.pad(np.ones(len(ids), dtype=np.int64), (0, short))[None],
        **({"pixel_values": tiles} if len(tiles) else {}),
    }
