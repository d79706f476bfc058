"""A stage trained by the TrainJob launcher on an emulated cluster whose nodes really run: equal to a local training."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import training_world as world
import yaml
from cluster_kubelet import Kubelet
from cluster_world import NAMESPACE, Cluster

from vlmflow import storage
from vlmflow.errors import DataError
from vlmflow.models.store import ModelRef
from vlmflow.training import launchers, plan_file
from vlmflow.training import run as training
from vlmflow.training.job import PREEMPTED
from vlmflow.training.launch import TrainingPreempted
from vlmflow.training.trainjob import config as settings
from vlmflow.training.trainjob import wait

pytest.importorskip("deepspeed")

STAGE: dict[str, Any] = {"processes": 2, "epochs": 4, "max_steps": 16, "checkpoint": {"every": 2, "keep": 2}}
INSTALLATION = {
    "namespace": NAMESPACE,
    "pools": {"default": {"gpus": 0, "processes": 1}},
    "env": [{"name": "GLOO_SOCKET_IFNAME", "value": "lo"}],
}


class Place:
    """A model, a dataset, and the same stage trained by two processes of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.init = world.initial(world.context(root, world.recipe()))
        self.data = world.dataset(root, [world.sample(i, images=i % 4 != 1) for i in range(24)])
        self.local = self.train("local")

    def train(self, name: str, **stage: Any) -> ModelRef:
        ctx = world.context(self.root / name, world.recipe(**{**STAGE, **stage}))
        return training.run(ctx, "sft", self.init, {"seed": self.data})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubelet]:
    """Nodes of a cluster that the environment of this process points at."""
    cluster = Cluster()
    kubeconfig = {
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": cluster.url}}],
        "users": [{"name": "test", "user": {"token": "planted-token"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setenv(launchers.VARIABLE, "trainjob")
    monkeypatch.setenv(settings.VARIABLE, yaml.safe_dump(INSTALLATION))
    monkeypatch.setattr(wait, "POLL_RUNNING", 0.3)
    kubelet = Kubelet(cluster, tmp_path / "volumes", {})
    yield kubelet
    kubelet.terminate()
    kubelet.join()
    cluster.close()


def files(ref: ModelRef) -> dict[str, str]:
    return {file.path: file.sha256 for file in ref.files}


def test_two_nodes_publish_what_two_local_processes_do(
    place: Place, nodes: Kubelet, capsys: pytest.CaptureFixture
) -> None:
    ref = place.train("cluster")
    assert files(ref) == files(place.local) and ref.lineage.parents == place.local.lineage.parents
    assert nodes.codes == [[0, 0]]
    folder = ref.lineage.log_uri.rsplit("/", 1)[0]
    assert len(storage.read_bytes(ref.lineage.log_uri).splitlines()) == 16
    assert storage.read_json(f"{folder}/trainable.json")["plan"]["steps"] == 16
    shown = capsys.readouterr().err
    assert "2 nodes with 1 processes each" in shown and "16 steps of" in shown and "projector" in shown
    assert storage.list_uris(storage.join(str(place.root / "cluster"), "checkpoints")) == []


def test_a_killed_node_restarts_all_and_the_model_is_the_same(place: Place, nodes: Kubelet) -> None:
    killed = threading.Event()

    def kill(attempt: int, node: int, line: str) -> None:
        if '"checkpoint"' in line and not killed.is_set():
            killed.set()
            nodes.kill(1)

    nodes.on_line = kill
    ref = place.train("killed")
    assert killed.is_set() and len(nodes.codes) == 2 and nodes.codes[1] == [0, 0]
    assert files(ref) == files(place.local)


def test_an_error_of_a_rank_arrives_as_it_is_and_is_not_restarted(place: Place, nodes: Kubelet) -> None:
    def damage(job: dict[str, Any]) -> None:
        folder = job["metadata"]["annotations"]["vlmflow.io/job"].rsplit("/", 1)[0]
        storage.write_bytes(storage.join(folder, "plan", plan_file.MARKER), b"{cut")
        nodes.start(job)

    nodes.cluster.on_create = damage
    with pytest.raises(DataError, match=r"plan\.json holds 4 bytes that are not JSON"):
        place.train("damaged")
    assert nodes.codes == [[DataError.exit_code] * 2]


def test_cancelled_and_run_again_goes_on(place: Place, nodes: Kubelet) -> None:
    nodes.cluster.slow_deletion = True

    def cancel(attempt: int, node: int, line: str) -> None:
        if '"plan"' in line:
            os.kill(os.getpid(), signal.SIGTERM)

    nodes.on_line = cancel
    with pytest.raises(TrainingPreempted, match="was deleted, its pods write a checkpoint"):
        place.train("cancelled")
    nodes.on_line = lambda *_: None
    ref = place.train("cancelled")
    assert files(ref) == files(place.local)
    assert nodes.codes == [[PREEMPTED, PREEMPTED], [0, 0]], "both ranks left after the checkpoint"
