"""A sample's way from the table to the decision, or to the reason it is not there."""

from __future__ import annotations

import json

import look_world
import pytest

from vlmflow import cli, storage
from vlmflow.curation.pull_shard import _sidecar, failures_parquet
from vlmflow.dataset.manifest import save
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import DataError
from vlmflow.look import trace
from vlmflow.models.store import ModelLineage, ModelRef


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    return look_world.small(folder), folder


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


def test_a_sample_is_followed_from_its_row_to_its_reason(world):
    manifest, folder = world
    found = trace.trace(manifest, "docs-00000020", folder / "scratch")
    assert found["found"] == "sample" and (found["source"], found["row"], found["state"]) == ("docs", 20, "dropped")
    assert (
        found["url"] == "http://pictures.example/20.png"
        and found["reason"] == "perplexity 14 is beyond the lowest 50 % (to 13)"
    )
    assert found["shard"]["sha256"] == manifest.shards[2].sha256 and found["shard"]["number"] == 2
    offset, length = found["shard"]["members"]["png"]
    with open(found["shard"]["uri"], "rb") as file:
        file.seek(offset)
        assert file.read(length) == look_world.picture(20, (64, 128))
    assert found["layers"]["ppl"]["row"] == {"ppl": 14.0, "tokens": 23, "error": None}
    assert found["layers"]["keep"]["params"] == {"threshold": 13.0} and found["layers"]["keep"]["version"] == 1
    assert [entry["step"] for entry in found["lineage"]] == ["pull", "fused", "ppl", "clean", "keep"]


def test_a_row_that_failed_says_why_it_is_not_there(world):
    manifest, folder = world
    found = trace.trace(manifest, "web-00000100", folder / "scratch")
    assert found["found"] == "failed" and (found["reason"], found["detail"], found["host"]) == (
        "http_404",
        "404 Not Found",
        "gone.example",
    )
    assert "not in the dataset" in trace.as_text(found) and "http://gone.example/100.png" in trace.as_text(found)


def test_a_row_of_a_shard_in_which_every_row_failed_is_found_beside_the_others(tmp_path):
    manifest = look_world.small(tmp_path)
    row = {
        "row": 43,
        "key": "web-00000043",
        "source": "web",
        "url": "http://x/",
        "host": "x",
        "reason": "timeout",
        "detail": "10 s",
    }
    lost = manifest.shards[0].uri.replace("-00000.tar", "-00005.tar")
    storage.write_bytes(_sidecar(lost), failures_parquet([row], {}))
    assert trace.trace(manifest, "web-00000043", tmp_path)["reason"] == "timeout"
    with pytest.raises(DataError, match="no failed row 'web-00000044'"):
        trace.trace(manifest, "web-00000044", tmp_path)


def test_an_unknown_key_is_told_what_keys_look_like(world):
    manifest, folder = world
    with pytest.raises(DataError, match="such as web-00000000"):
        trace.trace(manifest, "nonsense", folder / "scratch")


def test_the_guess_of_the_shard_saves_reading_the_others(world, monkeypatch):
    manifest, folder = world
    opened: list[str] = []
    real = ShardReader.__init__
    monkeypatch.setattr(
        ShardReader, "__init__", lambda self, ref, *rest: (opened.append(ref.uri), real(self, ref, *rest))[1]
    )
    trace.trace(manifest, "docs-00000023", folder / "scratch")
    assert opened == [manifest.shards[2].uri]


def test_keys_that_do_not_tell_their_shard_are_found_too(world):
    manifest, folder = world
    blind = manifest.model_copy(update={"lineage": []})
    assert trace.trace(blind, "docs-00000020", folder / "scratch")["found"] == "sample"
    assert trace.trace(blind, "web-00000101", folder / "scratch")["found"] == "failed"


def test_texts_of_strangers_do_not_move_the_cursor(world):
    manifest, folder = world
    found = trace.trace(manifest, "web-00000003", folder / "scratch")
    found["url"] = "http://x/\x1b[2J\x07"
    assert "\x1b" not in trace.as_text(found) and "\x07" not in trace.as_text(found)


def test_a_sample_of_a_models_data_is_found_from_the_model(tmp_path, capsys):
    manifest = look_world.small(tmp_path)
    root = str(tmp_path / "root")
    save(manifest, root)
    uri = f"file://{root}/models/abc"
    ref = ModelRef(
        name="m",
        uri=uri,
        files=[],
        weights_sha256="f" * 64,
        lineage=ModelLineage(step="train", data=[manifest.digest, "0" * 64]),
    )
    storage.write_json(f"{uri}/model.json", ref.model_dump(mode="json"))
    code, out, err = call(
        capsys,
        "data",
        "trace",
        "web-00000002",
        "--from-model",
        uri,
        "--state-dir",
        str(tmp_path / "none"),
        "-o",
        "json",
    )
    assert code == 0, err
    found = json.loads(out)
    assert (
        found["manifest"] == manifest.digest
        and found["url"] == "http://pictures.example/2.png"
        and found["state"] == "kept"
    )
    later = ref.model_copy(
        update={"uri": f"file://{root}/models/def", "weights_sha256": "e" * 64,
                "lineage": ModelLineage(step="train", data=["1" * 64], parents=["f" * 64])}
    )  # fmt: skip
    soup = later.model_copy(
        update={"uri": f"file://{root}/models/soup", "weights_sha256": "d" * 64,
                "lineage": ModelLineage(step="soup", parents=["e" * 64, "e" * 64])}
    )  # fmt: skip
    for made in (later, soup):
        storage.write_json(f"{made.uri}/model.json", made.model_dump(mode="json"))
    assert [m.digest for m in trace.of_model(soup)] == [manifest.digest]  # two models earlier
    bare = ref.model_copy(update={"lineage": ModelLineage(step="soup")})
    storage.write_json(f"{uri}/model.json", bare.model_dump(mode="json"))
    code, _, err = call(
        capsys, "data", "trace", "web-00000002", "--from-model", uri, "--state-dir", str(tmp_path / "none")
    )
    assert code == 2 and "name manifests of data of which none lies in" in err
