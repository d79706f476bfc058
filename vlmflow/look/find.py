"""From what a person names to a manifest that can be read: a path, a URI, or a dataset of the last local run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlmflow import last_run, storage
from vlmflow.dataset import manifest

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest

STORE = "VLMFLOW_S3_ENDPOINT"
SERVICES = ("s3",)  # of the local stack; who looks at data needs no registry


@contextmanager
def opened(names: Sequence[str], state: Path) -> Iterator[list[Manifest]]:
    """The manifests of these names, with the store they lie in reachable inside the context.

    Objects at s3:// are looked for in the local stack of `state` when the environment names no other store.

    Raises:
        DataError: a name is neither a file, a URI nor a dataset of a run in `state`.
    """
    state = state.absolute()
    if state.exists():
        os.environ.setdefault("VLMFLOW_SCRATCH", str(state / "scratch"))
    with ExitStack() as open_contexts:
        found = []
        for name in names:
            if _remote(name):
                _start(state, open_contexts)
            made = manifest.load(name) if "://" in name or Path(name).is_file() else last_run.dataset(state, name)
            if any(_remote(uri) for uri in _uris(made)):
                _start(state, open_contexts)
            found.append(made)
        yield found


@contextmanager
def store(state: Path, address: str) -> Iterator[None]:
    """The store of a model's address, and the registry behind `models:/`, reachable inside the context."""
    state = state.absolute()
    if state.exists():
        os.environ.setdefault("VLMFLOW_SCRATCH", str(state / "scratch"))
    with ExitStack() as open_contexts:
        if _remote(address) or address.startswith("models:/"):
            _start(state, open_contexts, None if address.startswith("models:/") else SERVICES)
        yield


def _remote(uri: str) -> bool:
    return "://" in uri and storage.local_path(uri) is None


def _uris(made: Manifest) -> Iterator[str]:
    yield from (shard.uri for shard in made.shards[:1])
    yield from (part.uri for layer in made.layers.values() for part in layer.parts[:1])


def _start(state: Path, open_contexts: ExitStack, services: tuple[str, ...] | None = SERVICES) -> None:
    if os.environ.get(STORE) or not (state / "runs").exists():
        return  # the user's store; without one and without a state folder the store's own message says what is missing
    from rich.console import Console

    from vlmflow import local

    open_contexts.enter_context(local.stack(state, Console(highlight=False, stderr=True), services))
