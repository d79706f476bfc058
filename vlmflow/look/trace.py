"""The way of one sample: from the row of a table to the reason it was kept, or to the reason it is not there.

A key names source and row (`web-00000301`), and pull cuts shards by row, so the shard is guessed from the key and only
when the guess fails the other indexes are searched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow import storage
from vlmflow.curation.pull_shard import read_failures
from vlmflow.errors import DataError, NotFound
from vlmflow.look import find
from vlmflow.look.samples import Samples

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import LayerPart, Lineage, Manifest
    from vlmflow.models.store import ModelRef


def trace(manifest: Manifest, key: str, scratch: Path) -> dict[str, Any]:
    """Everything that is known of a key: `found` is "sample" (see `of_sample`) or "failed" (see `of_failure`).

    Raises:
        DataError: the dataset has neither a sample nor a failed row of this key.
    """
    samples = Samples(manifest, scratch)
    order = _likely(manifest, key)
    for number in order[:1]:  # a failed row lies beside the shard that it would be in
        for found in (_sample(samples, number, key), _failure(manifest, number, key)):
            if found:
                return found
    for number in order[1:]:
        if found := _sample(samples, number, key):
            return found
    for number in order[1:]:
        if found := _failure(manifest, number, key):
            return found
    if found := _lost(manifest, key):
        return found
    source, row = split_key(key)
    raise DataError(
        f"dataset '{manifest.name}' has no sample and no failed row '{key}' among {manifest.samples} samples of sources "
        f"{', '.join(manifest.sources)}; keys are SOURCE-ROW with eight digits, such as {_first_key(samples)}."
        + (
            f" A row {row} of '{source}' was never in its table, or the dataset was cut."
            if source in manifest.sources
            else ""
        )
    )


def split_key(key: str) -> tuple[str, int | None]:
    """Source and row number of a sample key; None where it does not end in a number."""
    source, _, row = key.rpartition("-")
    return (source, int(row)) if source and row.isascii() and row.isdigit() else (key, None)


def of_sample(manifest: Manifest, shard: int, key: str, samples: Samples) -> dict[str, Any]:
    """A sample's row, URL, pictures, place, layers with their parameters, decision and lineage."""
    ref, meta = manifest.shards[shard], samples.meta(shard, key)
    layers: dict[str, dict[str, Any]] = {
        name: {
            "version": layer.version, "digest": layer.digest, "params": layer.params, "part": layer.parts[shard].uri,
            "row": layer_row(layer.parts[shard], key, samples.scratch),
        }
        for name, layer in manifest.layers.items()
    }  # fmt: skip
    keep = (layers.get("keep") or {}).get("row")
    return {
        "found": "sample",
        "key": key,
        "dataset": manifest.name,
        "manifest": manifest.digest,
        **_table_row(manifest, ref.source, key),
        "url": meta.get("url"),
        "fetched": meta.get("images", []),
        "shard": {"number": shard, "uri": ref.uri, "sha256": ref.sha256, "members": samples.members(shard, key)},
        "sample": meta,
        "layers": layers,
        "state": "undecided" if keep is None else "kept" if keep["keep"] else "dropped",
        "reason": keep["reason"] if keep else None,
        "lineage": [entry.model_dump(mode="json") for entry in manifest.lineage],
    }


def layer_row(part: LayerPart, key: str, scratch: Any) -> dict[str, Any] | None:
    """A sample's row of a layer's part; only that row becomes Python objects."""
    import pyarrow.compute as pc

    from vlmflow.dataset.layer import read_columns

    table = read_columns(part, scratch)
    kinds = json.loads((table.schema.metadata or {}).get(b"vlmflow.kinds", b"{}"))
    rows = table.filter(pc.equal(table.column("key"), key)).to_pylist()
    if not rows:
        return None
    return {
        name: json.loads(value) if name in kinds and value is not None else value
        for name, value in rows[0].items()
        if name != "key"
    }


def _sample(samples: Samples, shard: int, key: str) -> dict[str, Any] | None:
    return of_sample(samples.manifest, shard, key, samples) if key in samples.keys(shard) else None


