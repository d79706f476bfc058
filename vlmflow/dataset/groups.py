"""Groups of shards: what each task of a fan-out works on.

A group is a run of neighbouring shards, named by the hashes of its first and last. Layers are found per shard by digest,
so the result is the same whatever the grouping: a step over a group writes parts, the same step over all shards finds
them and seals the manifest (DESIGN 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmflow.dataset.manifest import Manifest
from vlmflow.errors import DataError


def deal(manifest: Manifest, count: int) -> list[dict[str, Any]]:
    """At most `count` groups that hold every shard once, in order, sizes differing by one at most.

    Returns:
        `name` ("1", "2", ...), `first` and `last` (shard hashes, "" in the one group of an empty dataset) and `shards`
        (how many). Never empty: gathering the outputs of an empty loop crashes kfp.local (platform.md 1.2, L6).
    """
    total = len(manifest.shards)
    count = max(1, min(int(count), total))
    groups = []
    for index in range(count):
        members = manifest.shards[index * total // count : (index + 1) * total // count]
        ends = (members[0].sha256, members[-1].sha256) if members else ("", "")
        groups.append({"name": str(index + 1), "first": ends[0], "last": ends[1], "shards": len(members)})
    return groups


def cut(manifest: Manifest, group: Mapping[str, Any]) -> Manifest:
    """The group's part of a dataset, with the layers that it has; of a part that was cut before, all of it.

    Raises:
        DataError: the dataset is another one than the groups were made of.
    """
    wanted = int(group["shards"])
    hashes = [shard.sha256 for shard in manifest.shards]
    if not wanted:
        first = 0
    elif group["first"] in hashes:
        first = hashes.index(group["first"])
    else:
        first = -1
    if first < 0 or (wanted and hashes[first : first + wanted][-1] != group["last"]):
        raise DataError(
            f"dataset '{manifest.name}' ({len(hashes)} shards) does not hold group {group['name']}: {wanted} shards from "
            f"{str(group['first'])[:12]} to {str(group['last'])[:12]}. The groups were made of another dataset; run the pipeline again."
        )
    chosen = slice(first, first + wanted)
    layers = {name: layer.model_copy(update={"parts": layer.parts[chosen]}) for name, layer in manifest.layers.items()}
    return manifest.model_copy(update={"shards": manifest.shards[chosen], "layers": layers})


def check_whole(manifest: Manifest, parts: list[Manifest]) -> None:
    """Raise DataError unless every shard of the dataset stands in a part, as often as in the dataset."""
    have = sorted(shard.sha256 for part in parts for shard in part.shards)
    want = sorted(shard.sha256 for shard in manifest.shards)
    if have != want:
        raise DataError(
            f"dataset '{manifest.name}' has {len(want)} shards, its {len(parts)} groups hold {len(have)}, {len(set(want) - set(have))} "
            "are missing: sealing would compute them in one task. Run the pipeline again; finished shards are found."
        )
