"""Shared fixtures: small images, shards and a recipe; no test touches the network beyond loopback."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLMFLOW_QUIET", "1")


@pytest.fixture(scope="module")
def moto():
    """An S3 server of a test module's own, in memory: the environment that leads to it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "VLMFLOW_S3_ENDPOINT": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing-key",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """A local object store and MLflow server of a test module's own."""
    from vlmflow import local_stack

    state = tmp_path_factory.mktemp("stack") / "state"
    yield local_stack.up(state)
    local_stack.down(state)