def _failure(manifest: Manifest, shard: int, key: str) -> dict[str, Any] | None:
    ref = manifest.shards[shard]
    try:
        failures, _ = read_failures(ref)
    except NotFound:  # shards that pull did not make have no such file
        return None
    return of_failure(manifest, failures, key, ref.uri)


def of_failure(manifest: Manifest, failures: list[dict[str, Any]], key: str, shard_uri: str) -> dict[str, Any] | None:
    """A table row that became no sample: URL, reason and detail."""
    row = next((failure for failure in failures if failure["key"] == key), None)
    if row is None:
        return None
    return {
        "found": "failed",
        "key": key,
        "dataset": manifest.name,
        "manifest": manifest.digest,
        **_table_row(manifest, row["source"], key),
        "url": row["url"],
        "host": row["host"],
        "reason": row["reason"],
        "detail": row["detail"],
        "shard": {"uri": shard_uri},
        "lineage": [entry.model_dump(mode="json") for entry in manifest.lineage],
    }


def _lost(manifest: Manifest, key: str) -> dict[str, Any] | None:
    """A failed row of a shard in which every row failed: no manifest lists it, but its failures lie beside the others."""
    source, row = split_key(key)
    size = int((_pull(manifest) or {}).get("samples_per_shard") or 0)
    ref = next((shard for shard in manifest.shards if shard.source == source), None)
    if row is None or not size or ref is None:
        return None
    folder = ref.uri.rpartition("/")[0]
    ending = f"-{row // size:05d}.failures.parquet"
    for entry in storage.list_uris(folder):
        if entry.uri.endswith(ending) and entry.uri.rpartition("/")[2].startswith(f"{source}-"):
            shard_uri = entry.uri.removesuffix(".failures.parquet") + ".tar"
            failures, _ = read_failures(shard_uri)
            if found := of_failure(manifest, failures, key, shard_uri):
                return found
    return None


def _pull(manifest: Manifest) -> dict[str, Any] | None:
    entry: Lineage | None = next((e for e in manifest.lineage if e.step == "pull"), None)
    return entry.params if entry else None


def _table_row(manifest: Manifest, source: str, key: str) -> dict[str, Any]:
    tables = (_pull(manifest) or {}).get("tables") or {}
    return {"source": source, "table": tables.get(source), "row": split_key(key)[1]}


def _likely(manifest: Manifest, key: str) -> list[int]:
    """Shard numbers, the one that pull would have put the key into first, then those of its source."""
    source, row = split_key(key)
    size = int((_pull(manifest) or {}).get("samples_per_shard") or 0)
    ending = f"-{row // size:05d}.tar" if row is not None and size else None

    def rank(number: int) -> tuple[bool, bool, int]:
        ref = manifest.shards[number]
        mine = ref.source == source
        return (not (mine and ending is not None and ref.uri.endswith(ending)), not mine, number)

    return sorted(range(len(manifest.shards)), key=rank)


def _first_key(samples: Samples) -> str:
    return next((samples.keys(number)[0] for number, ref in enumerate(samples.manifest.shards) if ref.samples), "none")


# --- for the command -------------------------------------------------------------------------------------------------


@contextmanager
def datasets(dataset: str | None, model: str | None, state: Path) -> Iterator[list[Manifest]]:
    """The dataset that was named, or those that a model was trained on, readable inside the context.

    Raises:
        DataError: the store holds none of the model's manifests.
    """
    if dataset is not None:
        with find.opened([dataset], state) as found:
            yield found
        return
    from vlmflow.registry import address

    with find.store(state, model or ""):
        ref = address.find(model or "")
        found = of_model(ref)
        if not found:
            raise DataError(
                f"model '{ref.name}' and those it came from name manifests of data of which none lies in {_root(ref)}/manifests: they may have "
                "been deleted. Name the dataset itself."
            )
        yield found


def of_model(ref: ModelRef) -> list[Manifest]:
    """The manifests that the lineages of a model and of all models it came from name, as far as they lie in its store."""
    from types import SimpleNamespace

    from vlmflow import ports

    data = list(dict.fromkeys(digest for model in _line(ref) for digest in model.lineage.data))
    whole = ref.model_copy(update={"lineage": ref.lineage.model_copy(update={"data": data})})
    return list(ports.manifests_of(SimpleNamespace(root=_root(ref)), whole).values())  # type: ignore[arg-type]


