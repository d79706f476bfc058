"""Nodes for the emulated cluster: TrainJobs are really run, as Trainer, JobSet and the kubelet would.

Each node is a process with the TrainJob's command and environment (``PET_*`` as Trainer's torch policy sets it, volumes
as folders of their own, ConfigMaps and Secrets from the test), its output the pod's log. When a node fails, the others
are ended; the TrainJob's condition follows from the exit codes, restarts from the runtime's rules.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from cluster_world import NAMESPACE, TRAINJOBS, Cluster

from vlmflow.training.trainjob.runtime import PERMANENT, training_runtime
from vlmflow.training.trainjob.spec import MOUNTS

ROOT = str(Path(__file__).resolve().parents[1])


class Kubelet:
    """Runs the TrainJobs of a cluster.

    Attributes:
        values: what ConfigMaps and Secrets hold, by the variable that takes it.
        on_line: called with (attempt, node, line) for each line of a pod's log.
    """

    def __init__(self, cluster: Cluster, folder: Path, values: dict[str, str]) -> None:
        self.cluster, self.folder, self.values = cluster, folder, values
        self.restarts = training_runtime("x")["spec"]["template"]["spec"]["failurePolicy"]["maxRestarts"]
        self.on_line: Any = lambda attempt, node, line: None
        self.processes: list[subprocess.Popen] = []
        self.codes: list[list[int]] = []
        self.threads: list[threading.Thread] = []
        cluster.on_create, cluster.on_delete = self.start, self.terminate

    def start(self, job: dict[str, Any]) -> None:
        thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self.threads.append(thread)
        thread.start()

    def join(self) -> None:
        """Wait for what runs; a TrainJob that was deleted ends its pods first."""
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()

    def terminate(self) -> None:
        """SIGTERM to every pod, as a deletion does."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def kill(self, node: int) -> None:
        """SIGKILL to all processes of a pod, as when its machine is gone."""
        os.killpg(self.processes[node].pid, signal.SIGKILL)

    def _run(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        for attempt in range(self.restarts + 1):
            codes = self._attempt(job, attempt)
            self.codes.append(codes)
            found = self.cluster.trainjob(name)
            if found is None or found["metadata"].get("deletionTimestamp"):
                if found is not None:
                    self.cluster.vanish(TRAINJOBS, name)
                return
            if not any(codes):
                self.cluster.condition("Complete", "JobsCompleted")
                return
            if any(code in PERMANENT for code in codes):
                break
        self.cluster.condition("Failed", "FailedJobs", f"exit codes {codes}")

    def _attempt(self, job: dict[str, Any], attempt: int) -> list[int]:
        nodes = job["spec"]["trainer"]["numNodes"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mine = [self._node(job, attempt, number, port) for number in range(nodes)]
        self.processes = mine
        followers = [
            threading.Thread(target=self._follow, args=(attempt, number, process), daemon=True)
            for number, process in enumerate(mine)
        ]
        for follower in followers:
            follower.start()
        for follower in followers:
            follower.join()
        return [process.wait() for process in mine]

    def _pod(self, attempt: int, number: int) -> str:
        return f"pod-{attempt}-{number}"

    def _node(self, job: dict[str, Any], attempt: int, number: int, port: int) -> subprocess.Popen:
        trainer = job["spec"]["trainer"]
        volumes = self.folder / self._pod(attempt, number)
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
        for entry in trainer["env"]:
            value = entry["value"] if "value" in entry else self.values.get(entry["name"])
            if value is None:
                continue  # an optional key that is not there
            for volume, path in MOUNTS.items():
                if value == path or value.startswith(f"{path}/"):
                    (volumes / volume).mkdir(parents=True, exist_ok=True)
                    value = str(volumes / volume) + value[len(path) :]
                    break
            env[entry["name"]] = value
        env |= {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(number),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(port),
        }
        assert job["metadata"]["namespace"] == NAMESPACE
        command = [sys.executable if part == "python" else part for part in trainer["command"]]
        self.cluster.pod(self._pod(attempt, number), "Running", number)
        return subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _follow(self, attempt: int, number: int, process: subprocess.Popen) -> None:
        pod = self._pod(attempt, number)
        assert process.stdout is not None
        for line in process.stdout:
            self.cluster.write(pod, line.rstrip("\n"))
            self.on_line(attempt, number, line)
        if process.wait():
            for other in self.processes:  # backoffLimit 0: one pod down, the whole JobSet is
                if other.poll() is None:
                    other.send_signal(signal.SIGTERM)
