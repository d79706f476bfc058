"""A dataset for other tools: a merged WebDataset, or Parquet as the Hugging Face Hub shows it.

Shards and layers stay apart inside vlmflow; other tools want one thing with everything in it. Output files are planned
before anything is read (which samples of which shards), so each is written whole or not at all, one after the other in
bounded memory, and an export that was stopped goes on with the file that is missing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from vlmflow import storage
from vlmflow.dataset.export_files import FORMATS, Item, Write
from vlmflow.dataset.layer import read_columns
from vlmflow.dataset.manifest import Manifest
from vlmflow.dataset.shard import ShardReader
from vlmflow.dataset.window import LeasedShard, Window
from vlmflow.errors import DataError
from vlmflow.storage_file import translated, write_atomically

RECORD = "export.json"
VERSION = 1  # raise when the same request would give other files
ALT = "alt"


@dataclass(frozen=True)
class Exported:
    """What an export wrote: files (uri, samples, bytes) in order; `found` of them were there from an earlier attempt."""

    uri: str
    form: str
    samples: int
    dropped: int
    files: list[dict[str, Any]]
    found: int


@dataclass
class _File:
    """A file to be: (position of a shard, first, last) of the chosen samples of each shard that go into it."""

    name: str
    spans: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(last - first for _, first, last in self.spans)


def export(
    manifest: Manifest,
    out: str,
    form: str = "webdataset",
    *,
    layers: Sequence[str] = (),
    kept_only: bool = False,
    caption: str | None = None,
    samples_per_file: int = 1000,
    scratch: str | Path | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> Exported:
    """Write a dataset with chosen layers to a folder of its own (a path, file:// or s3://).

    Args:
        form: ``webdataset`` (KEY.jpg, KEY.json with each layer's row under the layer's name, KEY.txt with the caption) or
            ``parquet`` (columns ``image`` or ``images`` as Hugging Face Image features, the fields of KEY.json, and
            LAYER_COLUMN for each column of each layer).
        layers: to be merged in. kept_only: only samples that layer `keep` keeps.
        caption: the text that tools for image-text pairs read: ``alt``, or a layer with a column ``text`` (``fused``, ...).
        samples_per_file: of every file but the last.
        advance: told how many samples were written, or were there already.

    Raises:
        DataError: an unknown form or layer; a folder that holds anything else than this very export, unfinished or not.
    """
    out = str(local.absolute()) if (local := storage.local_path(out)) is not None else str(out).rstrip("/")
    scratch = Path(scratch or storage.default_scratch())
    _check(manifest, form, layers, kept_only, caption, samples_per_file)
    counts, several = _counts(manifest, kept_only, scratch)
    plan = _plan(manifest.name, form, counts, samples_per_file)
    asked = {
        "version": VERSION,
        "dataset": manifest.name,
        "manifest": manifest.digest,
        "form": form,
        "layers": sorted(layers),
        "kept_only": kept_only,
        "caption": caption,
        "samples_per_file": samples_per_file,
    }
    there = _begin(out, asked)
    files, found = [], 0
    with ExitStack() as stack:
        source = _Source(manifest, layers, kept_only, caption, scratch, stack)
        for file in plan:
            uri = storage.join(out, file.name)
            if uri not in there:
                _put(uri, scratch, FORMATS[form].write, source.items(file), source.columns, several)
            found += uri in there
            files.append({"file": file.name, "samples": file.samples, "bytes": storage.size(uri)})
            advance(file.samples)
    samples = sum(counts)
    storage.write_json(storage.join(out, RECORD), {**asked, "samples": samples, "files": files, "finished": True})
    return Exported(out, form, samples, manifest.samples - samples, files, found)


def _check(
    manifest: Manifest, form: str, layers: Sequence[str], kept_only: bool, caption: str | None, size: int
) -> None:
    if form not in FORMATS:
        raise DataError(f"form '{form}' is not known; use one of {sorted(FORMATS)}")
    if size < 1:
        raise DataError(f"samples_per_file is {size}; it must be at least 1")
    for name in (*layers, *(["keep"] if kept_only else []), *([caption] if caption not in (None, ALT) else [])):
        manifest.layer(name)


def _counts(manifest: Manifest, kept_only: bool, scratch: Path) -> tuple[list[int], bool]:
    """Samples to write of each shard, and whether any sample of the dataset has several images."""
    counts, several = [], False
    for position, shard in enumerate(manifest.shards):
        reader = ShardReader(shard, scratch)
        several = several or any(len(members) > 2 for members in reader.index.values())
        counts.append(len(_keys(manifest, position, reader, kept_only, scratch)))
    if not sum(counts):
        raise DataError(
            f"dataset '{manifest.name}' has nothing to export: {manifest.samples} samples"
            + (", all of them dropped by layer keep" if kept_only else "")
        )
    return counts, several


def _keys(manifest: Manifest, position: int, reader: ShardReader, kept_only: bool, scratch: Path) -> list[str]:
    """Keys of a shard's samples to write, in order."""
    if not kept_only:
        return reader.keys()
    table = read_columns(manifest.layer("keep").parts[position], scratch, ["key", "keep"])
    return [key for key, keep in zip(table["key"].to_pylist(), table["keep"].to_pylist(), strict=True) if keep]


def _plan(name: str, form: str, counts: list[int], size: int) -> list[_File]:
    """Files of `size` samples each, the last one smaller."""
    total = -(-sum(counts) // size)
    files = [_File(FORMATS[form].name(name, number, total)) for number in range(total)]
    done = 0
    for position, count in enumerate(counts):
        first = 0
        while first < count:
            last = min(count, first + size - done % size)
            files[done // size].spans.append((position, first, last))
            done, first = done + last - first, last
    return files


def _begin(out: str, asked: dict[str, Any]) -> set[str]:
    """URIs that an earlier attempt at the same export wrote. Raises DataError when the folder holds anything else."""
    objects = {item.uri for item in storage.list_uris(out)}
    record = storage.join(out, RECORD)
    if not objects:
        storage.write_json(record, asked)
        return set()
    known = storage.read_json(record) if record in objects else None
    if known is None:
        raise DataError(
            f"{out} holds {len(objects)} files that no export wrote, e.g. {min(objects)}; nothing is overwritten. Name an empty folder."
        )
    different = sorted(name for name, value in asked.items() if known.get(name) != value)
    if different:
        raise DataError(
            f"{out} holds another export: {', '.join(f'{n} {known.get(n)!r} instead of {asked[n]!r}' for n in different)}. "
            "Nothing is overwritten; name an empty folder, or delete that one."
        )
    return objects


def _put(
    uri: str, scratch: Path, write: Write, items: Iterator[Item], columns: Mapping[str, Any], several: bool
) -> None:
    """Write an object whole or not at all; to a store by way of a file in scratch."""
    target = storage.local_path(uri)
    if target is not None:
        with translated(uri, writing=0):
            write_atomically(target, lambda file: write(file, items, columns, several))
        return
    with tempfile.NamedTemporaryFile(dir=scratch, prefix="export-") as file:
        write(cast(BinaryIO, file), items, columns, several)
        file.flush()
        storage.put_file(file.name, uri)


class _Source:
    """Samples of the dataset with the rows of the chosen layers, shard by shard."""

    def __init__(
        self,
        manifest: Manifest,
        layers: Sequence[str],
        kept_only: bool,
        caption: str | None,
        scratch: Path,
        stack: ExitStack,
    ) -> None:
        self.manifest, self.layers, self.kept_only, self.caption = manifest, sorted(layers), kept_only, caption
        self.scratch = scratch
        self._window = Window(scratch / "shards")
        stack.callback(self._window.close)
        self.columns = {name: self._schema(name) for name in self.layers}

    def _schema(self, name: str) -> Any:
        """Arrow fields of a layer without its key."""
        parts = self.manifest.layer(name).parts
        schema = read_columns(parts[0], self.scratch).schema
        return [field for field in schema if field.name != "key"]

    def items(self, file: _File) -> Iterator[Item]:
        """Samples of a file, in order."""
        wanted = {*self.layers, *([self.caption] if self.caption and self.caption != ALT else [])}
        for position, first, last in file.spans:
            shard = self.manifest.shards[position]
            lease = self._window.lease(shard)
            try:
                reader = LeasedShard(shard, lease, self.scratch)
                keys = _keys(self.manifest, position, reader, self.kept_only, self.scratch)[first:last]
                rows = {name: self._rows(name, position, set(keys)) for name in wanted}
                for key in keys:
                    sample = reader.read(key)
                    about = sample.meta if self.caption == ALT else rows[self.caption][key] if self.caption else {}
                    yield Item(sample, {name: rows[name][key] for name in self.layers}, about.get("text"))
            finally:
                lease.release()

    def _rows(self, name: str, position: int, keys: set[str]) -> dict[str, dict[str, Any]]:
        table = read_columns(self.manifest.layer(name).parts[position], self.scratch)
        kinds = json.loads((table.schema.metadata or {}).get(b"vlmflow.kinds", b"{}"))
        found = {}
        for row in table.to_pylist():
            key = row.pop("key")
            if key in keys:
                found[key] = {n: json.loads(v) if n in kinds and v is not None else v for n, v in row.items()}
        return found
