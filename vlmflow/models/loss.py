"""What a packed micro-batch says of its targets: nats summed over them, or the log-probability of each segment's answer.

The trainer divides by the global number of targets (or pairs) itself, because averages of averages weigh short packs too
much (training.md B.2, item 7).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vlmflow.errors import ModelError
from vlmflow.models.points.modeling_points import target_loss

BEHIND_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def packed_loss(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, int]:
    """Run `model` (or its DeepSpeed/DDP wrapper) on a packed batch; returns (summed nats as a scalar tensor, targets).

    `batch` holds the forward's arguments including `labels` [1, N] (unshifted, -100 = no target). The head meets only
    the rows whose next token is a target, in chunks of the model's `loss_rows` or of 2^25 logits; the full
    [N, vocabulary] logits are never built. log-softmax is in fp32. Without any target the sum is zero and still reaches the graph.
    """
    rows = _target_rows(batch)
    return _nats(model, batch, rows, "sum"), len(rows)


def packed_logprobs(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each segment's targets and their number: (fp32 [segments] in nats, int64 [segments]).

    As `packed_loss`: only target rows meet the head, in the same chunks. The sum over a segment runs in the order of its
    tokens and does not depend on its neighbours, so equal forwards give equal bits. A segment without target has 0.
    """
    rows, borders = _target_rows(batch), batch["cu_seq_lens_q"]
    segment = torch.searchsorted(borders[1:].to(rows.dtype), rows + 1, right=True)
    counts = torch.bincount(segment, minlength=len(borders) - 1)
    nats = _nats(model, batch, rows, "none")
    return torch.segment_reduce(-nats, "sum", lengths=counts, initial=0.0, unsafe=True), counts


def _target_rows(batch: Mapping[str, Any]) -> torch.Tensor:
    """Positions [n] of a pack whose next token is a target."""
    return (batch["labels"][0, 1:] != -100).nonzero().squeeze(1)


def _nats(model: Any, batch: Mapping[str, Any], rows: torch.Tensor, reduction: str) -> torch.Tensor:
    """Cross-entropy of the target rows in fp32: their sum, or [n] with "none"; it reaches the graph without any row too."""
    inner = getattr(model, "module", model)
    arguments = {**batch, "use_cache": False}
    if getattr(inner, "accepts_loss_only", False):
        return model(**arguments, loss_only=True, target_losses=reduction == "none", num_items_in_batch=1).loss
    # transformers' own classes: rows are chosen by index, so only those meet the head; they know no shared tiles.
    labels = arguments.pop("labels")
    if (shown := arguments.pop("tile_index", None)) is not None:
        arguments["pixel_values"] = arguments["pixel_values"][shown]
    head = inner.get_output_embeddings()
    with _waiting(head, inner):
        hidden = model(**arguments, logits_to_keep=rows if len(rows) else rows.new_zeros(1)).logits[0]
    if not len(rows):
        zero = head(hidden).float().sum() * 0.0
        return zero.reshape(1)[:0] if reduction == "none" else zero
    values = labels[0, 1:][rows].to(hidden.device)
    return target_loss(hidden, values, head, getattr(inner, "loss_rows", None), reduction)


@contextmanager
def _waiting(head: torch.nn.Module, model: Any) -> Iterator[None]:
    """While the model runs, its head hands on what it is given, so that the loss can apply it in chunks.

    Raises ModelError for a model that changes logits behind its head: the loss would be that of others.
    """
    config = model.config.get_text_config()
    if changed := [n for n in BEHIND_THE_HEAD if getattr(config, n, None) not in (None, 1, 1.0)]:
        raise ModelError(
            f"{type(model).__name__} applies config.{changed[0]} = {getattr(config, changed[0])} behind its output layer, which the chunked "
            "loss does not: it would train on other logits than the model gives. Use a language model without it"
        )
    head.forward = lambda hidden: hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
