"""A stage trained by the TrainJob launcher on an emulated cluster whose nodes really run, each with a disk of its own and
an object store between them: equal to a local training."""

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
from vlmflow.step import Context
from vlmflow.storage_s3 import s3_store
from vlmflow.training import launchers, plan_file
from vlmflow.training import run as training
from vlmflow.training.job import PREEMPTED
from vlmflow.training.launch import TrainingPreempted
from vlmflow.training.trainjob import config as settings
from vlmflow.training.trainjob import wait

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow

STAGE: dict[str, Any] = {"processes": 2, "epochs": 4, "max_steps": 16, "checkpoint": {"every": 2, "keep": 2}}
INSTALLATION = {
    "namespace": NAMESPACE,
    "pools": {"default": {"gpus": 0, "processes": 1}},
    "env": [{"name": "GLOO_SOCKET_IFNAME", "value": "lo"}],
}


BUCKET = "s3://cluster"


class Place:
    """A model and a dataset in an object store, and the same stage trained by two processes of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.init = world.initial(self.context("shared"))
        local = world.dataset(folder, [world.sample(i, images=i % 4 != 1) for i in range(24)])
        for path in sorted((folder / "shards").iterdir()):
            storage.put_file(path, storage.join(BUCKET, "shards", path.name))
        moved = [
            shard.model_copy(update={"uri": storage.join(BUCKET, "shards", shard.uri.rsplit("/", 1)[-1])})
            for shard in local.shards
        ]
        self.data = local.model_copy(update={"shards": moved})
        self.local = self.train("local")

    def context(self, name: str, **stage: Any) -> Context:
        made = world.recipe(**{**STAGE, **stage})
        return Context(made, storage.join(BUCKET, name), self.folder / name / "scratch", "test")

    def weights(self, ref: ModelRef) -> dict[str, Any]:
        """Published tensors by name."""
        from safetensors.torch import load

        (file,) = [file.path for file in ref.files if file.path.endswith(".safetensors")]
        return load(storage.read_bytes(storage.join(ref.uri, file)))

    def train(self, name: str, **stage: Any) -> ModelRef:
        return training.run(self.context(name, **stage), "sft", self.init, {"seed": self.data})


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, str]]:
    """An S3 server with one bucket, and the environment that leads there."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "VLMFLOW_S3_ENDPOINT": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing-key",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3_store().make_bucket(BUCKET.removeprefix("s3://"))
        yield environment
    server.stop()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, store: dict[str, str]) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def nodes(tmp_path: Path, store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubelet]:
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
    kubelet = Kubelet(cluster, tmp_path / "volumes", store)
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
    scratch = [nodes.folder / f"pod-0-{number}" / "scratch" for number in (0, 1)]
    assert all(any(path.rglob("*.safetensors")) for path in scratch), "each node fetched the model onto its own disk"
    folder = ref.lineage.log_uri.rsplit("/", 1)[0]
    assert len(storage.read_bytes(ref.lineage.log_uri).splitlines()) == 16
    assert storage.read_json(f"{folder}/trainable.json")["plan"]["steps"] == 16
    shown = capsys.readouterr().err
    assert "2 nodes with 1 processes each" in shown and "16 steps of" in shown and "projector" in shown
    assert storage.list_uris(storage.join(BUCKET, "cluster", "checkpoints")) == []


def test_two_nodes_of_two_ranks_learn_what_one_process_does(
    place: Place, nodes: Kubelet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`benchmarks/train_nodes.py` compares the bits with four local processes."""
    pools = {"pools": {"default": {"gpus": 0, "processes": 2}}}
    monkeypatch.setenv(settings.VARIABLE, yaml.safe_dump(INSTALLATION | pools))
    stage = {"packs": 4, "max_steps": 4}
    ref = place.train("wide", processes=4, **stage)
    assert nodes.codes == [[0, 0]] and "2 nodes with 2 processes each" in capsys.readouterr().err
    monkeypatch.setenv(launchers.VARIABLE, "local")
    one = place.train("one", processes=1, **stage)
    found, expected, begun = (place.weights(model) for model in (ref, one, place.init))
    assert max(float((found[n] - expected[n]).abs().max()) for n in expected) < 1e-5
    assert max(float((found[n] - begun[n]).abs().max()) for n in begun) > 1e-2


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
    (codes,) = nodes.codes  # one attempt; the other node fails by itself or is told to leave
    assert DataError.exit_code in codes and set(codes) <= {DataError.exit_code, PREEMPTED}


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
