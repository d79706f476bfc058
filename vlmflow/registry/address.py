"""A model named by a person: the URI of its folder in the store, or a version in the registry.

`models:/NAME/3` and `models:/NAME@champion` are MLflow's own notation. What they name is read from the document that the
step `register` put into the candidate's run, so that the model is the very one that was judged, wherever its files lie.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow import storage
from vlmflow.errors import ModelError, NotFound, RecipeError, RegistryError
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


def recorded_recipe(address: str, folder: Path) -> Path:
    """The recipe that a registered version was made by, as a file in `folder`.

    Raises:
        RecipeError: the address is none of a registered version.
        RegistryError: no such version, or its run holds no recipe.
    """
    if not is_registered(address):
        raise RecipeError(
            f"recipe: empty, and '{address}' is no registered version whose recipe could be looked up; name the recipe"
        )
    from vlmflow.registry import tracking
    from vlmflow.registry.run import RECIPE_DOCUMENT

    version = _version(address)
    with tracking.translated(f"reading the recipe of {address}"):
        return Path(tracking.client().download_artifacts(version.run_id, RECIPE_DOCUMENT, str(folder)))


def _registered(address: str) -> ModelRef:
    from vlmflow.registry import dossier, tracking

    version = _version(address)
    with tracking.translated(f"reading {address}"):
        return dossier.read(tracking.client(), str(version.run_id), f"{version.name}/{version.version}").model


def _version(address: str) -> Any:
    from vlmflow.registry import tracking

    found = _VERSION.fullmatch(address)
    if not found:
        raise RegistryError(f"'{address}' names no version; write models:/NAME/3 or models:/NAME@champion")
    with tracking.translated(f"reading {address}"):
        mlflow = tracking.client()
        if found["alias"]:
            return mlflow.get_model_version_by_alias(found["name"], found["alias"])
        return mlflow.get_model_version(found["name"], found["version"])
