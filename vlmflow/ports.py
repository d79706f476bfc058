"""Between Kubeflow artifacts and vlmflow's objects, so that component bodies stay a few lines long.

A Dataset artifact holds a manifest, a Model artifact a model reference, other artifacts JSON of one result object. An
artifact is anything with `path` and `metadata`; this module does not import kfp. Metrics get numbers only, because KFP
copies other values to MLflow as 0.0 (platform.md 1.5).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from vlmflow import pages, storage
from vlmflow.dataset import groups
from vlmflow.errors import DataError, RecipeError

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.models.store import ModelRef
    from vlmflow.recipe import Recipe
    from vlmflow.soup.result import SoupResult
    from vlmflow.step import Context

T = TypeVar("T")
DATASETS = ("seed", "web", "sft")  # what the points pipeline carries
STAGES = ("ocr", "align", "sft")


class Port(Protocol):
    """A Kubeflow artifact, as far as this module knows it."""

    path: str
    metadata: dict[str, Any]


# --- plain objects ---------------------------------------------------------------------------------------------------


def write_object(obj: Any, path: str | Path) -> None:
    """Write a pydantic model or dataclass (or plain JSON) to an artifact path, atomically."""
    from pydantic import TypeAdapter

    plain = obj if isinstance(obj, dict | list) else TypeAdapter(type(obj)).dump_python(obj, mode="json")
    storage.write_json(str(path), plain)


def read_object(kind: type[T], path: str | Path) -> T:
    """Read what `write_object` wrote. Raises DataError when the artifact holds something else."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(storage.read_json(str(path)))
    except ValidationError as error:
        raise DataError(f"artifact {path} holds no {kind.__name__}: {error}") from error


def numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a nested dictionary, by dotted name; booleans as 0 and 1."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float) and math.isfinite(value):
            found[f"{prefix}{key}"] = float(value) if isinstance(value, float) else int(value)
    return found


def show(title: str, values: dict[str, Any], page: Port, metrics: Port | None, table: pages.Rows | None = None) -> None:
    """Give the UI something to look at: a page for people, numbers for comparison."""
    Path(page.path).parent.mkdir(parents=True, exist_ok=True)
    Path(page.path).write_text(pages.page(title, values, table or []), encoding="utf-8")
    if metrics is not None:
        measured = numbers(values)
        metrics.metadata.update(measured)
        # kfp's local cache needs a file behind every output (platform.md 1.2, L9)
        storage.write_json(metrics.path, measured)


# --- recipe, datasets, models ----------------------------------------------------------------------------------------


def put_recipe(recipe: Recipe, out: Port) -> None:
    """Write the resolved recipe: what the run really uses, defaults included, in its order (stages are ordered)."""
    from vlmflow.digest import digest
    from vlmflow.recipe import dump

    storage.write_bytes(out.path, dump(recipe).encode())
    out.metadata.update({"name": recipe.name, "digest": digest(recipe)})


def get_manifest(port: Port) -> Manifest:
    """The dataset of an artifact."""
    from vlmflow.dataset import manifest

    return manifest.load(port.path)


def get_manifests(**ports: Port | None) -> dict[str, Manifest]:
    """The datasets of several artifacts by name; those that the recipe lacks (empty ones), and those not given, are left
    out."""
    found = {name: get_manifest(port) for name, port in ports.items() if port is not None}
    return {name: manifest for name, manifest in found.items() if manifest.shards}


def put_manifest(
    ctx: Context,
    manifest: Manifest,
    out: Port,
    page: Port,
    metrics: Port,
    title: str,
    layer: str | tuple[str, ...] | None = None,
) -> None:
    """Write a dataset artifact with a page that shows its sizes, the layers' summaries and, of the first layer that it has,
    its first samples."""
    write_object(manifest, out.path)
    out.metadata.update({"digest": manifest.digest, "samples": manifest.samples, "shards": len(manifest.shards)})
    values: dict[str, Any] = {"samples": manifest.samples, "shards": len(manifest.shards), "digest": manifest.digest}
    named = (layer,) if isinstance(layer, str) else layer or ()
    have = [name for name in named if name in manifest.layers]
    for name in have:
        summary = manifest.layers[name].summary
        values |= summary if len(named) == 1 else {f"{name}.{key}": value for key, value in summary.items()}
    if not have and manifest.lineage:
        values |= manifest.lineage[-1].summary
    show(title, values, page, metrics, table=pages.preview(ctx, manifest, have[0] if have else None))


