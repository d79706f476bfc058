"""No equality, no timing: every contender must give the loss and the gradients of samples run one by one.

Same random weights, same samples, dropout 0, fp32. Compared are the summed loss and the norm of every parameter's
gradient, relative to the largest of them. What is not equal is marked and gets no ratio.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from training_peers import layouts
from training_peers.world import Row
from vlmflow.models.family import sequential_positions
from vlmflow.models.loss import packed_loss
from vlmflow.training.batch import pack, to_torch

TOLERANCE = 1e-5


def our_pack(rows: list[Row]) -> dict[str, Any]:
    """Rows as one pack of ours."""
    return pack([(row.ids, sequential_positions(row.ids), row.labels) for row in rows], [row.tiles for row in rows])


def gradients(model: Any) -> dict[str, float]:
    """Norm of every gradient by name; gradients are cleared."""
    found = {n: float(p.grad.double().norm()) for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def compare(loss: float, norms: dict[str, float], other: float, others: dict[str, float]) -> float:
    """Largest relative difference of loss or any gradient norm (against the largest norm)."""
    scale = max(norms.values())
    worst = max(abs(norms.get(n, 0.0) - others.get(n, 0.0)) / scale for n in norms.keys() | others.keys())
    return max(worst, abs(loss - other) / abs(loss))


def check(model: Any, rows: list[Row]) -> dict[str, float]:
    """Worst relative difference of each contender from samples run one by one."""
    device = next(model.parameters()).device
    found: dict[str, float] = {}

    def place(batch: dict[str, Any]) -> dict[str, Any]:
        return {k: torch.as_tensor(v).to(device) if np.ndim(v) else v for k, v in batch.items()}

    model.set_attn_implementation("sdpa")
    loss = 0.0
    for row in rows:
        batch = place(layouts.padded([row]))
        part = model(**batch, num_items_in_batch=1).loss
        part.backward()
        loss += part.item()
    norms = gradients(model)

    def measure(name: str, total: Any) -> None:
        total.backward()
        found[name] = compare(loss, norms, total.item(), gradients(model))

    measure("padded", model(**place(layouts.padded(rows)), num_items_in_batch=1, loss_only=True).loss)
    whole = our_pack(rows)
    measure("dense", packed_loss(model, place(layouts.dense(whole)))[0])
    measure("nanovlm", packed_loss(model, place(layouts.leaking(rows, sum(len(r.ids) for r in rows))))[0])
    forward = model.forward
    try:
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
        batch = place(layouts.padded(rows))
        measure("trl", -model(**batch, fused_lm_head=True).log_probs.sum())
    finally:
        model.forward = forward
    model.set_attn_implementation("vlmflow_varlen")
    measure("ours", packed_loss(model, to_torch(whole, device))[0])
    return found


@torch.no_grad()
def leak(model: Any, rows: list[Row]) -> dict[str, float]:
    """How far the logits of a pack's last sample move when the text of its first sample is edited: 0 = isolated."""
    edited = Row(rows[0].ids.copy(), rows[0].labels, rows[0].tiles, rows[0].images)
    text = np.flatnonzero(edited.labels != -100)
    edited.ids[text] = np.roll(edited.ids[text], 1)
    changed = [edited, *rows[1:]]
    last = len(rows[-1].ids)
    device = next(model.parameters()).device
    moved = {}
    for name, attention, lay in (
        ("ours", "vlmflow_varlen", our_pack),
        ("dense", "sdpa", lambda r: layouts.dense(our_pack(r))),
        ("nanovlm", "sdpa", lambda r: layouts.leaking(r, sum(len(x.ids) for x in r))),
    ):
        model.set_attn_implementation(attention)
        before, after = (
            model(
                **{
                    k: torch.as_tensor(v).to(device) if np.ndim(v) else v
                    for k, v in lay(which).items()
                    if k != "labels"
                },
                use_cache=False,
            ).logits[0, -last:]
            for which in (rows, changed)
        )
        moved[name] = float((before - after).abs().max())
    return moved
