"""Packs as arrays: segments laid end to end, each seeing only itself.

The keys of a batch are those of the packed forward (a family's model): positions restart in every segment,
``cu_seq_lens`` marks the borders, labels are unshifted and -100 outside targets and at every segment start, so the
shift inside the loss never crosses a border. Pixels stay uint8 until the model normalises them on its device, a
quarter of the bytes of fp32 (spec: training.md C.1 item 10).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack(
    segments: Sequence[tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]],
    tiles: Sequence[NDArray[np.uint8]],
    shown: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Join segments and tiles into one batch of numpy arrays.

    Args:
        segments: (ids [n], positions [n], labels [n]) each.
        tiles: uint8 [t, S, S, 3] each, in the order of the image tokens.
        shown: number of the tile at each place of an image's tokens, where segments show the same tiles.

    Returns:
        ``input_ids``, ``position_ids``, ``labels`` [1, N] int64; ``pixel_values`` uint8 [T, S, S, 3];
        ``cu_seq_lens_q/k`` int32 [segments + 1]; ``max_length_q/k`` int; with ``shown``, ``tile_index`` int64.
    """
    lengths = [len(ids) for ids, _, _ in segments]
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return {
        "input_ids": np.concatenate([s[0] for s in segments]).astype(np.int64)[None],
        "position_ids": np.concatenate([s[1] for s in segments]).astype(np.int64)[None],
        "labels": np.concatenate([s[2] for s in segments])[None],
        "pixel_values": np.concatenate(list(tiles)),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        **({} if shown is None else {"tile_index": np.asarray(shown, dtype=np.int64)}),
    }


def pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """Where there is a GPU, the arrays as tensors in page-locked memory, so that `to_torch` copies while the GPU computes.

    Locking pages takes time: call it off the training loop's thread.
    """
    import torch

    if not torch.cuda.is_available():
        return batch
    return {k: torch.from_numpy(v).pin_memory() if isinstance(v, np.ndarray) else v for k, v in batch.items()}


def to_torch(batch: dict[str, Any], device: Any = None) -> dict[str, Any]:
    """The batch as tensors on the device; numbers stay numbers. Copies from page-locked memory do not wait."""
    import torch

    made = {}
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, torch.Tensor) and device is not None and str(device) != "cpu":
            value = value.to(device, non_blocking=True)
        made[name] = value
    return made
