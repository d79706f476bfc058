"""The mean of models, one block of one tensor at a time.

Memory is a few MiB for any model size and any number of parents, the mean is accumulated in float64 and rounded once to
the stored dtype. Averaging in bfloat16 misrounds a third to a half of the weights (data-eval-soup 6.2), and the
published POINTS helper averages integer buffers and forgets the image processor (points.md 7.3). Neither happens here.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmflow.errors import ModelError, NoSpace
from vlmflow.soup.accumulate import Accumulator, to_float64
from vlmflow.soup.tensors import (
    EXACT,
    FLOATS,
    INDEX,
    TensorInfo,
    Weights,
    blocks,
    open_weights,
    write_header,
)

BLOCK = 1 << 18  # bytes read of each parent at once: its float64 sum stays in the processor's cache
# keys of JSON side files that say where a file came from, not how the model behaves
PROVENANCE = {"_name_or_path", "name_or_path", "transformers_version", "_commit_hash"}
IGNORED_FILES = {"README.md", "model.json", "training_args.bin", INDEX}


@dataclass(frozen=True)
class Parent:
    """One model to average: a name for messages, its folder, the weight hash of its start (None = not checked)."""

    name: str
    folder: Path
    ancestor: str | None = None


def average(
    parents: Sequence[Parent],
    out: str | Path,
    weights: Sequence[float] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Path:
    """Write the weighted mean of `parents` to the folder `out` as a complete Hugging Face folder; returns it.

    weights: one number a parent, divided by their sum; None = equal. Float tensors are averaged; integer and bool
    tensors must be equal and are copied. Files, tensor order and side files (processor, tokenizer, templates) are the
    first parent's. The bytes depend on the parents and weights only. `out` appears complete or not at all; one that
    exists is replaced. `advance` is told the bytes of parents read.

    Raises ModelError naming the first difference and both values: other tensors, shapes, dtypes, integer values, config
    or side files, ancestors; NaN or Inf with tensor, parent and place; damaged files; weights that do not fit.
    """
    share = _weights(parents, weights)
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_weights(p.folder)) for p in parents]
        check(parents, opened)
        partial.mkdir(parents=True)
        needed = sum(t.nbytes for t in opened[0].tensors.values())
        try:
            _check_space(partial, needed)
            for file in opened[0].files:
                _write_file(partial / file, file, parents, opened, share, advance or (lambda n: None))
            for name in _side_files(parents[0].folder) + ([INDEX] if (parents[0].folder / INDEX).is_file() else []):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(parents[0].folder / name, partial / name)
            shutil.rmtree(out, ignore_errors=True)
            os.replace(partial, out)
        except BaseException as e:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(_no_space(out, needed)) from None
            raise
    return out


def _check_space(folder: Path, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:
        raise NoSpace(_no_space(folder, needed))


def _no_space(folder: Path, needed: int) -> str:
    return (
        f"the mean of the models needs {needed} bytes under {folder.parent}, {shutil.disk_usage(folder.parent).free} are "
        "free; nothing was left behind. Make room or set another scratch folder, then run again."
    )


def check(parents: Sequence[Parent], opened: Sequence[Weights]) -> None:
    """Refuse parents that cannot be averaged, from headers and side files alone. Raises ModelError."""
    first = parents[0]
    for parent, weights in zip(parents[1:], opened[1:], strict=True):
        if first.ancestor != parent.ancestor:
            raise ModelError(
                f"{first.name} descends from {_short(first.ancestor)}, {parent.name} from {_short(parent.ancestor)}: "
                "models that were not tuned from the same start average to noise. Train both from one checkpoint."
            )
        _check_side_files(first, parent)
        _check_tensors(first, parent, opened[0].tensors, weights.tensors)


def _check_tensors(first: Parent, other: Parent, a: dict[str, TensorInfo], b: dict[str, TensorInfo]) -> None:
    for name in sorted(a.keys() ^ b.keys()):
        has, lacks = (first, other) if name in a else (other, first)
        raise ModelError(
            f"tensor {name} is in {has.name} ({len(a if name in a else b)} tensors) but not in {lacks.name} "
            f"({len(b if name in a else a)} tensors): only models of one architecture can be averaged. An output layer "
            "that one of them ties to the embedding must be tied in all."
        )
    for name in a:
        for what in ("shape", "dtype"):
            x, y = getattr(a[name], what), getattr(b[name], what)
            if x != y:
                x, y = (list(x), list(y)) if what == "shape" else (x, y)
                raise ModelError(
                    f"tensor {name} has {what} {x} in {first.name} and {y} in {other.name}: only equal "
                    f"{what}s can be averaged. Save both models in the same form."
                )


def _side_files(folder: Path) -> list[str]:
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(
        n
        for n in names
        if n not in IGNORED_FILES and not n.endswith(".safetensors") and not any(p[0] == "." for p in n.split("/"))
    )


def _check_side_files(first: Parent, other: Parent) -> None:
    a, b = _side_files(first.folder), _side_files(other.folder)
    for name in sorted(set(a) ^ set(b)):
        has, lacks = (first, other) if name in a else (other, first)
        raise ModelError(
            f"{name} is in {has.name} but not in {lacks.name}: the soup would not know which to keep. Save both "
            "models with the same side files."
        )
    for name in a:
        x, y = (p.folder / name for p in (first, other))
        left, right = x.read_bytes(), y.read_bytes()
        if left == right:
            continue
        if not name.endswith(".json"):
            raise ModelError(
                f"{name} differs between {first.name} ({len(left)} bytes) and {other.name} ({len(right)} bytes): "
                "a soup needs one tokenizer, template and processor."
            )
        difference = _difference(json.loads(left), json.loads(right), "")
        if difference:
            where, p, q = difference
            raise ModelError(
                f"{name}: {where} is {p} in {first.name} and {q} in {other.name}: a soup needs one config, "
                "tokenizer and processor. Train the candidates with the same settings."
            )


def _difference(a: Any, b: Any, where: str) -> tuple[str, str, str] | None:
    """The first place where two JSON values differ, with both values; None when they mean the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted((a.keys() | b.keys()) - PROVENANCE):
            found = _difference(a.get(key, "absent"), b.get(key, "absent"), f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    return None if a == b else (where or "the content", json.dumps(a)[:80], json.dumps(b)[:80])


def _write_file(
    path: Path, file: str, parents: Sequence[Parent], opened: Sequence[Weights], share: Sequence[float],
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    tensors = {name: info for name, info in opened[0].tensors.items() if info.file == file}
    names = list(tensors)
    accumulator = Accumulator(BLOCK // min(FLOATS.values()))
    with open(path, "wb") as f:
        f.write(write_header(tensors, opened[0].metadata[file]))
        for i, name in enumerate(names):
            info = tensors[name]
            for offset, length in blocks(info.nbytes, BLOCK):
                data = [w.read(name, offset, length) for w in opened]
                if offset == 0 and i + 1 < len(names):
                    for w in opened:
                        w.will_need(names[i + 1])
                f.write(_mean(name, info, offset, data, parents, share, accumulator))
                advance(length * len(data))
        f.flush()
        os.fsync(f.fileno())


def _mean(
    name: str,
    info: TensorInfo,
    offset: int,
    data: Sequence[bytes],
    parents: Sequence[Parent],
    share: Sequence[float],
    accumulator: Accumulator,
) -> bytes:
    if info.dtype in EXACT:
        _check_equal(name, info, offset, data, parents)
        return data[0]
    accumulator.start(len(data[0]) // FLOATS[info.dtype])
    for block, weight in zip(data, share, strict=True):
        accumulator.add(block, info.dtype, weight)
    if not accumulator.finite():
        _name_the_sick(name, info, offset, data, parents)
    return accumulator.stored(info.dtype, sum(share))


def _name_the_sick(name: str, info: TensorInfo, offset: int, data: Sequence[bytes], parents: Sequence[Parent]) -> None:
    for block, parent in zip(data, parents, strict=True):
        values = to_float64(block, info.dtype)
        for place in np.flatnonzero(~np.isfinite(values))[:1]:
            at = [int(i) for i in np.unravel_index(offset // FLOATS[info.dtype] + int(place), info.shape)]
            raise ModelError(
                f"tensor {name} of {parent.name} holds {values[place]} at {at}: one such value makes the whole "
                "soup useless. Leave this candidate out or train it again."
            )
    raise ModelError(f"tensor {name}: the weighted sum of {len(data)} models leaves float64; use smaller weights")


def _check_equal(name: str, info: TensorInfo, offset: int, data: Sequence[bytes], parents: Sequence[Parent]) -> None:
    width = EXACT[info.dtype]
    kind = {"B": "?", "I": "<i", "U": "<u"}[info.dtype[0]]
    dtype = np.dtype(kind if kind == "?" else f"{kind}{width}")
    for block, parent in zip(data[1:], parents[1:], strict=True):
        if block != data[0]:
            a, b = (np.frombuffer(d, dtype) for d in (data[0], block))
            place = int(np.flatnonzero(a != b)[0])
            raise ModelError(
                f"tensor {name} ({info.dtype}) is {a[place]} in {parents[0].name} and {b[place]} in {parent.name} at "
                f"flat position {offset // width + place}: integers have no mean, so they must be equal."
            )


def _weights(parents: Sequence[Parent], weights: Sequence[float] | None) -> list[float]:
    if not parents:
        raise ModelError("a soup needs at least one model, got 0")
    share = [1.0] * len(parents) if weights is None else [float(w) for w in weights]
    if len(share) != len(parents):
        raise ModelError(f"{len(share)} weights for {len(parents)} models: give one a model")
    if not all(np.isfinite(w) for w in share) or sum(share) == 0:
        raise ModelError(f"weights {share} sum to {sum(share)}: they must be finite and have a sum that is not 0")
    return share


def _short(ancestor: str | None) -> str:
    return f"{ancestor[:12]}…" if ancestor else "an unknown start"
