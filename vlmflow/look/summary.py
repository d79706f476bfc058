"""What a dataset holds, from its manifest and the reasons of what failed; no sample is read."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow.dataset.layer import failures
from vlmflow.look.sql import NUMBER

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest


def facts(manifest: Manifest, scratch: Path) -> dict[str, Any]:
    """Name, digest, samples; by source shards, samples and bytes; layers; failures by step and reason; lineage."""
    return {
        "name": manifest.name,
        "digest": manifest.digest,
        "samples": manifest.samples,
        "sources": sources(manifest),
        "layers": {name: {"digest": layer.digest, "summary": layer.summary} for name, layer in manifest.layers.items()},
        "failures": failed(manifest, scratch),
        "lineage": [entry.model_dump(mode="json") for entry in manifest.lineage],
    }


def sources(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Shards, samples and bytes of each source."""
    found: dict[str, dict[str, int]] = {}
    for shard in manifest.shards:
        total = found.setdefault(shard.source, {"shards": 0, "samples": 0, "bytes": 0})
        total["shards"] += 1
        total["samples"] += shard.samples
        total["bytes"] += shard.bytes
    return found


def failed(manifest: Manifest, scratch: Path) -> dict[str, dict[str, int]]:
    """Counts by reason of what failed in pull and in each layer; reasons that differ in numbers alone are one.

    Parts without failures are not read.
    """
    found: dict[str, dict[str, int]] = {}
    for entry in manifest.lineage:
        if entry.step == "pull" and (reasons := entry.summary.get("failed_by_reason")):
            found["pull"] = dict(Counter(reasons).most_common())
    for name in manifest.layers:
        if counted := Counter(re.sub(NUMBER, "#", reason) for _, reason in failures(manifest, name, scratch)):
            found[name] = dict(counted.most_common())
    return found


def as_text(shown: dict[str, Any]) -> str:
    """The facts for a terminal."""
    lines = [f"{shown['name']}  {shown['samples']} samples  {shown['digest']}"]
    for name, total in shown["sources"].items():
        size = total["bytes"] / 2**20
        lines.append(f"  source {name:<16}{total['samples']:>9} samples {total['shards']:>6} shards {size:>10.1f} MiB")
    for name, layer in shown["layers"].items():
        lines.append(
            f"  layer  {name:<16}{layer['digest'][:12]}  {json.dumps(layer['summary'], ensure_ascii=False)[:160]}"
        )
    for name, reasons in shown["failures"].items():
        lines += [f"  failed {name:<16}{number:>9} x {_line(reason)}" for reason, number in list(reasons.items())[:10]]
        if len(reasons) > 10:
            lines.append(
                f"  failed {name:<16}{sum(list(reasons.values())[10:]):>9} x {len(reasons) - 10} other reasons"
            )
    for entry in shown["lineage"]:
        lines.append(f"  made by {entry['step']} from {[p[:12] for p in entry['parents']]}")
    return "\n".join(lines)


def _line(text: str) -> str:
    return " ".join(text.split())[:160]
