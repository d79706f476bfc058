"""What the last local run of a recipe left in its folder: datasets and the initial model, for commands that look ahead."""

from __future__ import annotations

from pathlib import Path

from vlmflow.dataset import manifest
from vlmflow.dataset.manifest import Manifest
from vlmflow.errors import DataError, RecipeError
from vlmflow.models.store import ModelRef, load_ref


def folders(state: Path, name: str) -> list[Path]:
    """Folders of the runs of the recipe of this name, the newest first, whether they ended or not."""
    from vlmflow.recipe import load

    found = []
    for path in sorted((state / "runs").glob("*/recipe.yaml"), reverse=True):
        try:
            if load(path).name == name:
                found.append(path.parent)
        except RecipeError:  # of an earlier version
            continue
    return found


def datasets(folder: Path) -> dict[str, Manifest]:
    """Datasets of a run by name, each with as many layers as the run has added; empty ones are left out."""
    found: dict[str, Manifest] = {}
    for path in sorted((folder / "artifacts").rglob("data")):
        try:
            made = manifest.load(str(path))
        except DataError:  # cut, when the run was killed
            continue
        if made.shards and (made.name not in found or _finished(made) > _finished(found[made.name])):
            found[made.name] = made
    return found


def _finished(made: Manifest) -> tuple[int, int, int]:
    """How far a dataset came: tasks of a loop leave manifests of some shards, or without the lineage that seals them."""
    return made.samples, len(made.layers), len(made.lineage)


def initial_model(folder: Path) -> ModelRef | None:
    """The model that a run began with, or None when it did not come so far."""
    path = next(iter(sorted((folder / "artifacts").glob("*/initial/model"))), None)
    return load_ref(path) if path else None


def dataset(state: Path, name: str) -> Manifest:
    """The dataset of this name of the newest run that has one, whatever its recipe.

    Raises:
        DataError: no run has it; the message lists those there are.
    """
    known: dict[str, None] = {}
    for path in sorted((state / "runs").glob("*/recipe.yaml"), reverse=True):
        found = datasets(path.parent)
        if name in found:
            return found[name]
        known |= dict.fromkeys(found)
    there = f"its runs have {', '.join(sorted(known))}" if known else "it holds no run with data"
    raise DataError(
        f"'{name}' is neither a file, a URI nor a dataset of a run in {state}: {there}. Give the path or URI of a manifest, or run a "
        "recipe first (`vlmflow demo`)."
    )