def manifests_of(ctx: Context, model: ModelRef) -> dict[str, Manifest]:
    """The datasets that a model was trained on, by name, as far as their manifests lie in this store.

    Of several manifests of one dataset (a stage may have used an earlier state of it) the one with most layers stands."""
    from vlmflow.dataset import manifest

    found: dict[str, Manifest] = {}
    for digest in model.lineage.data:
        uri = storage.join(ctx.root, "manifests", f"{digest}.json")
        if storage.exists(uri):
            made = manifest.load(uri)
            known = found.get(made.name)
            found[made.name] = made if known is None or len(made.layers) > len(known.layers) else known
    return dict(sorted(found.items()))


def pull_groups(ctx: Context, dataset: str, count: int) -> list[dict[str, Any]]:
    """The groups that a dataset of the recipe is pulled in; one, empty, when the recipe has none of that name. Never an empty
    list, because gathering the outputs of an empty loop crashes kfp.local (platform.md 1.2, L6)."""
    from vlmflow.curation import pull as step

    if dataset not in ctx.recipe.data:
        return [{"name": "1", "first": 0, "shards": 0, "rows": 0}]
    return step.plan_groups(ctx, dataset, count)


def pull(
    ctx: Context,
    dataset: str,
    manifest: str = "",
    stage: str = "",
    candidate: str = "",
    group: Mapping[str, Any] | None = None,
) -> Manifest:
    """Open the manifest that is given, else pull a dataset of the recipe; an empty dataset when the recipe has none of that
    name, or the stage that it is for does not use it.

    With a `group` (of `pull_groups` above) only its shards are pulled; the call without one finds them and seals the manifest.
    """
    from vlmflow.curation import pull as step
    from vlmflow.dataset.manifest import Manifest, load

    if manifest:
        return load(manifest)
    if dataset not in ctx.recipe.data or not used(ctx.recipe, dataset, stage, candidate):
        return Manifest(name=dataset, shards=[])
    pulled = step.run(ctx, dataset, group=group or None)
    return pulled if group else _compared(ctx, pulled)


def _compared(ctx: Context, manifest: Manifest) -> Manifest:
    """A pulled dataset with the layers that the recipe asks of one that is not curated: `phash` where the curated one is compared
    with it, and `contamination`, because the registry's gate speaks of all data that was trained on. The curated dataset gets
    its layers from its own steps."""
    from vlmflow.curation import contamination, phash

    curation = ctx.recipe.curation
    if not manifest.shards or manifest.name == curation.dataset:
        return manifest
    if curation.contamination is None:
        compared = curation.dataset and curation.dedup and manifest.name in curation.dedup.against
        return phash.run(ctx, manifest) if compared else manifest
    plain = curation.contamination.model_copy(update={"text": None})  # a layer that only the curated dataset has
    recipe = ctx.recipe.model_copy(update={"curation": curation.model_copy(update={"contamination": plain})})
    ctx = replace(ctx, recipe=recipe)
    return contamination.run(ctx, phash.run(ctx, manifest))


def used(recipe: Recipe, dataset: str, stage: str, candidate: str = "") -> bool:
    """Whether a stage learns from a dataset; without a stage every dataset is used. Raises RecipeError for an unknown one."""
    from vlmflow.training.run import ingredients

    return not stage or dataset in {use.dataset for use in ingredients(recipe, stage, candidate or None)}


def named(step: str, group: Mapping[str, Any]) -> str:
    """Name of a step's task, in a loop with that of its group."""
    return f"{step}-{group['name']}" if group else step


def curate(
    ctx: Context, step: Any, manifest: Manifest, *inputs: Any, group: Mapping[str, Any] | None = None
) -> Manifest:
    """Run a curation step, or hand the dataset through when the recipe curates none.

    With a `group` (of `vlmflow.dataset.groups`) only the layer parts of its shards are written; the step without a group
    finds them and seals the manifest.
    """
    if group:
        manifest, ctx = groups.cut(manifest, group), replace(ctx, parts_only=True)
    return step.run(ctx, manifest, *inputs) if ctx.recipe.curation.dataset else manifest


