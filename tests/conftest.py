"""Shared fixtures: small images, shards and a recipe; no test touches the network beyond loopback."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLMFLOW_QUIET", "1")


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """A local object store and MLflow server of a test module's own."""
    from vlmflow import local_stack

    state = tmp_path_factory.mktemp("stack") / "state"
    yield local_stack.up(state)
    local_stack.down(state)
