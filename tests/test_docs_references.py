"""What the documentation points at exists: tests, files, links, commands; and workarounds that have no other test."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from vlmflow import local_stack, storage, storage_s3
from vlmflow.errors import StorageError
from vlmflow.local_state import StackInfo

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md"])
_TOP = ("vlmflow/", "tests/", "docs/", "recipes/", "pipelines/", "components/", "benchmarks/", "requirements/")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path) -> None:
    last = ""
    for file, name in re.findall(r"(?:\b(test_\w+\.py))?::(test_\w+)", page.read_text(encoding="utf-8")):
        last = file or last
        assert re.search(rf"def {name}\(", (ROOT / "tests" / last).read_text(encoding="utf-8")), f"{last}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_links_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`([\w./-]+)`", text):
        if path.startswith(_TOP) and not path.endswith("/"):
            assert (ROOT / path).is_file(), path
        elif re.fullmatch(r"test_\w+\.py", path):
            assert any((ROOT / "tests").rglob(path)), path
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.is_file(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, link


def test_the_local_servers_keep_the_settings_that_were_measured(tmp_path: Path) -> None:
    """rclone: MD5 for every HEAD, and a core for a cache time of 0; MLflow: a job runner of its own."""
    command = local_stack._command(tmp_path, "s3", 9)
    options = dict(pairwise(command))
    assert options["--etag-hash"] == "none" and options["--vfs-cache-mode"] == "off"
    assert options["--dir-cache-time"] == "100ms", "0s re-arms rclone's cleanup timer at once and spends a core"
    info = StackInfo("http://127.0.0.1:9", "key", "secret", "vlmflow", "http://127.0.0.1:8", tmp_path)
    assert local_stack._server_environment(info)["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_the_store_is_asked_only_for_what_every_server_can_do() -> None:
    """rclone empties objects on tags and ACLs, ignores conditions and fails at multi-part copies."""
    asked = set(re.findall(r"self\.client\.(\w+)\(", inspect.getsource(storage_s3)))
    assert asked == {
        "stat_object", "get_object", "put_object", "fput_object", "list_objects", "remove_object", "make_bucket"
    }  # fmt: skip


@pytest.mark.slow
def test_a_key_that_is_also_a_folder_is_refused_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = local_stack.up(tmp_path / "state", services=["s3"])
    try:
        for name, value in local_stack.environment(info).items():
            monkeypatch.setenv(name, value)
        storage.write_bytes("s3://vlmflow/a/b", b"1")
        with pytest.raises(StorageError, match="a key is also the folder of others"):
            storage.write_bytes("s3://vlmflow/a", b"2")
        limit = time.monotonic() + 20  # rclone hides what is in the folder until its directory cache has run out
        while not storage.exists("s3://vlmflow/a/b") and time.monotonic() < limit:
            time.sleep(0.05)
        assert storage.read_bytes("s3://vlmflow/a/b") == b"1"
    finally:
        local_stack.down(tmp_path / "state")


@pytest.mark.slow
def test_deepspeed_builds_nothing_on_cpus_and_leaves_mlflow_alone() -> None:
    code = (
        "import os, sys; os.environ['DS_ACCELERATOR'] = 'cpu'\n"
        "from vlmflow.training.engine import import_deepspeed\n"
        "deepspeed = import_deepspeed()\n"
        "assert vars(deepspeed.ops)['__compatible_ops__'] == {} and 'mlflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
