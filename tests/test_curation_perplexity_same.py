"""The same rows and the same kept share whatever batch size, order, sharding, groups of shards, processes, threads, restarts."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from curation_world import context, dataset
from models_tiny import build, tokenizer
from test_curation_perplexity_model import web

from vlmflow.curation import inputs, keep, perplexity
from vlmflow.dataset.groups import cut, deal
from vlmflow.dataset.layer import read_layer
from vlmflow.dataset.manifest import Manifest
from vlmflow.errors import StepFailed
from vlmflow.models import initial, store

COUNT = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    initial.save(build(), tokenizer(), folder / "weights")
    return store.publish_under(str(folder), folder / "weights", "m", store.ModelLineage(step="test"), "m").uri


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dataset(tmp_path_factory.mktemp("data"), web(COUNT), per_shard=4)


def setup(folder: Path, model: str, batch_tokens: int = 4096):
    return context(folder, scorer=model, perplexity={"text": "alt", "batch_tokens": batch_tokens, "failure_limit": 0.0})


def sealed(folder: Path, model: str, data: Manifest, batch_tokens: int = 4096) -> Manifest:
    ctx = setup(folder, model, batch_tokens)
    return keep.run(ctx, perplexity.run(ctx, data, None))


def content(manifest: Manifest) -> list[str]:
    """Hashes of all parts of both layers: equal hashes are equal bytes."""
    return [part.sha256 for name in ("ppl", "keep") for part in manifest.layer(name).parts]


@pytest.fixture(scope="module")
def expected(tmp_path_factory, model, data):
    found = sealed(tmp_path_factory.mktemp("expected"), model, data)
    rows = read_layer(found, "keep")
    assert (
        sum(row["keep"] for row in rows.values()) == COUNT // 5
        and len({r["ppl"] for r in read_layer(found, "ppl").values()}) > 20
    )
    return found


@pytest.mark.parametrize("batch_tokens", [64, 200, 1000])
def test_batch_size(tmp_path, model, data, expected, batch_tokens):
    assert content(sealed(tmp_path, model, data, batch_tokens)) == content(expected)


def test_windows_and_threads(tmp_path, model, data, expected, monkeypatch):
    monkeypatch.setattr(inputs, "SCORED", 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert content(sealed(tmp_path, model, data)) == content(expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("per_shard", [3, 7, COUNT])
def test_order_and_sharding(tmp_path, model, data, expected, per_shard):
    other = sealed(tmp_path, model, dataset(tmp_path / "d", web(COUNT)[::-1], per_shard))
    for layer in ("ppl", "keep"):
        assert read_layer(other, layer) == read_layer(expected, layer)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from test_curation_perplexity_same import setup
from vlmflow.curation import perplexity
from vlmflow.dataset.groups import cut, deal
from vlmflow.dataset.manifest import Manifest
data = Manifest.model_validate_json(Path(sys.argv[2]).read_text())
ctx = replace(setup(Path(sys.argv[3]), sys.argv[4], 300), parts_only=True)
perplexity.run(ctx, cut(data, deal(data, 3)[int(sys.argv[5])]), None)
"""


def test_groups_in_processes_of_their_own(tmp_path, model, data, expected):
    (tmp_path / "manifest.json").write_text(data.model_dump_json())
    arguments = [str(Path(__file__).parent), str(tmp_path / "manifest.json"), str(tmp_path), model]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    children = [subprocess.Popen([sys.executable, "-c", CHILD, *arguments, str(group)], env=env) for group in (0, 2)]
    mine = replace(setup(tmp_path, model), parts_only=True)
    perplexity.run(mine, cut(data, deal(data, 3)[1]), None)
    assert [child.wait(600) for child in children] == [0, 0]
    assert content(sealed(tmp_path, model, data)) == content(expected)


def test_restart(tmp_path, model, data, expected, monkeypatch):
    calls = []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise StepFailed("killed")
        return rows(*arguments)

    rows = perplexity._rows
    monkeypatch.setattr(perplexity, "_rows", dies)
    with pytest.raises(StepFailed, match="killed"):
        sealed(tmp_path, model, data)
    assert content(sealed(tmp_path, model, data)) == content(expected)
    assert len(calls) == 3 + len(data.shards) - 2  # two shards were finished and are not scored again
