"""One control plane for all tests of this folder, and places in it: a restricted namespace with the documented secrets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chart_case
import crds
import pytest
from control_plane import ControlPlane
from place import Place


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as started:
        crds.install(started.client(), [*crds.trainer(), *crds.others()])
        yield started


@pytest.fixture(scope="session")
def production(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The production values, installed: every account, right and setting that the chart can give."""
    made = Place(plane, "production", tmp_path_factory.mktemp("production") / "place").start()
    made.install(chart_case.values("production"))
    yield made
    made.end()


@pytest.fixture
def place(plane: ControlPlane, tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """Makes places; their nodes are stopped at the end of the test."""
    made: list[Place] = []

    def make(namespace: str, **options: Any) -> Place:
        made.append(Place(plane, namespace, tmp_path / namespace, **options).start())
        return made[-1]

    yield make
    for each in reversed(made):
        each.end()
