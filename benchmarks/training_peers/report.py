"""The table: every figure from the passes, by rules that are printed beside it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from pathlib import Path
from typing import Any

from training_peers.measure import matmul_peak
from vlmflow.training.flops import CostModel, peak_flops

RULES = """\
tokens/s   real tokens (no padding, no dummy image) of the timed steps / their wall time; the best pass
tiles/s    image tiles through both vision towers
padding    positions computed that hold no token
p50, p95   of a step, over all timed steps of the best pass; a step = {batch} samples (ours: {packs} x {tokens} tokens)
memory     peak of the process (CPU: resident, the libraries included; GPU: allocated by torch)
MFU        operations of the model on real tokens (vlmflow.training.flops: 6N a token for trained parts, 2N for the frozen
           towers, causal attention by the sample's own length, the head on target rows) over {peak:.3g} FLOP/s ({what})
wait       share of the step's time spent waiting for data; the peers have theirs in memory"""

MASTERS = """\
bf16: ours keeps fp32 master weights and moments (ZeRO 1); the peers and the bare loop update bf16 weights in place, which is
faster and learns less exactly"""


def cpu_model() -> str:
    """As the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def machine(arguments: Any, size: Any, cores: list[int]) -> dict[str, Any]:
    """What the figures were measured on and with."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        device = torch.cuda.get_device_name()
        peak, what = peak_flops(device) or float("nan"), "dense bf16 by its data sheet"
    else:
        torch.set_num_threads(arguments.threads)
        device, peak, what = cpu_model(), matmul_peak(), "this machine's best fp32 matrix product"
    versions = {n: importlib.metadata.version(n) for n in ("torch", "transformers", "trl", "deepspeed", "accelerate")}
    load = os.getloadavg()[0]
    text = (
        f"{size.name} on {device}, {arguments.threads} thread(s) pinned to core(s) {cores}, load before {load:.2f}; "
        + ", ".join(f"{k} {v}" for k, v in versions.items())
    )
    return {
        "text": text,
        "device": "cuda" if cuda else "cpu",
        "name": device,
        "threads": arguments.threads,
        "load_before": load,
        "versions": versions,
        "peak_flops": peak,
        "peak_is": what,
        "size": size.name,
        "samples": size.samples,
        "steps": arguments.steps,
        "warmup": arguments.warmup,
    }


def percentile(values: list[float], share: float) -> float:
    """The value below which ``share`` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def row(name: str, runs: list[dict[str, Any]], cost: CostModel, peak: float) -> dict[str, Any]:
    """Figures of one contender from its best pass."""
    good = [run for run in runs if "failed" not in run]
    if not good:
        return {"name": name, "failed": runs[0]["failed"]}
    best = max(good, key=lambda run: sum(run["tokens"]) / sum(run["seconds"]))
    seconds = sum(best["seconds"])
    operations = cost.cost(*(sum(best[name]) for name in ("tokens", "squares", "tiles", "targets")))
    rates = [sum(run["tokens"]) / sum(run["seconds"]) for run in good]
    return {
        "name": name,
        "tokens_per_second": sum(best["tokens"]) / seconds,
        "passes": [round(rate, 1) for rate in rates],
        "tiles_per_second": sum(best["tiles"]) / seconds,
        "padding": 1 - sum(best["tokens"]) / sum(best["slots"]),
        "p50": statistics.median(best["seconds"]),
        "p95": percentile(best["seconds"], 0.95),
        "memory_mb": best["memory_mb"],
        "mfu": operations / seconds / peak,
        "tokens_per_step": sum(best["tokens"]) / len(best["tokens"]),
        "data_wait": best.get("data_wait"),
        "fill": best.get("fill"),
        "imbalance": best.get("imbalance"),
        "best_steps": [min(times) for times in zip(*(run["seconds"] for run in good), strict=True)],
    }


def summary(
    head: dict[str, Any],
    gated: dict[str, Any],
    passes: dict[str, list[dict[str, Any]]],
    size: Any,
    titles: dict[str, str],
) -> dict[str, Any]:
    """All figures as JSON, and the table as ``text``."""
    if head.get("device") == "cpu":
        head = {**head, "peak_flops": max(head["peak_flops"], matmul_peak())}  # the machine's speed may have changed
    rows = {name: row(name, runs, CostModel(**gated["cost"]), head["peak_flops"]) for name, runs in passes.items()}
    if any((found.get("mfu") or 0.0) > 1 for found in rows.values()):  # a "peak" that training beats is none
        rows = {name: {**found, "mfu": None} for name, found in rows.items()}
    ours = rows.get("ours", {})
    figures: dict[str, Any] = {}
    lines = [
        "",
        *([MASTERS] if size.dtype == "bf16" else []),
        RULES.format(
            batch=size.batch, packs=size.packs, tokens=size.tokens, peak=head["peak_flops"], what=head["peak_is"]
        ),
        "",
        f"{'contender':<34}{'tokens/s':>9}{'ours is':>9}{'tiles/s':>8}{'padding':>8}{'p50 ms':>8}{'p95 ms':>8}"
        f"{'memory':>8}{'MFU':>7}{'wait':>7}",
    ]
    for name, found in rows.items():
        kind, _, per = name.partition(":")
        title = titles[kind] + (f", {per} rows" if per else "")
        if "failed" in found:
            lines.append(f"{title:<34}cannot run: {found['failed']}")
            continue
        if kind.startswith("ranks-"):
            figures[kind] = {"tokens_per_second": found["tokens_per_second"], "imbalance": found["imbalance"]}
            continue
        equal = kind in gated["equal"] or kind in ("bare", "bucketed")
        ratio = ours.get("tokens_per_second", 0.0) / found["tokens_per_second"]
        found["ours_is"] = ratio if equal and kind != "ours" else None
        shown = "" if kind == "ours" else f"{ratio:.2f}x" if equal else "leaks"
        mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
        wait = "" if found["data_wait"] is None else f"{found['data_wait']:.1%}"
        lines.append(
            f"{title:<34}{found['tokens_per_second']:>9.0f}{shown:>9}{found['tiles_per_second']:>8.1f}{found['padding']:>8.1%}"
            f"{found['p50'] * 1e3:>8.0f}{found['p95'] * 1e3:>8.0f}{found['memory_mb']:>8.0f}{mfu:>7}{wait:>7}"
        )
    if ours.get("fill"):
        figures["fill"] = ours["fill"]
        lines += ["", f"pack fill {ours['fill']:.1%} of the token budget, over the whole plan"]
    if "best_steps" in ours and "best_steps" in rows.get("bare", {}):
        overhead = sum(ours["best_steps"]) / sum(rows["bare"]["best_steps"]) - 1
        figures["overhead"] = overhead
        lines.append(
            f"loop overhead {overhead:+.1%}: each step's best time, ours over the bare loop on the same packs (ready in memory)"
        )
    for kind in ("padded", "bucketed", "trl"):
        best = [f["tokens_per_second"] for n, f in rows.items() if n.split(":")[0] == kind and "failed" not in f]
        if best and "tokens_per_second" in ours:
            figures[f"over_{kind}"] = ours["tokens_per_second"] / max(best)
            at_eight = rows.get(f"{kind}:8", {}).get("ours_is")
            figures[f"over_{kind}_8"] = at_eight
            lines.append(
                f"ours is {figures[f'over_{kind}']:.2f}x of {titles[kind]} at its best batch size"
                + (f", {at_eight:.2f}x at 8 rows, the batch of training.md C.1" if at_eight else "")
            )
    for kind in ("ranks-cost", "ranks-count"):
        if kind in figures:
            both = figures[kind]
            lines.append(
                f"{titles[kind]}: {both['tokens_per_second']:.0f} tokens/s, slowest rank {both['imbalance']:.3f}x of the mean cost"
            )
    return {**head, "gate": gated, "rows": rows, "figures": figures, "text": "\n".join(lines)}
