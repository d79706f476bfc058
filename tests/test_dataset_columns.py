"""Layers of many rows: columns in and out, parts that prove themselves, and parts of older versions."""

import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from curation_world import context, dataset, sample

from vlmflow import storage
from vlmflow.dataset import layer as layers
from vlmflow.dataset import part as parts
from vlmflow.dataset.shard import ShardReader
from vlmflow.digest import sha256_bytes
from vlmflow.errors import DataError

SCHEMA = {"n": "int", "tags": "list<str>", "spans": "list<int64>", "about": "json"}


@pytest.fixture
def data(tmp_path):
    return dataset(tmp_path / "shards", [sample(f"s{i:03d}", "text", None) for i in range(10)], per_shard=4)


def row(key):
    n = int(key[1:])
    return {"key": key, "n": n, "tags": [key] * (n % 3), "spans": [2**40 + n], "about": {"b": n, "a": None}}


def tables(manifest, **changed):
    for shard in manifest.shards:
        rows = [row(key) for key in ShardReader(shard).keys()]
        columns = {name: [r[name] for r in rows] for name in ("key", "n", "tags", "spans")}
        columns["about"] = [json.dumps(r["about"], sort_keys=True) for r in rows]
        yield pa.table({**columns, **{name: make(rows) for name, make in changed.items()}})


def seal(folder, manifest, tables, **more):
    given = {"params": {"p": 1}, "version": 1, "schema": SCHEMA, **more}
    return layers.seal_columns(context(folder), manifest, "x", parts=tables, **given)


def test_columns_give_the_bytes_that_rows_give(tmp_path, data):
    made = seal(tmp_path, data, tables(data), summary=lambda m: {"rows": sum(p.rows for p in m.layer("x").parts)})
    written = {part.uri: storage.read_bytes(part.uri) for part in made.layers["x"].parts}
    rows = {key: row(key) for shard in data.shards for key in ShardReader(shard).keys()}
    for shard, part in zip(data.shards, made.layers["x"].parts, strict=True):
        same = layers.write_part(str(tmp_path / "rows"), [rows[key] for key in ShardReader(shard).keys()], SCHEMA)
        assert same == part.model_copy(update={"uri": same.uri})
        assert storage.read_bytes(same.uri) == written[part.uri]
    assert made.layers["x"].summary == {"rows": 10}
    assert layers.read_layer(made, "x") == {key: {**r, "error": None} for key, r in rows.items()}
    sliced = (pa.concat_tables([t.slice(0, 1), t.slice(1)]) for t in tables(data))  # in pieces: the same bytes
    assert seal(tmp_path, data, sliced, summary={"rows": 10}) == made


def test_only_the_asked_columns_are_read(tmp_path, data):
    part = seal(tmp_path, data, tables(data)).layers["x"].parts[1]
    assert layers.read_columns(part).column_names == ["key", "n", "tags", "spans", "about", "error"]
    table = layers.read_columns(part, columns=["n", "key"])
    assert table.to_pydict() == {"n": [4, 5, 6, 7], "key": ["s004", "s005", "s006", "s007"]}
    with pytest.raises(DataError, match=r"no columns \['colour'\]; it has \['key', 'n'"):
        layers.read_columns(part, columns=["key", "colour"])
    storage.write_bytes(part.uri, storage.read_bytes(part.uri)[:-1])
    with pytest.raises(DataError, match="changed or cut"):
        layers.read_columns(part, columns=["n"])


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        (
            {"key": lambda rows: ["s999", *(r["key"] for r in rows[1:])]},
            "1 of 4 samples have no row, the first is 's000'",
        ),
        ({"key": lambda rows: [r["key"] for r in reversed(rows)]}, "another order"),
        ({"n": lambda rows: [1.5] * len(rows)}, "does not fit the layer's schema"),
        ({"colour": lambda rows: ["red"] * len(rows)}, r"columns \['colour'\] that the layer's schema lacks"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, data, changed, error):
    with pytest.raises(DataError, match=error):
        seal(tmp_path, data, tables(data, **changed))
    assert not storage.list_uris(str(tmp_path / "root" / "manifests"))


def test_a_table_too_few_or_too_many_is_a_defect_of_the_step(tmp_path, data):
    made = list(tables(data))
    with pytest.raises(DataError, match="2 Tables for 3 shards"):
        seal(tmp_path, data, made[:2])
    with pytest.raises(DataError, match="more Tables than the 3 shards"):
        seal(tmp_path, data, [*made, made[0]])


def test_failed_rows_are_counted_and_listed(tmp_path, data):
    errors = {"error": lambda rows: ["" if r["n"] == 5 else "bad" if r["n"] % 4 == 2 else None for r in rows]}
    made = seal(tmp_path, data, tables(data, **errors))
    assert [part.failed for part in made.layers["x"].parts] == [1, 1, 0]
    assert list(layers.failures(made, "x")) == [("s002", "bad"), ("s006", "bad")]


def test_a_part_with_any_byte_changed_is_not_found(tmp_path):
    uri = str(tmp_path / "part.parquet")
    made = parts.write_part(uri, [row(f"s{i:03d}") for i in range(50)], SCHEMA)
    data = storage.read_bytes(uri)
    assert parts.find_part(uri, 50) == made
    for place in random.Random(7).sample(range(len(data)), 60):
        Path(uri).write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        assert parts.find_part(uri, 50) is None, place
        assert not storage.exists(uri), "removed, so that it is made again"
    Path(uri).write_bytes(data)
    assert parts.find_part(uri, 49) is None, "another shard's"
    assert parts.find_part(uri, 50) is None, "nothing is there"


def test_a_part_written_before_files_were_hashed_is_found_as_it_is(tmp_path):
    """Its rows carry their own hash: what was paid for is not computed again after an upgrade."""
    uri = str(tmp_path / "part.parquet")

    def write(text):
        table = parts.from_rows([{**row("s001"), "error": text}], SCHEMA, uri)
        rows = sha256_bytes(json.dumps(table.to_pylist(), sort_keys=True, ensure_ascii=False).encode()).encode()
        if text:
            rows = rows[::-1]
        buffer = io.BytesIO()
        table = table.replace_schema_metadata({**table.schema.metadata, b"vlmflow.rows.sha256": rows})
        pq.write_table(table, buffer, compression="zstd")
        storage.write_bytes(uri, buffer.getvalue())

    write(None)
    found = parts.find_part(uri, 1)
    assert found and found.sha256 == sha256_bytes(storage.read_bytes(uri))
    assert layers.read_part(found)["s001"]["about"] == {"a": None, "b": 1}
    write("other rows than the hash says")
    assert parts.find_part(uri, 1) is None


def test_values_of_another_type_and_unknown_columns_are_named(tmp_path):
    with pytest.raises(DataError, match="does not have its column's type"):
        parts.write_part(str(tmp_path / "p"), [{"key": "a", "n": "many"}], SCHEMA)
    with pytest.raises(DataError, match=r"row 'a' has columns \['m'\]"):
        parts.write_part(str(tmp_path / "p"), [{"key": "a", "m": 1}], SCHEMA)
    with pytest.raises(DataError, match="'list<pictures>'"):
        parts.write_part(str(tmp_path / "p"), [], {"n": "list<pictures>"})
    assert list(tmp_path.iterdir()) == []
