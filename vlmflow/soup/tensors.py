"""Safetensors files as byte ranges: a soup reads weights a block at a time, whatever the size of the model.

The format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, data_offsets), then the data
without gaps. Reading it here, instead of through a library, gives bounded memory and a check that a file is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from vlmflow.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
EXACT = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file name, dtype (safetensors name), shape, first byte in the file, bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass
class Weights:
    """All tensors of a model folder in file order, from one file or from the shards of an index. Close after use."""

    folder: Path
    files: list[str]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, dict[str, str]]
    _open: dict[str, BinaryIO] = field(default_factory=dict)

    def read(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes of a tensor from `offset`. Raises ModelError when the file ends before."""
        info = self.tensors[name]
        if info.file not in self._open:
            self._open[info.file] = open(self.folder / info.file, "rb")  # noqa: SIM115
        data = os.pread(self._open[info.file].fileno(), length, info.start + offset)
        if len(data) != length:
            raise ModelError(
                f"{self.folder / info.file}: tensor {name} ended after {offset + len(data)} of {info.nbytes} bytes"
            )
        return data

    def will_need(self, name: str) -> None:
        """Ask the system to read a tensor ahead (no effect where that is not supported)."""
        info = self.tensors[name]
        if hasattr(os, "posix_fadvise") and info.file in self._open:
            os.posix_fadvise(self._open[info.file].fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        for f in self._open.values():
            f.close()
        self._open.clear()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_weights(folder: str | Path) -> Weights:
    """The tensors of a Hugging Face folder: `model.safetensors`, or the files of `model.safetensors.index.json`.

    Raises ModelError, naming file and both sizes: no weights, a shard of the index that is missing, a file cut short, a
    tensor whose bytes do not fit its shape, a tensor that the index puts in another file.
    """
    folder = Path(folder)
    placed: dict[str, str] = {}
    if (folder / INDEX).is_file():
        placed = _json((folder / INDEX).read_bytes(), folder / INDEX).get("weight_map", {})
        files = sorted(set(placed.values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        raise ModelError(f"{folder}: neither {SINGLE} nor {INDEX} is there, so this is not a model folder with weights")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in files:
        if not (folder / file).is_file():
            raise ModelError(f"{folder}: {file} is named by {INDEX} but is not there")
        found, metadata[file] = read_header(folder / file)
        for name, info in found.items():
            if name in tensors:
                raise ModelError(f"{folder}: tensor {name} is in both {tensors[name].file} and {file}")
            tensors[name] = info
    for name, file in placed.items():
        if name not in tensors or tensors[name].file != file:
            at = tensors[name].file if name in tensors else "nowhere"
            raise ModelError(f"{folder}: {INDEX} puts tensor {name} in {file}, found {at}")
    return Weights(folder, files, tensors, metadata)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Header of one safetensors file: tensors in order of their place, and the metadata. Raises ModelError."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or 8 + length > size:
            raise ModelError(
                f"{path}: {size} bytes, but the header alone needs {8 + length}: the file was cut. "
                "Copy or train it again."
            )
        header = _json(f.read(length), path)
    metadata = header.pop("__metadata__", {})
    tensors, at = {}, 8 + length
    for name, entry in sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        start, stop = (8 + length + o for o in entry["data_offsets"])
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        width = FLOATS.get(dtype) or EXACT.get(dtype)
        if width is None:
            raise ModelError(
                f"{path}: tensor {name} has dtype {dtype}; a soup can average {', '.join(FLOATS)} and copy "
                f"{', '.join(EXACT)}"
            )
        if stop - start != prod(shape) * width or start != at:
            raise ModelError(
                f"{path}: tensor {name} of shape {list(shape)} and dtype {dtype} needs {prod(shape) * width} "
                f"bytes at {at}, the header gives {stop - start} at {start}: the file is damaged"
            )
        tensors[name], at = TensorInfo(path.name, dtype, shape, start, stop - start), stop
    if at != size:
        raise ModelError(
            f"{path}: {size} bytes, but its tensors end at {at}: the file was cut or damaged. Copy or train it again."
        )
    return tensors, metadata


def write_header(tensors: dict[str, TensorInfo], metadata: dict[str, str]) -> bytes:
    """Header bytes for tensors that will follow in this order; equal input gives equal bytes. Start at a multiple of
    8."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name, info in tensors.items():
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def blocks(nbytes: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of consecutive blocks; `size` must be a multiple of 8."""
    for offset in range(0, nbytes, size):
        yield offset, min(size, nbytes - offset)


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as e:
        raise ModelError(f"{path}: the header is not JSON ({e}): the file is damaged") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: the header is not a JSON object: the file is damaged")
    return found
