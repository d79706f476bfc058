"""What the local stack remembers between commands: its folder, ports and credentials.

Ports and keys are chosen at random once and then kept, so that addresses in a user's shell stay valid. The folder holds
`credentials.json` (mode 0600), `stack.json` (ports), `run/` (pid files), `logs/`, `s3/` (buckets) and `mlflow/`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vlmflow import processes
from vlmflow.errors import ServiceError

BUCKET = "vlmflow"
LOOPBACK = "127.0.0.1"
SERVICES = ("s3", "mlflow")
LEAST_FREE_BYTES = 256 * 2**20  # below this a store accepts a few objects and then fails in the middle of a step


@dataclass(frozen=True)
class StackInfo:
    """Where the running stack is and how to sign in. `secret_key` is left out of repr so that it stays out of logs."""

    s3_endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str
    mlflow_uri: str
    state_dir: Path

    @property
    def root(self) -> str:
        """Storage root of the stack, `s3://BUCKET`."""
        return f"s3://{self.bucket}"


def pid_file(state: Path, name: str) -> Path:
    return state / "run" / f"{name}.json"


def log_file(state: Path, name: str) -> Path:
    return state / "logs" / f"{name}.log"


def url_of(info: StackInfo, name: str) -> str:
    return info.s3_endpoint if name == "s3" else info.mlflow_uri


def prepare(state: Path) -> None:
    """Make the folders (a bucket of rclone is a folder, so this also makes the bucket) and check for space."""
    for folder in ("run", "logs", f"s3/{BUCKET}", "mlflow/artifacts"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(state).free
    if free < LEAST_FREE_BYTES:
        raise ServiceError(
            f"disk of {state} has {free / 2**20:.0f} MiB free, the local stack wants at least "
            f"{LEAST_FREE_BYTES / 2**20:.0f} MiB: object store and MLflow's database would fail in the middle of a "
            "step. Free space or choose another state folder."
        )


@contextlib.contextmanager
def locked(state: Path) -> Iterator[None]:
    """One `up` or `down` at a time for a state folder; the lock goes with the process that holds it."""
    with open(state / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def load(state: Path) -> StackInfo | None:
    try:
        ports = json.loads((state / "stack.json").read_text())
        keys = json.loads((state / "credentials.json").read_text())
        return StackInfo(
            s3_endpoint=f"http://{LOOPBACK}:{ports['s3']}",
            access_key=keys["access_key"],
            secret_key=keys["secret_key"],
            bucket=BUCKET,
            mlflow_uri=f"http://{LOOPBACK}:{ports['mlflow']}",
            state_dir=state,
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # never written, or damaged by hand: `up` writes it again


def load_or_choose(state: Path, forget: list[str] | None = None) -> StackInfo:
    """Ports and keys of this state folder, chosen at random once; `forget` names services that need a new port."""
    keys_path, ports_path = state / "credentials.json", state / "stack.json"
    if _read_keys(keys_path) is None:
        keys = {"access_key": f"vlmflow{secrets.token_hex(6)}", "secret_key": secrets.token_urlsafe(30)}
        processes.write_private(keys_path, json.dumps(keys, indent=1))
    try:
        ports = {name: int(json.loads(ports_path.read_text())[name]) for name in SERVICES}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        ports, forget = {}, list(SERVICES)
    if forget:
        ports.update(zip(forget, free_ports(len(forget)), strict=True))
        processes.write_private(ports_path, json.dumps(ports, indent=1))
    info = load(state)
    if info is None:
        raise ServiceError(f"{ports_path} or {keys_path} is not readable right after it was written; remove them")
    return info


def _read_keys(path: Path) -> dict[str, str] | None:
    try:
        keys = json.loads(path.read_text())
        return keys if keys["access_key"] and keys["secret_key"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def port_of(state: Path, name: str) -> int:
    return int(json.loads((state / "stack.json").read_text())[name])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT can be bound by a server
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]
