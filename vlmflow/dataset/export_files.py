"""The two kinds of files an export writes: WebDataset tars and Parquet with Hugging Face's image features."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from vlmflow.dataset.sample import IMAGE_EXTENSIONS, Sample
from vlmflow.digest import canonical

ROWS, BYTES = 100, 64 << 20  # of one row group: few enough that a viewer shows the first rows quickly
Columns = Mapping[str, Any]  # layer -> its Arrow fields
Write = Callable[[BinaryIO, Iterable["Item"], Columns, bool], None]


class Item(NamedTuple):
    """A sample, its rows of the chosen layers by layer, and its caption."""

    sample: Sample
    layers: dict[str, dict[str, Any]]
    caption: str | None


@dataclass(frozen=True)
class Format:
    """How files are called, and written: (file, items, columns of layers, whether samples have several images)."""

    name: Callable[[str, int, int], str]
    write: Write


def _write_tar(file: BinaryIO, items: Iterable[Item], columns: Columns, several: bool) -> None:
    """KEY.jpg (KEY.0.jpg, ... for several), KEY.json with the layers' rows merged in, KEY.txt with the caption."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample, layers, caption in items:
            members: list[tuple[str, bytes]] = []
            for number, (data, about) in enumerate(zip(sample.images, sample.meta.get("images", []), strict=True)):
                extension = IMAGE_EXTENSIONS[about["format"]]
                members.append((extension if len(sample.images) == 1 else f"{number}.{extension}", data))
            members.append(("json", canonical({**sample.meta, "key": sample.key, **layers})))
            if caption is not None:
                members.append(("txt", caption.encode()))
            for name, data in members:
                entry = tarfile.TarInfo(f"{sample.key}.{name}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def _write_parquet(file: BinaryIO, items: Iterable[Item], columns: Columns, several: bool) -> None:
    """Row groups of at most `ROWS` samples and about `BYTES` bytes of images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(columns, several)
    column = "images" if several else "image"
    # images are compressed already
    compression = {name: "none" if name.startswith(column) else "zstd" for name in _leaves(schema)}
    with pq.ParquetWriter(file, schema, compression=compression, use_dictionary=False) as writer:
        rows: list[dict[str, Any]] = []
        held = 0
        for item in items:
            rows.append(_row(item, column, several))
            held += sum(map(len, item.sample.images))
            if len(rows) >= ROWS or held >= BYTES:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows, held = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _row(item: Item, column: str, several: bool) -> dict[str, Any]:
    sample, layers, caption = item
    meta = sample.meta
    images = [
        {"bytes": data, "path": f"{sample.key}.{number}.{IMAGE_EXTENSIONS[about['format']]}"}
        for number, (data, about) in enumerate(zip(sample.images, meta.get("images", []), strict=True))
    ]
    row = {name: meta.get(name) for name in ("id", "url", "source", "text", "conversations", "preferences", "licence")}
    row |= {"key": sample.key, column: images if several else next(iter(images), None), "caption": caption}
    row["extra"] = json.dumps(meta["extra"], ensure_ascii=False, sort_keys=True) if "extra" in meta else None
    for layer, values in layers.items():
        for name, value in values.items():
            held = (
                value
                if not isinstance(value, dict | list) or _plain_list(value)
                else json.dumps(value, ensure_ascii=False, sort_keys=True)
            )
            row[f"{layer}_{name}"] = held
    return row


def _plain_list(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)


def _schema(columns: Columns, several: bool) -> Any:
    import pyarrow as pa

    text = pa.string()
    image = pa.struct([("bytes", pa.binary()), ("path", text)])
    turns = pa.list_(pa.struct([("from", text), ("value", text)]))
    pairs = pa.list_(pa.struct([("conversations", turns), ("chosen", text), ("rejected", text)]))
    fields = [
        ("key", text),
        ("images", pa.list_(image)) if several else ("image", image),
        ("caption", text),
        ("text", text),
        ("conversations", turns),
        ("preferences", pairs),
        ("id", text),
        ("url", text),
        ("source", text),
        ("licence", text),
        ("extra", text),
    ]
    fields += [(f"{layer}_{field.name}", field.type) for layer, found in columns.items() for field in found]
    feature: Any = [{"_type": "Image"}] if several else {"_type": "Image"}
    about = {"info": {"features": {"images" if several else "image": feature}}}
    return pa.schema(fields, metadata={"huggingface": json.dumps(about)})


def _leaves(schema: Any) -> list[str]:
    """Paths of the Parquet columns of a schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([], schema=schema), out)
    found = pq.ParquetFile(out).schema
    return [found.column(i).path for i in range(len(found))]


FORMATS = {
    "webdataset": Format(lambda name, number, total: f"{name}-{number:05d}.tar", _write_tar),
    "parquet": Format(lambda name, number, total: f"data/train-{number:05d}-of-{total:05d}.parquet", _write_parquet),
}
