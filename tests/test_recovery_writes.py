"""Each step, killed between any two of its writes, leaves nothing half-finished and ends in the bytes of a whole run."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_soup_run as soups
from curation_server import serving
from curation_world import dataset, png, sample, seal_layer
from evaluation_fake_vlm import install
from recovery_kill import contents, dies, killed_everywhere

from vlmflow import storage
from vlmflow.curation import pull
from vlmflow.dataset.layer import add_layer
from vlmflow.evaluation import run as evaluation
from vlmflow.evaluation.scores import Scores
from vlmflow.models import store
from vlmflow.recipe.data import DatasetSpec, PullSpec, SourceSpec
from vlmflow.soup import run as soup
from vlmflow.step import Context


def plain(folder: Path, **recipe: object) -> Context:
    return Context(SimpleNamespace(seed=1, **recipe), str(folder / "root"), folder / "scratch", "test")  # type: ignore[arg-type]


def everywhere(ctx: Context, step) -> int:
    return killed_everywhere(step, Path(ctx.root), Path(ctx.scratch))


def test_pull(tmp_path):
    with serving() as server:
        rows = [{"url": server.url(f"/img/{i}"), "text": f"a {i}"} for i in range(7)]
        rows += [{"url": server.url("/status/404"), "text": "gone"}, {"url": rows[0]["url"], "text": "again"}]
        with open(tmp_path / "t.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["url", "text"])
            writer.writeheader()
            writer.writerows(rows)
        data = {"web": DatasetSpec(sources={"web": SourceSpec(table=str(tmp_path / "t.csv"))})}
        limits = PullSpec(allow_hosts=["127.0.0.1"], samples_per_shard=4, timeout=5, failure_limit=0.5)
        ctx = plain(tmp_path, data=data, pull=limits)
        deaths = everywhere(ctx, lambda: pull.run(ctx, "web").digest)
    assert deaths >= 3 * 3 + 1, "three files of three shards, and the manifest"


def test_a_layer_and_a_global_layer(tmp_path):
    ctx = plain(tmp_path)
    manifest = dataset(tmp_path / "shards", [sample(f"k{i}", f"text {i}", png(i)) for i in range(8)])

    def step() -> str:
        def compute(reader, _):
            return [{"key": key, "text": key.upper(), "error": "odd" if key == "k3" else None} for key in reader.keys()]

        one = add_layer(
            ctx, manifest, "shout", params={"x": 1}, version=1, schema={"text": "str"}, compute=compute, failure_limit=0.5,
            summary=lambda sealed: {"samples": sealed.samples},
        )  # fmt: skip
        rows = {f"k{i}": {"key": f"k{i}", "rank": i} for i in range(8)}
        return seal_layer(
            ctx, one, "rank", params={}, version=1, schema={"rank": "int"}, rows=rows, reads=["shout"]
        ).digest

    assert everywhere(ctx, step) >= 2 + 2 + 2


def test_a_published_model_exists_when_all_of_it_does(tmp_path):
    ctx, folder = plain(tmp_path), tmp_path / "model"
    folder.mkdir()
    for name, data in {"model.safetensors": b"weights", "config.json": b"{}", "tokenizer.json": b"[]"}.items():
        (folder / name).write_bytes(data)

    def step() -> store.ModelRef:
        return store.publish(ctx, folder, "m", store.ModelLineage(step="train"), "key")

    assert everywhere(ctx, step) == 4
    storage.delete(f"{ctx.root}/models/key/{store.MARKER}")
    for at in range(1, 5):
        assert dies(step, at)
        assert store.find(ctx, "key") is None
    assert store.find(ctx, "key") is None and store.fetch(step()) is not None


def test_evaluation(tmp_path, monkeypatch):
    install(monkeypatch, soups.answer)
    ctx = soups.context(tmp_path)
    model = soups.candidate(ctx, tmp_path, "a", 4.0)

    def step() -> Scores:
        return evaluation.run(ctx, model, "report")

    assert everywhere(ctx, step) == 2


def test_soup_search(tmp_path, monkeypatch):
    install(monkeypatch, soups.answer)
    ctx = soups.context(tmp_path)
    candidates = {
        name: soups.candidate(ctx, tmp_path, name, skill) for name, skill in {"a": 4.0, "b": 9.0, "c": 7.0}.items()
    }
    assert everywhere(ctx, lambda: soup.run(ctx, candidates)) > 15


def test_export(tmp_path, monkeypatch):
    import models_tiny
    import registry_samples as samples

    from vlmflow.export import run as export
    from vlmflow.export import smoke
    from vlmflow.models.initial import save

    ctx = samples.context(tmp_path, evaluation={"benchmarks": {}}, registry={"model": "points-test"})
    ctx.root = str(tmp_path / "root")
    save(models_tiny.build(), models_tiny.tokenizer(), tmp_path / "model")
    model = store.publish(ctx, tmp_path / "model", "points-test", store.ModelLineage(step="train"), "k")
    tested = smoke.SmokeResult(
        questions=1,
        same_text=1,
        max_logit_difference=0.0,
        logits=1,
        tolerance=1.0,
        prompts=["p"],
        trained=["t"],
        exported=["t"],
    )
    monkeypatch.setattr(smoke, "compare", lambda *_: tested)  # not the writing of it: tests/test_export_run.py

    def step():
        return export.run(ctx, model, samples.score_table(model))

    assert everywhere(ctx, step) > 12
    assert [name for name in contents(Path(ctx.root)) if name.endswith(export.MARKER)]


def test_checkpoint(tmp_path):
    import torch

    from vlmflow.training import checkpoint

    base, work = str(tmp_path / "root" / "checkpoints"), tmp_path / "scratch"

    def save(step: int) -> str:
        tensors = {"w": torch.full((4,), float(step))}
        snapshot = checkpoint.Snapshot(step, tensors, tensors, {"plan": "p", "world": 1}, f"log {step}")
        return checkpoint.save(base, snapshot, work / "saving", 1)

    save(3)

    def newest() -> int:
        found, _ = checkpoint.newest(base, work / "resume")
        assert found is not None
        return found.step

    at = 1
    while dies(lambda: save(6), at):
        assert newest() == 3
        at += 1
    assert at > 5 and newest() == 6
    assert {name.split("/")[1] for name in contents(tmp_path / "root")} == {"step-00000006"}


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_work_folder_left_by_a_kill_is_in_nobodys_way(tmp_path, at):
    """The mean of models is built beside its place: what a kill leaves there is replaced."""
    import torch
    from safetensors.torch import save_file

    from vlmflow.soup.average import Parent, average

    parents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((5,), float(ord(name)))}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
        parents.append(Parent(name, tmp_path / name))
    killed = dies(lambda: average(parents, tmp_path / "mean"), at)
    assert killed == (at == 1) and (tmp_path / "mean").exists() == (not killed)
    out = average(parents, tmp_path / "mean")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert not (tmp_path / "mean.partial").exists()
