"""Averages of models: exact, refused when they would be noise, whole or absent, small in memory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmflow.errors import ModelError, NoSpace
from vlmflow.soup import average as module
from vlmflow.soup.accumulate import from_float64
from vlmflow.soup.average import Parent, average
from vlmflow.soup.tensors import open_weights

CONFIG = {"model_type": "points", "hidden_size": 8, "tie_word_embeddings": False}


def tensors(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(37, 8, generator=g).to(dtype),
        "norm.weight": torch.randn(8, generator=g).to(dtype),
        "scale": torch.randn((), generator=g).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "positions": torch.arange(5),
        "flag": torch.tensor([True, False]),
    }


def save(folder: Path, state: dict[str, torch.Tensor], config: dict | None = None, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        placed = {k: names[i % shards] for i, k in enumerate(state)}
        for name in names:
            save_file({k: v for k, v in state.items() if placed[k] == name}, folder / name, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    (folder / "processor_config.json").write_text('{"tile": 56}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def parents(tmp_path: Path, n: int, dtype: torch.dtype = torch.float32, shards: int = 1) -> list[Parent]:
    return [Parent(f"m{i}", save(tmp_path / f"m{i}", tensors(i, dtype), shards=shards)) for i in range(n)]


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_equal_to_the_float64_mean_rounded_once(tmp_path: Path, dtype: torch.dtype, n: int) -> None:
    got = load_file(average(parents(tmp_path, n, dtype), tmp_path / "soup") / "model.safetensors")
    states = [tensors(i, dtype) for i in range(n)]
    for name in ("embed.weight", "norm.weight", "scale", "empty"):
        mean = np.mean([s[name].double().numpy() for s in states], axis=0)
        assert got[name].dtype == dtype and got[name].shape == states[0][name].shape
        expected = nearest_bfloat16(mean) if dtype == torch.bfloat16 else mean.astype(states[0][name].numpy().dtype)
        assert np.array_equal(got[name].double().numpy(), expected.astype(np.float64))
    assert torch.equal(got["positions"], torch.arange(5)) and torch.equal(got["flag"], torch.tensor([True, False]))


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """By search: the nearer of the two neighbours, the even one of equals."""
    flat = np.atleast_1d(values)
    bits = torch.from_numpy(flat).to(torch.bfloat16).view(torch.int16).numpy().astype(np.int32)  # off by one at most
    options = np.stack([bits - 1, bits, bits + 1])
    as_float = (options.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    away = np.nan_to_num(np.abs(as_float - flat), nan=np.inf)
    nearest = away == away.min(axis=0)
    pick = np.argmax(nearest.astype(int) * 2 - (options % 2 != 0), axis=0)
    best = np.take_along_axis(as_float, pick[None], axis=0)[0]
    return best.reshape(np.shape(values))


def test_bfloat16_is_rounded_once() -> None:
    """1 + 2^-8 + 2^-40 lies just above the middle of two bfloat16: through float32 it would be a tie and go down."""
    value = np.array([1 + 2.0**-8 + 2.0**-40, -(1 + 2.0**-8 + 2.0**-40), 1 + 2.0**-8, 0.0, 1e-50, 3e38, -1e-41])
    got = torch.frombuffer(bytearray(from_float64(value, "BF16")), dtype=torch.bfloat16).double().numpy()
    assert list(got[:4]) == [1 + 2.0**-7, -(1 + 2.0**-7), 1.0, 0.0]
    assert np.array_equal(got, nearest_bfloat16(value))
    minus = from_float64(np.array([-0.0, -0.0]), "BF16")
    assert minus == b"\x00\x80" * 2
    twice = torch.from_numpy(value[:1]).float().bfloat16().double().item()
    assert twice == 1.0  # what the usual way gives


def test_weights(tmp_path: Path) -> None:
    p = parents(tmp_path, 3, torch.bfloat16)
    got = load_file(average(p, tmp_path / "soup", weights=[0.2, 0.3, 0.5]) / "model.safetensors")["embed.weight"]
    states = [tensors(i, torch.bfloat16)["embed.weight"].double().numpy() for i in range(3)]
    mean = (0.2 * states[0] + 0.3 * states[1] + 0.5 * states[2]) / sum([0.2, 0.3, 0.5])
    assert np.array_equal(got.double().numpy(), nearest_bfloat16(mean))
    for weights, words in ([1.0], "1 weights for 3"), ([1.0, -1.0, 0.0], "sum"), ([1.0, float("nan"), 1.0], "finite"):
        with pytest.raises(ModelError, match=words):
            average(p, tmp_path / "bad", weights=weights)
    with pytest.raises(ModelError, match="at least one"):
        average([], tmp_path / "bad")


def test_complete_folder_with_equal_bytes(tmp_path: Path) -> None:
    p = parents(tmp_path, 2, shards=3)
    save(tmp_path / "whole", tensors(1, torch.float32))
    (p[0].folder / "README.md").write_text("about one parent")
    (p[0].folder / ".hidden").write_text("x")
    a = content(average(p, tmp_path / "a"))
    b = content(average([p[0], Parent("w", tmp_path / "whole")], tmp_path / "b"))  # the other is not sharded
    assert a == b
    assert set(a) == {
        "config.json", "processor_config.json", "chat_template.jinja", "model.safetensors.index.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }  # fmt: skip
    assert average(p, tmp_path / "a") and content(tmp_path / "a") == a  # replaced


def test_header_bytes_do_not_depend_on_how_the_parent_was_written(tmp_path: Path) -> None:
    p = parents(tmp_path, 2)
    first = content(average(p, tmp_path / "a"))
    again = content(average([Parent("soup", tmp_path / "a"), Parent("soup", tmp_path / "a")], tmp_path / "b"))
    assert first == again  # the mean of equal models is that model, byte for byte


def change(tmp_path: Path, what: str) -> tuple[list[Parent], list[str]]:
    p = parents(tmp_path, 3)
    state, folder = tensors(2, torch.float32), p[2].folder
    if what == "key":
        state["lm_head.weight"] = torch.zeros(2)
        save(folder, state)
        return p, ["lm_head.weight", "m2 (7 tensors)", "m0 (6 tensors)", "tie"]
    if what == "shape":
        state["norm.weight"] = torch.zeros(9)
        save(folder, state)
        return p, ["norm.weight", "shape [8] in m0", "[9] in m2"]
    if what == "dtype":
        state["norm.weight"] = state["norm.weight"].bfloat16()
        save(folder, state)
        return p, ["norm.weight", "dtype F32 in m0", "BF16 in m2"]
    if what == "integer":
        state["positions"] = torch.tensor([0, 1, 2, 9, 4])
        save(folder, state)
        return p, ["positions", "is 3 in m0", "9 in m2", "position 3"]
    if what == "bool":
        state["flag"] = torch.tensor([True, True])
        save(folder, state)
        return p, ["flag", "False in m0", "True in m2", "position 1"]
    if what == "config":
        save(folder, state, CONFIG | {"hidden_size": 16})
        return p, ["config.json", "hidden_size is 8 in m0", "16 in m2"]
    if what == "template":
        (folder / "chat_template.jinja").write_text("other")
        return p, ["chat_template.jinja", "m0 (14 bytes)", "m2 (5 bytes)"]
    if what == "missing side file":
        (folder / "processor_config.json").unlink()
        return p, ["processor_config.json is in m0 but not in m2"]
    if what == "nan":
        state["embed.weight"][36, 7] = float("nan")
        save(folder, state)
        return p, ["embed.weight of m2", "nan", "[36, 7]"]
    if what == "infinity":
        state["scale"] = torch.tensor(float("-inf"))
        save(folder, state)
        return p, ["scale of m2", "-inf"]
    if what == "ancestor":
        return [Parent("a", p[0].folder, "abc"), Parent("b", p[1].folder, "xyz")], ["a descends from abc", "b from xyz"]
    if what == "cut":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2 + 300])
        return p, [str(folder / "model.safetensors"), f"{len(data) // 2 + 300} bytes", str(len(data)), "cut"]
    if what == "cut header":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:60])
        return p, ["60 bytes", "header alone needs", "cut"]
    assert what == "no weights"
    (folder / "model.safetensors").unlink()
    return p, [str(folder), "not a model folder"]


@pytest.mark.parametrize(
    "what",
    ["key", "shape", "dtype", "integer", "bool", "config", "template", "missing side file", "nan", "infinity", "ancestor",
     "cut", "cut header", "no weights"],
)  # fmt: skip
def test_refusals_name_the_difference_and_leave_nothing(tmp_path: Path, what: str) -> None:
    p, words = change(tmp_path, what)
    before = sorted(x.name for x in tmp_path.iterdir())
    with pytest.raises(ModelError) as error:
        average(p, tmp_path / "soup")
    for word in words:
        assert word in str(error.value)
    assert sorted(x.name for x in tmp_path.iterdir()) == before


def test_provenance_in_config_is_no_difference(tmp_path: Path) -> None:
    p = parents(tmp_path, 2)
    save(p[1].folder, tensors(1, torch.float32), CONFIG | {"_name_or_path": "/elsewhere", "transformers_version": "0"})
    assert average(p, tmp_path / "soup").is_dir()


def test_a_shard_that_the_index_names_is_missing(tmp_path: Path) -> None:
    p = parents(tmp_path, 2, shards=2)
    (p[1].folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors is named by .* but is not there"):
        average(p, tmp_path / "soup")


def test_tied_copies_stay_equal(tmp_path: Path) -> None:
    p = parents(tmp_path, 3)
    for i, parent in enumerate(p):
        state = tensors(i, torch.float32)
        save(parent.folder, state | {"lm_head.weight": state["embed.weight"].clone()})
    got = load_file(average(p, tmp_path / "soup") / "model.safetensors")
    assert torch.equal(got["lm_head.weight"], got["embed.weight"])


def test_killed_half_way_leaves_nothing_and_the_next_run_gives_the_same_bytes(tmp_path: Path) -> None:
    p = parents(tmp_path, 2, shards=3)
    expected = content(average(p, tmp_path / "reference"))
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom vlmflow.soup import average as module\n"
        "seen = []\n"
        "def advance(n):\n    seen.append(n)\n    if len(seen) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "base = Path(sys.argv[1])\n"
        "both = [module.Parent('a', base / 'm0'), module.Parent('b', base / 'm1')]\n"
        "module.average(both, base / 'soup', advance=advance)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "soup").exists() and (tmp_path / "soup.partial").exists()
    assert content(average(p, tmp_path / "soup")) == expected
    assert not (tmp_path / "soup.partial").exists()


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    p = parents(tmp_path, 2)
    before = sorted(x.name for x in tmp_path.iterdir())
    with monkeypatch.context() as m:
        if when == "before":
            m.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
        else:
            m.setattr("os.fsync", raises(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(NoSpace, match=r"needs 1262 bytes .* are free; nothing was left"):
            average(p, tmp_path / "soup")
    assert sorted(x.name for x in tmp_path.iterdir()) == before
    assert average(p, tmp_path / "soup").is_dir()


def raises(error: Exception) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise error

    return call


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 1 << 16)
    state = {"w": torch.zeros(2_000_000)}  # 8 MB a model, in one tensor
    p = [Parent(f"m{i}", save(tmp_path / f"m{i}", state)) for i in range(4)]
    tracemalloc.start()
    average(p, tmp_path / "soup")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_advance_counts_every_byte(tmp_path: Path) -> None:
    p, seen = parents(tmp_path, 3), []
    average(p, tmp_path / "soup", advance=seen.append)
    with open_weights(p[0].folder) as w:
        assert sum(seen) == 3 * sum(t.nbytes for t in w.tensors.values())
