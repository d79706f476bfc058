"""What a packed micro-batch says of its targets: nats summed over them, or the log-probability of each segment's answer.

The trainer divides by the global number of targets (or pairs) itself, because averages of averages weigh short packs too
much (training.md B.2, item 7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def packed_loss(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, int]:
    """Run `model` (or its DeepSpeed/DDP wrapper) on a packed batch; returns (summed nats as a scalar tensor, targets).

    `batch` holds the forward's arguments including `labels` [1, N] (unshifted, -100 = no target). The head meets only
    the rows whose next token is a target; the full [N, vocabulary] logits are never built. log-softmax is in fp32.
    Without any target the sum is zero and still reaches the graph.
    """
    labels = batch["labels"]
    wanted = labels[:, 1:] != -100
    targets = int(wanted.sum())
    inner = getattr(model, "module", model)
    arguments = {**batch, "use_cache": False}
    if getattr(inner, "accepts_loss_only", False):
        return model(**arguments, loss_only=True, num_items_in_batch=1).loss, targets
    # transformers' own classes: rows are chosen by index, so only those meet the head.
    arguments.pop("labels")
    rows = wanted[0].nonzero().squeeze(1) if targets else torch.zeros(1, dtype=torch.long, device=labels.device)
    logits = model(**arguments, logits_to_keep=rows).logits[0].float()
    if not targets:
        return logits.sum() * 0.0, 0
    return torch.nn.functional.cross_entropy(logits, labels[0, 1:][rows].to(logits.device), reduction="sum"), targets


def packed_logprobs(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each segment's targets and their number: (fp32 [segments] in nats, int64 [segments]).

    As `packed_loss`: only target rows meet the head, in the same chunks. The sum over a segment runs in the order of its
    tokens and does not depend on its neighbours, so equal forwards give equal bits. A segment without target has 0.
    """
    labels, borders = batch["labels"], batch["cu_seq_lens_q"]
    wanted = labels[0, 1:] != -100
    rows = wanted.nonzero().squeeze(1)
    segment = torch.searchsorted(borders[1:].to(rows.dtype), rows + 1, right=True)
    counts = torch.bincount(segment, minlength=len(borders) - 1)
    inner = getattr(model, "module", model)
    arguments = {**batch, "use_cache": False}
    if getattr(inner, "accepts_loss_only", False):
        nats = model(**arguments, loss_only=True, target_losses=True).loss
    else:
        arguments.pop("labels")
        kept = rows if len(rows) else torch.zeros(1, dtype=torch.long, device=labels.device)
        logits = model(**arguments, logits_to_keep=kept).logits[0].float()
        if len(rows):
            nats = torch.nn.functional.cross_entropy(logits, labels[0, 1:][rows].to(logits.device), reduction="none")
        else:  # still reaches the graph, so that no rank waits for another
            nats = (logits.sum() * 0.0).reshape(1)[:0]
    return torch.segment_reduce(-nats, "sum", lengths=counts, initial=0.0, unsafe=True), counts
