"""Bad input, one case each: the error says what, both numbers and what to do; after mending, a second run loses nothing."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import test_soup_run as soups
from curation_server import serving
from curation_world import dataset, impatient, png, sample
from curation_world import serving as text_server
from evaluation_fake_vlm import install
from recovery_kill import contents

from vlmflow import recipe, storage
from vlmflow.curation import caption, pull
from vlmflow.dataset.layer import add_layer
from vlmflow.errors import DataError, ModelError, NoSpace, RecipeError, ServiceError, StepFailed, Unreachable
from vlmflow.evaluation import run as evaluation
from vlmflow.evaluation.scores import Scores
from vlmflow.models import store
from vlmflow.recipe.data import DatasetSpec, PullSpec, SourceSpec
from vlmflow.step import Context, open_step
from vlmflow.storage_file import full_disk

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = str(REPOSITORY / "recipes/points-tiny.yaml")


@pytest.fixture
def server():
    with serving() as running:
        yield running


def table(path: Path, urls: list[str], column: str = "url") -> str:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([[column, "text"], *([url, f"text {i}"] for i, url in enumerate(urls))])
    return str(path)


def pulling(folder: Path, **sources: str | dict) -> Context:
    specs = {name: SourceSpec(**(s if isinstance(s, dict) else {"table": s})) for name, s in sources.items()}
    limits = PullSpec(
        allow_hosts=["127.0.0.1"], samples_per_shard=5, timeout=5, connect_timeout=1, retries=0, failure_limit=0.1
    )
    recipe = SimpleNamespace(data={"web": DatasetSpec(sources=specs)}, pull=limits)
    return Context(recipe, str(folder / "root"), folder / "scratch", "test")  # type: ignore[arg-type]


def undisturbed(folder: Path, ctx: Context) -> tuple[str, dict[str, bytes]]:
    """Digest and objects of a run that never failed, at the same place."""
    shutil.rmtree(ctx.root)
    shutil.rmtree(ctx.scratch, ignore_errors=True)
    return pull.run(ctx, "web").digest, contents(Path(ctx.root))


# --- the command line --------------------------------------------------------------------------------------------------


def vlmflow(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "-m", "vlmflow.cli", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_line_says_a_typo_without_a_traceback_and_starts_nothing(tmp_path):
    typo = tmp_path / "typo.yaml"
    typo.write_text(Path(TINY).read_text().replace("concurrency:", "concurency:"))
    done = vlmflow("run", str(typo), "--state-dir", str(tmp_path / "state"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "pull.concurency: no such field; did you mean 'concurrency'?" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "state").exists()


def test_the_command_line_says_a_dead_server_and_names_the_field_and_the_log(tmp_path):
    address = "http://127.0.0.1:1/web.parquet"
    done = vlmflow(
        "run", TINY, f"data.seed.sources.captions.table={address}", "--state-dir", str(tmp_path / "state"),
        VLMFLOW_ROOT=str(tmp_path / "root"), MLFLOW_TRACKING_URI="http://127.0.0.1:1",
    )  # fmt: skip
    assert done.returncode == 6, done.stderr + done.stdout
    assert f"data.seed.sources.captions.table: no server answers at {address} (" in done.stderr
    assert "Start the server or correct the address" in done.stderr and "log.txt" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "root/shards").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.ocr.optimzer.clip=1", r"stages\.ocr\.optimzer: no such field; did you mean 'optimizer'\? Allowed here: .*schedule"),
        ("pull.timeout=10s", r"pull\.timeout: Input should be a valid number.*got '10s'.*; the field is: seconds .*one URL"),
        ("pull.timeout=[10", r"override 'pull\.timeout=\[10': the value is not YAML"),
    ],
)  # fmt: skip
def test_a_recipe_typo_names_the_field_what_is_allowed_and_the_unit(override, message):
    with pytest.raises(RecipeError, match=message):
        recipe.load(TINY, [override])


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no recipe at .*nothere\.yaml.*give the path or URI"):
        recipe.load(tmp_path / "nothere.yaml")


# --- tables and pictures -----------------------------------------------------------------------------------------------


def test_a_missing_column_is_said_before_anything_is_fetched(server, tmp_path):
    good = table(tmp_path / "a.csv", [server.url(f"/img/{i}") for i in range(6)])
    bad = table(tmp_path / "b.csv", [server.url(f"/img/{i}") for i in range(6, 9)], column="link")
    with pytest.raises(
        DataError, match=r"b\.csv has no column 'url'; it has \['link', 'text'\]. Set data\.web\.sources\.b\.url_column"
    ):
        pull.run(pulling(tmp_path, a=good, b=bad), "web")
    assert server.images == 0, "the good source was not begun either"
    assert pull.run(pulling(tmp_path, a=good, b={"table": bad, "url_column": "link"}), "web").samples == 9


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "t.json"])
def test_a_table_that_is_something_else_is_named_with_its_field(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00\x1f\x8b garbage")
    with pytest.raises(DataError, match=rf"data\.web\.sources\.a\.table: .*{name}"):
        pull.run(pulling(tmp_path, a=str(tmp_path / name)), "web")


def test_a_dead_table_server(tmp_path):
    with serving() as gone:
        uri = gone.url("/table/7.csv")
    with pytest.raises(
        ServiceError, match=r"table http://127.0.0.1:\d+/table/7.csv could not be fetched: refused .*Start it"
    ):
        pull.run(pulling(tmp_path, a=uri), "web")
    with serving() as back:
        assert pull.run(pulling(tmp_path, a=back.url("/table/7.csv")), "web").samples == 7


def test_a_dead_image_server_loses_no_row(server, tmp_path):
    uri = table(tmp_path / "t.csv", [server.url(f"/img/{i}") for i in range(12)])
    ctx = pulling(tmp_path, web=uri)
    server.down = True
    with pytest.raises(StepFailed, match=r"of 5 rows failed .*http_503.*run the step again"):
        pull.run(ctx, "web")
    server.down = False
    digest = pull.run(ctx, "web").digest
    assert undisturbed(tmp_path, ctx) == (digest, contents(Path(ctx.root)))


def test_corrupt_and_enormous_pictures_are_counted_and_found_again_when_mended(server, tmp_path):
    urls = [server.url(f"/img/{i}") for i in range(10)] + [server.url("/cut/x"), server.url("/bomb/xx")]
    ctx = pulling(tmp_path, web=table(tmp_path / "t.csv", urls))
    with pytest.raises(
        StepFailed, match=r"2 of 12 rows failed .*allows 10.0%.*1 x corrupt.*1 x too_many_pixels"
    ) as error:
        pull.run(ctx, "web")
    assert "web-00000010 " in str(error.value) and "(1600000000 pixels, the limit is 50000000" in str(error.value)
    server.mended = True
    manifest = pull.run(ctx, "web")
    assert manifest.samples == 12, "the pictures behind the same URLs are good now"
    assert server.images == 10, "what was good before is not fetched again"
    mended = contents(Path(ctx.root))
    assert not [name for name in mended if name.endswith(".retry.json")]
    digest, whole = undisturbed(tmp_path, ctx)
    assert digest == manifest.digest and whole == {name: mended[name] for name in whole}


def test_cut_files_of_a_finished_shard_are_made_again(server, tmp_path):
    ctx = pulling(tmp_path, web=table(tmp_path / "t.csv", [server.url(f"/img/{i}") for i in range(5)]))
    digest, whole = pull.run(ctx, "web").digest, contents(Path(ctx.root))
    for name in [name for name in whole if name.startswith("shards/")]:
        path = Path(ctx.root, name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert pull.run(ctx, "web").digest == digest
        assert contents(Path(ctx.root)) == whole, name


# --- servers in the middle of a run ------------------------------------------------------------------------------------


def test_failures_of_a_sick_text_server_do_not_stay(tmp_path, monkeypatch):
    from aiohttp import web

    impatient(monkeypatch, attempts=2)
    manifest = dataset(tmp_path / "shards", [sample(f"k{i}", "t", png(i)) for i in range(8)])
    spec = {"engine": "openai", "model_name": "m", "endpoint_env": "TEST_URL", "concurrency": 1, "lost_limit": 0.25}
    curation = recipe.load(TINY).curation.model_dump()
    curation["caption"] |= spec
    from vlmflow.recipe.curation import CurationSpec

    ctx = Context(
        SimpleNamespace(seed=1, curation=CurationSpec(**curation)), str(tmp_path / "root"), tmp_path / "scratch"
    )  # type: ignore[arg-type]
    ok = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "a red square"}, "finish_reason": "stop"}]
    }
    with text_server(lambda body, n: ok if n <= 5 else web.Response(status=500)) as (_, url):
        monkeypatch.setenv("TEST_URL", url)
        with pytest.raises(
            ServiceError,
            match=r"3 of 4 requests without an answer after 2 attempts each \(3 x HTTP 500\); the recipe allows 25.0% \(lost_limit\)",
        ):
            caption.run(ctx, manifest)
    with text_server(lambda body, n: ok) as (server, url):
        monkeypatch.setenv("TEST_URL", url)
        sealed = caption.run(ctx, manifest)
    assert len(server.bodies) == 3, "the first shard and the answer within the second were kept"
    assert sum(part.failed for part in sealed.layer("synthetic").parts) == 0


def test_an_mlflow_server_that_is_down(tmp_path, monkeypatch):
    import registry_samples as samples

    from vlmflow.errors import RegistryError
    from vlmflow.registry import run as registry

    ctx = samples.context(tmp_path)
    model = samples.published(ctx, tmp_path)
    before = contents(tmp_path / "root")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(
        RegistryError,
        match=r"no MLflow server answers at MLFLOW_TRACKING_URI=http://127.0.0.1:1 .*run the same command again",
    ):
        registry.run(ctx, model, samples.score_table(model))
    assert contents(tmp_path / "root") == before


# --- a full disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_says_both_numbers_and_the_second_run_finishes(tmp_path, monkeypatch):
    manifest = dataset(tmp_path / "shards", [sample(f"k{i}", "t", png(i)) for i in range(8)])
    ctx = Context(SimpleNamespace(), str(tmp_path / "root"), tmp_path / "scratch")  # type: ignore[arg-type]
    computed = []

    def step() -> str:
        def compute(reader, _):
            computed.append(reader.uri)
            return [{"key": key, "text": key} for key in reader.keys()]

        return add_layer(ctx, manifest, "x", params={}, version=1, schema={"text": "str"}, compute=compute).digest

    sync, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            NoSpace,
            match=r"\.parquet: the object needs \d+ bytes, \d+ are free: the disk is full; free some space and run",
        ):
            step()
    assert len(contents(tmp_path / "root")) == 1 and not list((tmp_path / "root").rglob("*.tmp"))
    assert step() and len(computed) == 3, "the finished part was kept"


def test_any_step_says_a_full_disk_as_such(tmp_path, monkeypatch):
    """Also where a library wrote (safetensors has errors of its own), and when the disk of the events is full too."""
    monkeypatch.setenv("VLMFLOW_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("VLMFLOW_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("VLMFLOW_PROGRESS", str(tmp_path / "events.jsonl"))
    with pytest.raises(NoSpace, match="disk is full"), open_step("train", TINY):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert (last["state"], last["code"]) == ("failed", 3) and last["note"].startswith("NoSpace: ")
    assert full_disk(ValueError("something else")) is None


# --- damage in the store -----------------------------------------------------------------------------------------------


def test_a_flipped_byte_in_a_stored_model(tmp_path, monkeypatch):
    install(monkeypatch, soups.answer)
    ctx = soups.context(tmp_path)

    def train() -> store.ModelRef:
        return store.find(ctx, "candidate-a") or soups.candidate(ctx, tmp_path, "a", 4.0)

    model = train()
    path = Path(ctx.root, "models/candidate-a/model.safetensors")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(
        ModelError,
        match=rf"'a': model.safetensors has {len(good)} bytes and sha256 .* were recorded.*Delete .*candidate-a/model.json and run",
    ):
        evaluation.run(ctx, model, "report")
    Path(ctx.root, "models/candidate-a/model.json").unlink()  # as the message says
    assert train() == model and path.read_bytes() == good
    assert evaluation.run(ctx, model, "report").mean == 0.4


def test_a_benchmark_with_a_bad_row_and_a_second_run(tmp_path, monkeypatch):
    install(monkeypatch, soups.answer)
    ctx = soups.context(tmp_path)
    model = soups.candidate(ctx, tmp_path, "a", 4.0)
    good = (tmp_path / "t.tsv").read_text()
    (tmp_path / "t.tsv").write_text(good.replace("report1\tRead.\t1", "report1\tRead.\t"))
    with pytest.raises(DataError, match=r"t\.tsv: row report1, column answer: empty"):
        evaluation.run(ctx, model, "report")
    (tmp_path / "t.tsv").write_text(good)
    assert isinstance(evaluation.run(ctx, model, "report"), Scores)


def test_a_flipped_byte_in_a_layer_is_noticed_and_mended(tmp_path):
    manifest = dataset(tmp_path / "shards", [sample(f"k{i}", "t", png(i)) for i in range(4)])
    ctx = Context(SimpleNamespace(), str(tmp_path / "root"), tmp_path / "scratch")  # type: ignore[arg-type]

    def step() -> str:
        def compute(reader, _):
            return [{"key": key, "text": f"a long text of {key}"} for key in reader.keys()]

        return add_layer(ctx, manifest, "x", params={}, version=1, schema={"text": "str"}, compute=compute).digest

    digest = step()
    (part,) = (tmp_path / "root/layers").rglob("*.parquet")
    good, rows, noticed = part.read_bytes(), pq.read_table(part).to_pylist(), 0
    for place in range(4, len(good), 7):
        part.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        step()  # a byte of the file's own statistics may pass: then the rows are still those that were computed
        assert part.read_bytes() == good or pq.read_table(part).to_pylist() == rows, f"byte {place}"
        noticed += part.read_bytes() == good
        part.write_bytes(good)
    assert noticed > 0.6 * len(range(4, len(good), 7)) and step() == digest


def test_a_store_that_is_away_is_no_reason_to_train_from_the_start(tmp_path, monkeypatch):
    import torch

    from vlmflow.training import checkpoint

    base, work, tensors = str(tmp_path / "base"), tmp_path / "work", {"w": torch.zeros(4)}
    for step in (1, 2):
        checkpoint.save(base, checkpoint.Snapshot(step, tensors, tensors, {"plan": "p"}, ""), work, 2)

    def away(uri: str) -> None:
        raise Unreachable("the store does not answer")

    with monkeypatch.context() as patch, pytest.raises(Unreachable):
        patch.setattr(storage, "read_json", away)
        checkpoint.newest(base, work)
    weights = tmp_path / "base/step-00000002" / checkpoint.WEIGHTS
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[: size // 2])
    found, ignored = checkpoint.newest(base, work)
    assert found is not None and found.step == 1
    assert f"step 2: {checkpoint.WEIGHTS} has {size // 2} bytes, {size} were recorded" in ignored[0]


@pytest.mark.parametrize("damage", [b"", b'{"accuracy": 1.0}', b"not json"])
def test_a_damaged_score_is_made_again(tmp_path, monkeypatch, damage):
    install(monkeypatch, soups.answer)
    ctx = soups.context(tmp_path)
    model = soups.candidate(ctx, tmp_path, "a", 4.0)
    whole, good = evaluation.run(ctx, model, "report"), contents(Path(ctx.root))
    (marker,) = Path(ctx.root, "scores").rglob("score.json")
    marker.write_bytes(damage)
    assert evaluation.run(ctx, model, "report") == whole and contents(Path(ctx.root)) == good
    with pytest.raises(ModelError, match=r"holds 3 bytes that are not a model reference.*Delete it"):
        Path(ctx.root, "models/candidate-a/model.json").write_bytes(b"{\n}")
        store.find(ctx, "candidate-a")