def _line(ref: ModelRef) -> list[ModelRef]:
    """A model and those it came from, stage by stage, as far as they lie in its store; a lineage names parents by their weights."""
    from vlmflow.models.store import load_ref

    known: dict[str, list[ModelRef]] = {}
    if ref.lineage.parents:
        for item in storage.list_uris(storage.join(_root(ref), "models")):
            if item.uri.endswith("/model.json"):
                model = load_ref(item.uri)
                known.setdefault(model.weights_sha256, []).append(model)
    line, seen, asked = [ref], {ref.weights_sha256}, list(ref.lineage.parents)
    while asked:
        if (sha := asked.pop()) not in seen:
            seen.add(sha)
            line += (found := known.get(sha, []))
            asked += [parent for model in found for parent in model.lineage.parents]
    return line


def _root(ref: ModelRef) -> str:
    return ref.uri.rpartition("/models/")[0] or ref.uri


def among(manifests: Sequence[Manifest], key: str, scratch: Path) -> dict[str, Any]:
    """`trace` in the first of several datasets that knows the key. Raises DataError when none does."""
    told: list[str] = []
    mine = split_key(key)[0]
    for manifest in sorted(manifests, key=lambda m: mine not in m.sources):
        try:
            return trace(manifest, key, scratch)
        except DataError as error:
            told.append(str(error))
    raise DataError(" ".join(told))


def picture(manifests: Sequence[Manifest], found: dict[str, Any], scratch: Path) -> bytes:
    """The first picture of a traced sample. Raises DataError when there is none."""
    manifest = next(m for m in manifests if m.digest == found["manifest"])
    images = (
        Samples(manifest, scratch).images(found["shard"]["number"], found["key"]) if found["found"] == "sample" else ()
    )
    if not images:
        why = f"it failed: {found['reason']}" if found["found"] == "failed" else "it is text alone"
        raise DataError(f"{found['key']} has no picture to write: {why}")
    return images[0]


def as_text(found: dict[str, Any]) -> str:
    """A trace for a terminal."""
    rows: list[tuple[str, Any]] = [("dataset", f"{found['dataset']}  {found['manifest']}")]
    table = found["table"] or "(its name is not recorded)"
    rows += [("table", f"{table}, source {found['source']}, row {found['row']}"), ("url", found["url"])]
    if found["found"] == "failed":
        rows += [("failed", f"{found['reason']}: {found['detail']}"), ("beside", found["shard"]["uri"])]
    else:
        for image in found["fetched"]:
            kind = f"{image.get('width')}x{image.get('height')} {image.get('format')}"
            rows.append(("image", f"{kind}, sha256 {image.get('sha256')}"))
        rows.append(("shard", f"{found['shard']['uri']}  sha256 {found['shard']['sha256']}"))
        rows += [
            ("member", f"{name}: {length} bytes at {offset}")
            for name, (offset, length) in found["shard"]["members"].items()
        ]
        for name in ("text", "conversations", "preferences", "licence"):
            if name in found["sample"]:
                rows.append((name, found["sample"][name]))
        for name, layer in found["layers"].items():
            values = {k: v for k, v in (layer["row"] or {}).items() if v is not None}
            rows += [
                (f"layer {name}", values),
                ("", {"version": layer["version"], "params": layer["params"], "digest": layer["digest"][:24]}),
            ]
        rows.append((found["state"], found["reason"]))
    rows += [
        ("made by", f"{e['step']} from {', '.join(p[:12] for p in e['parents']) or 'its tables'}")
        for e in found["lineage"]
    ]
    head = "not in the dataset" if found["found"] == "failed" else found["state"]
    wide = max(len(name) for name, _ in rows) + 2
    return "\n".join(
        [f"{found['key']}: {head}", *(f"  {name:<{wide}}{_shown(value)}" for name, value in rows if value is not None)]
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(c if c.isprintable() else " " for c in text)  # no text of a stranger moves the cursor
    return text if len(text) < 600 else text[:600] + " ..."