def get_model(port: Port) -> ModelRef:
    """The model of an artifact."""
    from vlmflow.models.store import load_ref

    return load_ref(port.path)


def get_models(**ports: Port) -> dict[str, ModelRef]:
    """The models of several artifacts by name."""
    return {name: get_model(port) for name, port in ports.items()}


def start(ctx: Context, datasets: dict[str, Manifest], given: str = "") -> ModelRef:
    """The model at the address that is given, else the recipe's model before any training."""
    from vlmflow.models import initial
    from vlmflow.registry import address

    return address.find(given) if given else initial.run(ctx, datasets)


def put_model(ref: ModelRef, out: Port, page: Port, metrics: Port, candidate: str = "") -> None:
    """Write a model artifact with a page that shows its lineage."""
    write_object(ref, out.path)
    lineage = ref.lineage
    out.metadata.update({"name": ref.name, "weights": ref.weights_sha256, "candidate": candidate})
    values = {
        "weights": ref.weights_sha256,
        "uri": ref.uri,
        "bytes": sum(file.bytes for file in ref.files),
        "step": lineage.step,
        "stage": lineage.stage,
        "parents": ", ".join(lineage.parents),
        "data": ", ".join(lineage.data),
        "log": lineage.log_uri or "",
    }
    show(f"Model {ref.name}", values, page, metrics, table=[{"file": f.path, "bytes": f.bytes} for f in ref.files])


# --- training, soup, evaluation --------------------------------------------------------------------------------------


def train(ctx: Context, stage: str, init: ModelRef, datasets: dict[str, Manifest], candidate: str = "") -> ModelRef:
    """Train a stage, by default that of the soup; a stage that the recipe lacks (or a bootstrap it sets to null) hands the
    model through."""
    from vlmflow.training import run

    if not stage and ctx.recipe.soup:
        stage = ctx.recipe.soup.stage
    wanted = ctx.recipe.bootstrap if stage == "bootstrap" else ctx.recipe.stages.get(stage)
    return run.run(ctx, stage, init, datasets, candidate or None) if wanted else init


def candidate_names(ctx: Context) -> list[str]:
    """Soup candidates in the order of the recipe; never empty (a gathered empty loop crashes kfp.local, L6)."""
    if not ctx.recipe.soup or not ctx.recipe.soup.candidates:
        raise RecipeError("soup.candidates: the points pipeline ends in a soup and needs at least one candidate")
    return list(ctx.recipe.soup.candidates)


def get_candidates(ctx: Context, ports: list[Port]) -> dict[str, ModelRef]:
    """Trained candidates by name, in the order of the recipe."""
    names = candidate_names(ctx)
    found = {str(port.metadata.get("candidate", "")): get_model(port) for port in ports}
    if missing := sorted(set(names) - set(found)):
        raise DataError(f"candidates {missing} were not trained: {len(found)} of {len(names)} models arrived")
    return {name: found[name] for name in names}


def get_soup(port: Port) -> SoupResult:
    """The result of the soup step."""
    from vlmflow.soup.result import SoupResult

    return SoupResult.load(port.path)


def put_soup(made: SoupResult, result: Port, model: Port, page: Port, metrics: Port) -> None:
    """Write the soups, and the chosen model as a model artifact."""
    made.save(result.path)
    write_object(made.model, model.path)
    model.metadata.update({"name": made.model.name, "weights": made.model.weights_sha256, "soup": made.chosen})
    rows = [
        {"model": name, "made of": " + ".join(entry.ingredients), "selection mean": entry.selection.mean}
        | {benchmark: score.accuracy for benchmark, score in entry.selection.benchmarks.items()}
        for name, entry in made.entries.items()
    ]
    values = {"chosen": made.chosen} | {name: entry.selection.mean for name, entry in made.entries.items()}
    show("Soups, on the selection split", values, page, metrics, table=rows)


def put_object(obj: Any, out: Port, page: Port, metrics: Port, title: str) -> None:
    """Write any result object, and show its fields."""
    write_object(obj, out.path)
    values = json.loads(Path(out.path).read_text(encoding="utf-8"))
    show(title, {k: v for k, v in values.items() if not isinstance(v, list)}, page, metrics)
