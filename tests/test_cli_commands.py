"""The command line: quick help without heavy imports, clear errors with their exit codes, text and JSON output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmflow import cli

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "recipes/points-tiny.yaml")
HEAVY = ["torch", "transformers", "mlflow", "kfp", "deepspeed", "pyarrow", "matplotlib", "numpy", "minio", "PIL"]


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


@pytest.mark.parametrize(
    "command", [[], ["run"], ["plan", "data"], ["recipe", "show"], ["demo"], ["compile"], ["status"]]
)
def test_help_imports_nothing_heavy_and_opens_no_connection(command):
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from vlmflow import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        f"found = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "assert not found, found\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_recipe_show_prints_what_validate_accepts(capsys, tmp_path):
    code, out, _ = call(capsys, "recipe", "show", TINY, "seed=5")
    assert code == 0 and "seed: 5" in out
    (tmp_path / "again.yaml").write_text(out)
    code, out, _ = call(capsys, "recipe", "validate", str(tmp_path / "again.yaml"), "-o", "json")
    assert code == 0 and json.loads(out)["candidates"] == ["charts", "pairs", "describe"]


def test_recipe_show_as_json(capsys):
    code, out, _ = call(capsys, "recipe", "show", TINY, "--output", "json")
    assert code == 0 and json.loads(out)["name"] == "points-tiny"


def test_a_typo_is_an_error_on_stderr_with_exit_code_2(capsys):
    code, out, err = call(capsys, "recipe", "validate", TINY, "curation.keep.fractoin=0.3")
    assert code == 2 and out == ""
    assert "curation.keep.fractoin" in err and "did you mean 'fraction'" in err and "Traceback" not in err


def test_a_missing_recipe_is_wrong_input(capsys):
    code, _, err = call(capsys, "run", "/nowhere/recipe.yaml")
    assert code == 2 and "there is no recipe at /nowhere/recipe.yaml" in err


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("data.extra={sources: {a: {table: x.csv}}}", "data"),
        ("soup=null", "soup"),
    ],
)
def test_a_recipe_that_the_pipeline_would_not_run_whole_is_refused(capsys, change, field):
    code, _, err = call(capsys, "recipe", "validate", TINY, change)
    assert code == 2 and field in err


def test_a_recipe_is_validated_for_the_pipeline_that_is_asked_for(capsys):
    code, out, _ = call(capsys, "recipe", "validate", TINY, "soup=null", "--pipeline", "curate")
    assert code == 0 and "is valid" in out
    code, _, err = call(capsys, "recipe", "validate", TINY, "soup=null", "--pipeline", "soup")
    assert code == 2 and "soup: the soup pipeline ends in a soup" in err


def test_compile_writes_a_package_with_the_given_image(capsys, tmp_path):
    image = "registry.example/vlmflow@sha256:" + "0" * 64
    target = tmp_path / "points.yaml"
    code, out, _ = call(capsys, "compile", "points", "--to", str(tmp_path), "--image", image, "--require-digest")
    assert code == 0 and str(target) in out
    text = target.read_text()
    assert image in text and "vlmflow:0.1.0" not in text


def test_compile_refuses_a_floating_image_when_a_digest_is_asked_for(capsys, tmp_path):
    code, _, err = call(capsys, "compile", "--to", str(tmp_path), "--require-digest")
    assert code == 2 and "image-digest" in err and not list(tmp_path.iterdir())


def test_data_show(capsys, tmp_path):
    from vlmflow.dataset.manifest import Lineage, Manifest, ShardRef, save

    shards = [
        ShardRef(uri=f"file:///s{i}.tar", sha256="a" * 64, bytes=2**20, samples=10, source="web") for i in range(2)
    ]
    uri = save(Manifest(name="web", shards=shards, lineage=[Lineage(step="pull")]), tmp_path.as_uri())
    code, out, _ = call(capsys, "data", "show", uri)
    assert code == 0 and "20 samples" in out and "made by pull" in out
    code, out, _ = call(capsys, "data", "show", uri, "-o", "json")
    assert json.loads(out)["sources"] == {"web": {"shards": 2, "samples": 20, "bytes": 2**21}}


def test_the_result_shows_scores_version_and_report(capsys, tmp_path):
    from vlmflow.local import RunResult

    scores = {"greedy": {"digits": 0.925, "mean": 0.7, "words": 0.5}, "untrained": {"digits": 0.1}}
    summary = {
        "scores": scores,
        "models": ["untrained", "greedy"],
        "chance": {"digits": 0.1},
        "registered": {"name": "n-candidates", "version": "3"},
    }
    result = RunResult("r1", tmp_path, tmp_path / "report.html", summary, {"ocr": 61.0})
    cli._show_result(result, cli.Output.text)
    out = capsys.readouterr().out
    for word in ("92.5%", "10.0%", "(chance)", "greedy", "n-candidates", "version 3", "report.html", "1 min 1 s"):
        assert word in out, word
    assert out.index("untrained") < out.index("greedy") and out.index("words") < out.index("mean")
    cli._show_result(result, cli.Output.json)
    assert json.loads(capsys.readouterr().out)["scores"] == scores


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    from vlmflow import local

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "run", interrupted)
    code, _, err = call(capsys, "run", TINY)
    assert code == 130 and "start the same command again" in err


@pytest.mark.parametrize("arguments", [["demo", "seed=9"], ["demo", TINY, "seed=9"]])
def test_demo_serves_its_tables_and_runs_the_recipe_on_them(capsys, monkeypatch, tmp_path, arguments):
    from contextlib import contextmanager

    from vlmflow import demo, local

    calls = []

    @contextmanager
    def serve(state_dir):
        calls.append("open")
        yield demo.Demo("http://127.0.0.1:9999", tmp_path, tmp_path)
        calls.append("closed")

    def run(recipe, overrides, state_dir, console, processes):
        assert processes == 0
        calls.append((Path(recipe).name, overrides))
        return local.RunResult("r1", tmp_path, None, {}, {})

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "serve", serve)
    monkeypatch.setattr(local, "run", run)
    code, _, _ = call(capsys, *arguments)
    assert code == 0 and calls[0] == "open" and calls[2] == "closed"
    name, overrides = calls[1]
    assert name == "points-tiny.yaml" and overrides[-1] == "seed=9"
    assert "data.seed.sources.captions.table=http://127.0.0.1:9999/tables/seed.parquet" in overrides


def test_run_takes_a_pipeline_its_parameters_and_processes(capsys, monkeypatch, tmp_path):
    from vlmflow import local

    calls = []

    def run(*given):
        calls.append(given[4:])
        return local.RunResult("r1", tmp_path, None, {}, {}, {"web": "s3://bucket/manifests/abc.json"})

    monkeypatch.setattr(local, "run", run)
    options = ["--pipeline", "train", "-p", "stage=align", "-p", "model=models:/n/1", "--processes", "3"]
    code, out, _ = call(capsys, "run", TINY, *options)
    assert (code, calls) == (0, [("train", {"stage": "align", "model": "models:/n/1"}, 3)])
    assert "dataset    web s3://bucket/manifests/abc.json" in out
    code, _, err = call(capsys, "run", TINY, "-p", "stage")
    assert code == 2 and "--parameter stage: expected NAME=VALUE" in err


def test_up_prints_its_variables_for_a_shell(capsys, monkeypatch, tmp_path):
    from vlmflow import local_stack

    monkeypatch.setattr(local_stack, "up", lambda state, say: "info")
    monkeypatch.setattr(
        local_stack, "environment", lambda info: {"AWS_ACCESS_KEY_ID": "a b", "VLMFLOW_ROOT": "s3://vlmflow"}
    )
    code, out, _ = call(capsys, "up", "--export", "--state-dir", str(tmp_path))
    assert code == 0 and out == "export AWS_ACCESS_KEY_ID='a b'\nexport VLMFLOW_ROOT=s3://vlmflow\n"


def test_status_says_that_nothing_runs(capsys, tmp_path):
    code, out, _ = call(capsys, "status", "--state-dir", str(tmp_path), "-o", "json")
    assert code == 6 and [row["running"] for row in json.loads(out)] == [False, False]
