"""`vlmflow data`: the commands on a manifest, on a dataset's name, and on what is not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import look_world
import pytest

from vlmflow import cli

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["show", "stats", "gallery", "diff", "trace", "export"]


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", *arguments])
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMFLOW_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    return look_world.write(look_world.small(tmp_path), tmp_path / "m.json")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\nfrom vlmflow import cli\n"
        "try: cli.main(['data', sys.argv[1], '--help'])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "found = {'duckdb', 'pyarrow', 'PIL', 'numpy', 'aiohttp', 'torch', 'http.server'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_show_tells_failures_by_reason(capsys, world):
    code, out, _ = call(capsys, "show", world)
    assert code == 0 and "failed pull" in out and "1 x http_404" in out and "2 x the reply has # words" in out
    code, out, _ = call(capsys, "show", world, "-o", "json")
    shown = json.loads(out)
    assert shown["failures"]["pull"] == {"http_404": 1, "bad_url": 1} and shown["sources"]["docs"]["samples"] == 8


def test_stats_prints_json_and_writes_a_page(capsys, world, tmp_path):
    code, out, _ = call(capsys, "stats", world, "--page", str(tmp_path / "out" / "stats.html"), "-o", "json")
    assert code == 0 and json.loads(out)["columns"]["ppl.ppl"]["filled"] == 22
    assert "<svg" in (tmp_path / "out" / "stats.html").read_text()
    code, out, _ = call(capsys, "stats", world)
    assert code == 0 and "ppl.ppl" in out


def test_gallery_writes_a_file_with_filters(capsys, world, tmp_path):
    code, out, _ = call(capsys, "gallery", world, "source=docs", "--to", str(tmp_path / "g.html"))
    assert code == 0 and "wrote" in out and "docs-000000" in (tmp_path / "g.html").read_text()
    code, _, err = call(capsys, "gallery", world, "sort=nothing")
    assert code == 2 and "there is no column 'nothing'" in err and "Traceback" not in err


def test_gallery_serves_until_it_is_interrupted(world):
    import signal

    command = [sys.executable, "-u", "-m", "vlmflow.cli", "data", "gallery", world, "--serve"]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell hands down that it is ignored
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=60) as answer:
            assert b"24 of 24 samples" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_diff_and_trace(capsys, world, tmp_path):
    other = look_world.write(look_world.small(tmp_path / "b", 1.5), tmp_path / "b.json")
    code, out, _ = call(capsys, "diff", world, other, "--examples", "1")
    assert code == 0 and "layer keep: threshold 13.0 -> 14.5" in out and "kept -> dropped: 6 samples" in out
    code, out, _ = call(capsys, "diff", world, world, "-o", "json")
    assert code == 0 and json.loads(out)["same"] is True
    code, out, _ = call(capsys, "trace", "web-00000002", world, "--image", str(tmp_path / "two.png"))
    assert (
        code == 0
        and "web-00000002: kept" in out
        and (tmp_path / "two.png").read_bytes() == look_world.picture(2, (64, 128))
    )
    code, _, err = call(capsys, "trace", "web-00000100", world, "--image", str(tmp_path / "no.png"))
    assert code == 2 and "has no picture" in err and not (tmp_path / "no.png").exists()
    code, _, err = call(capsys, "trace", "web-00000002")
    assert code == 2 and "--from-model" in err


def test_a_dataset_of_the_last_run_is_found_by_name(capsys, world, tmp_path):
    run = tmp_path / "state" / "runs" / "2026-01-01-a"
    artifact = run / "artifacts" / "keep" / "data"
    artifact.parent.mkdir(parents=True)
    shutil.copy(ROOT / "recipes" / "points-tiny.yaml", run / "recipe.yaml")
    shutil.copy(world, artifact)
    whole = look_world.small(tmp_path)
    for task, part in (("a-group", {"shards": whole.shards[:1]}), ("a-pull", {"layers": {}, "lineage": []})):
        (run / "artifacts" / task).mkdir()
        look_world.write(whole.model_copy(update=part), run / "artifacts" / task / "data")
    code, out, _ = call(capsys, "show", "web", "--state-dir", str(tmp_path / "state"))
    assert code == 0 and "layer  keep" in out and out.startswith("web  24 samples")
    code, _, err = call(capsys, "show", "sft", "--state-dir", str(tmp_path / "state"))
    assert code == 2 and "its runs have web" in err


def test_what_is_not_there_is_said(capsys, world, tmp_path):
    code, _, err = call(capsys, "show", "web", "--state-dir", str(tmp_path / "nothing"))
    assert code == 2 and "neither a file, a URI nor a dataset" in err
    (tmp_path / "broken.json").write_text("{}")
    code, _, err = call(capsys, "stats", str(tmp_path / "broken.json"))
    assert code == 2 and "is not a dataset manifest" in err
    code, _, err = call(capsys, "stats", f"file://{tmp_path}/none.json")
    assert code == 3


def test_export_writes_what_is_kept_in_both_forms(capsys, world, tmp_path):
    import pyarrow.parquet as pq

    kept = [i for i in range(24) if i % 12 != 5 and i % 8 <= 3]
    folder = tmp_path / "out" / "parquet"
    arguments = [
        "export",
        world,
        "--to",
        str(folder),
        "--format",
        "parquet",
        "--kept",
        "--layers",
        "fused,ppl",
        "--samples-per-file",
        "5",
    ]
    code, out, err = call(capsys, *arguments, "-o", "json")
    assert code == 0, err
    made = json.loads(out)
    assert made["samples"] == len(kept) and [file["samples"] for file in made["files"]] == [5, 5, 1]
    tables = [pq.read_table(path) for path in sorted(folder.rglob("*.parquet"))]
    assert [key for table in tables for key in table.column("ppl_ppl").to_pylist()] == [10.0 + i % 8 for i in kept]
    code, out, _ = call(capsys, *arguments)
    assert code == 0 and "11 samples in 3 files (3 were there already), 13 not kept" in out
    code, out, err = call(
        capsys, "export", world, "--to", str(tmp_path / "out" / "tars"), "--layers", "all", "--caption", "fused"
    )
    assert code == 0 and list((tmp_path / "out" / "tars").rglob("*.tar")), err
    code, _, err = call(capsys, "export", world, "--to", str(tmp_path / "x"), "--layers", "nothing")
    assert code == 2 and "nothing" in err
