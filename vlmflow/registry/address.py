"""A model named by a person: the URI of its folder in the store, or a version in the registry.

`models:/NAME/3` and `models:/NAME@champion` are MLflow's own notation. What they name is read from the document that the
step `register` put into the candidate's run, so that the model is the very one that was judged, wherever its files lie.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from vlmflow import storage
from vlmflow.errors import ModelError, NotFound, RegistryError
from vlmflow.models import store

if TYPE_CHECKING:
    from vlmflow.models.store import ModelRef

SCHEME = "models:/"
_VERSION = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[\w.-]+))")


def is_registered(address: str) -> bool:
    """Whether an address names a version in the registry."""
    return address.startswith(SCHEME)


def find(address: str) -> ModelRef:
    """The model at an address.

    Raises:
        ModelError: nothing is published there.
        RegistryError: no such version, or MLflow does not answer.
    """
    if is_registered(address):
        return _registered(address)
    uri = address.rstrip("/").removesuffix(f"/{store.MARKER}")
    if "://" not in uri:
        raise ModelError(
            f"'{address}' is no address of a model: give the URI of its folder in the store, such as s3://vlmflow/models/KEY, or "
            "a version in the registry, such as models:/NAME/3 or models:/NAME@champion"
        )
    try:
        return store.load_ref(storage.join(uri, store.MARKER))
    except NotFound as error:
        raise ModelError(
            f"there is no model at {uri}: it has no {store.MARKER}, which is written when a model is complete. Correct the "
            "address, or run the pipeline that makes the model."
        ) from error


def _registered(address: str) -> ModelRef:
    from vlmflow.registry import dossier, tracking

    found = _VERSION.fullmatch(address)
    if not found:
        raise RegistryError(f"'{address}' names no version; write models:/NAME/3 or models:/NAME@champion")
    with tracking.translated(f"reading {address}"):
        mlflow = tracking.client()
        if found["alias"]:
            version = mlflow.get_model_version_by_alias(found["name"], found["alias"])
        else:
            version = mlflow.get_model_version(found["name"], found["version"])
        return dossier.read(mlflow, str(version.run_id), f"{version.name}/{version.version}").model
