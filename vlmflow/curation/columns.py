"""Layers as columns: what steps over all shards at once read, a million rows in some tens of megabytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmflow.curation.words import number, wording
from vlmflow.dataset.layer import read_columns
from vlmflow.errors import DataError

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest


def stacked(manifest: Manifest, layer: str, scratch: Any, columns: Iterable[str]) -> Any:
    """Some columns of a layer over all shards as one pyarrow Table, in dataset order; keys as large strings.

    Raises:
        DataError: the layer or a column is missing.
    """
    import pyarrow as pa

    names = list(columns)
    tables = [read_columns(part, scratch, names) for part in manifest.layer(layer).parts]
    if not tables:
        raise DataError(f"dataset '{manifest.name}' has no shards, so there is nothing to compare. Pull it first.")
    table = pa.concat_tables(tables).combine_chunks()
    if "key" in names:
        table = table.set_column(names.index("key"), "key", table["key"].cast(pa.large_string()))
    return table


def column(values: Any) -> Any:
    """A chunked column as one pyarrow array."""
    import pyarrow as pa

    whole = values.combine_chunks()
    return whole if isinstance(whole, pa.Array) else pa.concat_arrays(whole.chunks)


def numbers(values: Any) -> np.ndarray:
    """A column of integers, (n,) int64, nulls as 0."""
    import pyarrow.compute as pc

    return column(pc.fill_null(values, 0)).to_numpy(zero_copy_only=False)


def text_numbers(manifest: Manifest, which: str, hashes: Any, scratch: Any) -> np.ndarray:
    """Digest of each sample's text, (n,) int64, 0 where it has none. `hashes` is layer `phash`, which knows the alt texts.

    Raises:
        DataError: the layer of that text is missing.
    """
    if which == "alt":
        return numbers(hashes["text"])
    table = stacked(manifest, which, scratch, ["text", "error"])
    texts, errors = table["text"].to_pylist(), table["error"].to_pylist()
    pairs = zip(texts, errors, strict=True)
    found = (number(wording([text])) if text and text.strip() and not error else 0 for text, error in pairs)
    return np.fromiter(found, dtype=np.int64, count=len(texts))


def one_of_each(keys: Any, dataset: str) -> Any:
    """A column of keys as one array. Raises DataError when two samples share one: keys decide ties and name samples."""
    from collections import Counter

    import pyarrow.compute as pc

    keys = column(keys)
    if pc.count_distinct(keys).as_py() != len(keys):
        key, n = Counter(keys.to_pylist()).most_common(1)[0]
        raise DataError(
            f"dataset '{dataset}': key '{key}' stands in {n} shards; keys decide ties and must be unique. Pull it again."
        )
    return keys
