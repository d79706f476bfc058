"""Looking at what lies in the local stack's object store: commands find it, and only what is shown travels."""

from __future__ import annotations

import json
from pathlib import Path

import look_world
import pytest

from vlmflow import cli, local_stack, storage
from vlmflow.dataset import manifest as manifests
from vlmflow.dataset.manifest import Manifest
from vlmflow.look import query, static, table
from vlmflow.look.samples import Samples

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The small dataset with every object at s3://, and the state folder of the stack that holds it."""
    folder = tmp_path_factory.mktemp("s3")
    state = folder / "state"
    info = local_stack.up(state, services=["s3"])
    (state / "runs").mkdir(exist_ok=True)
    made = look_world.small(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in local_stack.environment(info).items():
            patch.setenv(name, value)

        def moved(uri: str) -> str:
            target = storage.join(info.root, *Path(uri).parts[-2:])
            storage.put_file(uri, target)
            return target

        shards = []
        for shard in made.shards:
            for beside in (".tar.idx.json", ".failures.parquet"):
                moved(shard.uri.removesuffix(".tar") + beside)
            shards.append(shard.model_copy(update={"uri": moved(shard.uri)}))
        layers = {}
        for name, layer in made.layers.items():
            parts = [
                part.model_copy(update={"uri": storage.join(info.root, "layers", name, f"{i}.parquet")})
                for i, part in enumerate(layer.parts)
            ]
            for old, new in zip(layer.parts, parts, strict=True):
                storage.put_file(old.uri, new.uri)
            layers[name] = layer.model_copy(update={"parts": parts})
        made = made.model_copy(update={"shards": shards, "layers": layers})
        uri = manifests.save(made, info.root)
    yield made, uri, state, info
    local_stack.down(state)


def test_the_commands_find_the_local_stack_by_themselves(world, capsys, monkeypatch):
    made, uri, state, _ = world
    monkeypatch.delenv("VLMFLOW_ROOT", raising=False)
    monkeypatch.delenv("VLMFLOW_S3_ENDPOINT", raising=False)
    monkeypatch.setenv("VLMFLOW_SCRATCH", str(state / "scratch"))
    local = state / "m.json"
    look_world.write(made, local)
    for name in (uri, str(local)):
        for command in (
            ["stats", name],
            ["trace", "docs-00000017", name],
            ["trace", "web-00000100", name],
            ["show", name],
        ):
            with pytest.raises(SystemExit) as caught:
                cli.main(["data", *command, "--state-dir", str(state), "-o", "json"])
            out = capsys.readouterr()
            assert not caught.value.code, out.err
            assert json.loads(out.out)


def test_a_page_fetches_ranges_and_no_shard(world, tmp_path, monkeypatch):
    made, _, _, info = world
    for name, value in local_stack.environment(info).items():
        monkeypatch.setenv(name, value)
    found: Manifest = made
    opened = table.open_table(found, tmp_path, samples=False)
    text = static.page(found, opened, Samples(found, tmp_path), query.Query(), each=2)
    assert text.count("data:image/jpeg") == 12 and "alt text 0" in text and "cannot be shown" not in text
    assert not list((tmp_path / "objects").glob("*.tar"))
    assert table.open_table(found, tmp_path, samples=True).with_samples
    assert len(list((tmp_path / "objects").glob("*.tar"))) == 3
