"""Contenders of `curation.py perplexity`: each scores the same requests with the same model and returns nats and tokens.

Run as a program it times one of them in a process of its own: `perplexity_ways.py WAY FOLDER` (FOLDER: see perplexity.py).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from curation_parts.perplexity_world import Work, load

Found = list[tuple[float, int]]


class _Encoded:
    """A sample as the peers encode it: the project's own tiles, tokens and labels, so that only the scoring differs."""

    def __init__(self, work: Work, request: Any) -> None:
        from vlmflow.models.chat import render_caption

        model = work.model
        tiles = [work.family.tile(image, model.config) for image in request.images]
        segments = render_caption(request.target, len(tiles), "chat", request.prompt)
        self.ids, mask = work.family.expand(segments, work.tokenizer, [len(t) for t in tiles], model.config)
        self.labels = work.family.labels(self.ids, mask)
        self.tiles = tiles


def _pixels(rows: Sequence[_Encoded], device: Any) -> Any:
    tiles = [array for row in rows for array in row.tiles]
    return torch.from_numpy(np.concatenate(tiles)).to(device) if tiles else None


def one_by_one(work: Work) -> Found:
    """The official script's way: one sample a forward, logits of the whole sequence copied to the host, softmax in fp32
    there. (Its rounding of probabilities to bfloat16 is left out: it would fail the equality gate.)"""
    found = []
    for request in work.requests:
        row = _Encoded(work, request)
        out = work.model(
            input_ids=torch.tensor([row.ids], device=work.device), pixel_values=_pixels([row], work.device), use_cache=False
        )  # fmt: skip
        probabilities = out.logits[0].cpu().float().softmax(-1)
        at = np.flatnonzero(row.labels[1:] != -100)
        picked = probabilities[torch.from_numpy(at), torch.from_numpy(row.labels[1:][at])]
        found.append((-float(picked.log().double().sum()), len(at)))
    return found


def _padded(work: Work, rows: list[_Encoded], chunked: bool) -> Found:
    """One batch, padded on the right: causal attention then needs no mask, which is the fastest for torch."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + row.ids[-1:] * (width - len(row.ids)) for row in rows], device=work.device)
    labels = torch.tensor(np.stack([np.pad(r.labels, (0, width - len(r.ids)), constant_values=-100) for r in rows]))
    wanted = labels[:, 1:] != -100
    values = labels[:, 1:][wanted].to(work.device)
    if chunked:
        hidden = work.model.model(input_ids=ids, pixel_values=_pixels(rows, work.device), use_cache=False)
        kept = hidden.last_hidden_state[:, :-1][wanted.to(work.device)]
        pieces = zip(kept.split(256), values.split(256), strict=True)
        nats = torch.cat([_nats(work.model.lm_head(h), v) for h, v in pieces])
    else:
        logits = work.model(input_ids=ids, pixel_values=_pixels(rows, work.device), use_cache=False).logits
        nats = _nats(logits[:, :-1].float(), None, labels[:, 1:].to(work.device))[wanted.to(work.device)]
    owner = torch.nonzero(wanted)[:, 0].numpy()
    sums = np.bincount(owner, weights=nats.double().cpu().numpy(), minlength=len(rows))
    return list(zip(sums.tolist(), np.bincount(owner, minlength=len(rows)).tolist(), strict=True))


def _nats(logits: torch.Tensor, values: torch.Tensor | None, labels: torch.Tensor | None = None) -> torch.Tensor:
    if labels is None:
        return torch.nn.functional.cross_entropy(logits.float(), values, reduction="none")
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def padded_random(work: Work) -> Found:
    """Hugging Face `evaluate`'s way: padded batches of 16 in the order of the data, full logits."""
    found: Found = []
    for start in range(0, len(work.requests), 16):
        rows = [_Encoded(work, request) for request in work.requests[start : start + 16]]
        found += _padded(work, rows, chunked=False)
    return found


def _bucketed(work: Work, budget: int) -> Found:
    rows = [_Encoded(work, request) for request in work.requests]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found: dict[int, tuple[float, int]] = {}
    batch: list[int] = []
    for i in [*order, None]:
        if batch and (i is None or len(rows[i].ids) * (len(batch) + 1) > budget):
            found |= dict(zip(batch, _padded(work, [rows[j] for j in batch], chunked=True), strict=True))
            batch = []
        if i is not None:
            batch.append(i)
    return [found[i] for i in range(len(rows))]


def bucketed_2048(work: Work) -> Found:
    """Sorted by length, padded up to 2,048 slots, head in chunks on the counted rows only."""
    return _bucketed(work, 2048)


def bucketed_4096(work: Work) -> Found:
    """The same with 4,096 slots."""
    return _bucketed(work, 4096)


def bucketed_16384(work: Work) -> Found:
    """The same with 16,384 slots."""
    return _bucketed(work, 16384)


def ours(work: Work) -> Found:
    """`VLM.score`, as the perplexity step calls it."""
    from vlmflow.models.inference import VLM

    vlm = VLM(work.model, work.tokenizer)
    scores = vlm.score(work.requests, batch_tokens=16384 if work.device == "cuda" else 4096)
    return [(score.nll, score.tokens) for score in scores]


WAYS: dict[str, Callable[[Work], Found]] = {
    way.__name__: way for way in (one_by_one, padded_random, bucketed_2048, bucketed_4096, bucketed_16384, ours)
}


def measure(way: str, folder: Path) -> dict[str, Any]:
    """Seconds of one pass after a short warm-up (CPU seconds of this process and wall), peak memory, and every score."""
    work = load(folder, attention="vlmflow_varlen" if way == "ours" else "sdpa")
    with torch.inference_mode():
        WAYS[way](replace(work, requests=work.requests[:4]))
        began = time.perf_counter(), time.process_time()
        found = WAYS[way](work)
        if work.device == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if work.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {
        "wall": wall,
        "cpu": cpu,
        "peak_mib": round(peak, 1),
        "found": found,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
