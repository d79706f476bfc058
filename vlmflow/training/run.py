"""The training step: one stage from an initial model to a published one."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow import storage
from vlmflow.dataset import manifest
from vlmflow.dataset.manifest import Manifest
from vlmflow.digest import digest
from vlmflow.errors import DataError, RecipeError, StepFailed
from vlmflow.models import store
from vlmflow.models.store import ModelLineage, ModelRef
from vlmflow.training import checkpoint, length, plan, plan_file
from vlmflow.training.job import Job, Publication
from vlmflow.training.launchers import LaunchRequest, launch
from vlmflow.training.prepare import prepare
from vlmflow.training.publish import LOG

if TYPE_CHECKING:
    from vlmflow.recipe import Recipe
    from vlmflow.recipe.mixture import DataUse
    from vlmflow.recipe.stage import StageSpec
    from vlmflow.step import Context

VERSION = 2  # of the loop; with the plan's and the length layer's versions it is part of every train digest

# How a stage is run, not what it learns: a changed value continues the same training.
EXECUTION = {"processes", "threads", "zero", "memory", "checkpoint", "failure_limit"}


def stage_of(recipe: Recipe, name: str) -> StageSpec:
    """A stage by name; ``bootstrap`` is the recipe's section of that name. Raises RecipeError listing what exists."""
    known = dict(recipe.stages) | ({"bootstrap": recipe.bootstrap} if recipe.bootstrap else {})
    if name not in known:
        raise RecipeError(f"stage '{name}' is not in the recipe; it has {list(known)}")
    return known[name]


def ingredients(recipe: Recipe, name: str, candidate: str | None) -> list[DataUse]:
    """Data of a stage, plus that of a soup candidate. Raises RecipeError for an unknown candidate."""
    uses = list(stage_of(recipe, name).data)
    if candidate is None:
        return uses
    known = recipe.soup.candidates if recipe.soup else {}
    if candidate not in known:
        raise RecipeError(f"soup candidate '{candidate}' is not in the recipe; it has {list(known)}")
    return uses + list(known[candidate])


def train_digest(
    stage: StageSpec, uses: list[DataUse], init: ModelRef, datasets: dict[str, Manifest], family: str, seed: int
) -> str:
    """Identity of a training: everything that decides its weights, up to the order of float sums."""
    return digest(
        {
            "versions": [VERSION, length.VERSION, plan.VERSION],
            "stage": stage.model_dump(mode="json", exclude=EXECUTION),
            "uses": [use.model_dump(mode="json") for use in uses],
            "init": store.behaviour_digest(init.files),
            "data": {name: datasets[name].digest for name in sorted({use.dataset for use in uses})},
            "family": family,
            "seed": seed,
        }
    )


def run(
    ctx: Context, stage_name: str, init: ModelRef, datasets: dict[str, Manifest], candidate: str | None = None
) -> ModelRef:
    """Train a stage, or return the model that an equal training published before.

    Args:
        init: model to start from.
        datasets: at least those that the stage's data names.
        candidate: soup candidate whose data is added.

    Raises:
        RecipeError: unknown stage, candidate or module pattern.
        DataError: a dataset is missing or empty.
        StepFailed: too many unusable samples, a non-finite loss, a dead rank (with its last lines), or preemption.
    """
    recipe = ctx.recipe
    stage, uses = stage_of(recipe, stage_name), ingredients(recipe, stage_name, candidate)
    if missing := sorted({use.dataset for use in uses} - set(datasets)):
        raise DataError(f"stage '{stage_name}' needs datasets {missing}; given were {sorted(datasets)}")
    key = train_digest(stage, uses, init, datasets, recipe.model.family, recipe.seed)
    if (found := store.find(ctx, key)) is not None:
        checkpoint.clear(_checkpoints(ctx, key))  # left over when a run was killed right after it published
        return found
    label = stage_name if candidate is None else f"{stage_name}-{candidate}"
    job = _job(ctx, label, key, stage, uses, init, datasets)
    request = LaunchRequest(
        folder=job.folder,
        model=store.marker_uri(ctx.root, key),
        key=key,
        label=label,
        stage=stage_name,
        processes=stage.processes,
        threads=stage.threads,
        run_id=ctx.run_id,
        scratch=ctx.scratch,
    )
    # without the local disk of this machine: ranks of another one have their own
    storage.write_json(request.job, job.model_copy(update={"scratch": None}).model_dump(mode="json"))
    _train(ctx, request)
    if (ref := store.find(ctx, key)) is None:
        raise StepFailed(f"training '{label}' ended without an error, but {request.model} does not exist; run it again")
    checkpoint.clear(job.checkpoints)
    shutil.rmtree(job.work, ignore_errors=True)
    return ref


def _checkpoints(ctx: Context, key: str) -> str:
    return storage.join(ctx.root, "checkpoints", key)


def _job(
    ctx: Context,
    label: str,
    key: str,
    stage: StageSpec,
    uses: list[DataUse],
    init: ModelRef,
    datasets: dict[str, Manifest],
) -> Job:
    """Plan the stage, store what its ranks need and describe it. Raises: as `prepare.prepare`."""
    uri = storage.join(ctx.root, "training", key)
    prepare(ctx, stage, uses, init, datasets, storage.join(uri, "plan"))
    manifests = {name: manifest.save(datasets[name], ctx.root) for name in sorted({use.dataset for use in uses})}
    job = Job(
        label=label,
        key=key,
        family=ctx.recipe.model.family,
        model=storage.join(init.uri, store.MARKER),
        stage=stage,
        uses=[(use, manifests[use.dataset]) for use in uses],
        plan=storage.join(uri, "plan", plan_file.MARKER),
        seed=ctx.recipe.seed,
        scratch=str(Path(ctx.scratch).resolve()),
        checkpoints=_checkpoints(ctx, key),
        references=storage.join(ctx.root, "references"),
        tracking={
            "experiment": ctx.recipe.registry.experiment,
            "name": f"{ctx.recipe.name}-{label}",
            "prefix": f"{label}/",
            "tags": {
                f"vlmflow.train_digest.{label}": key,
                "vlmflow.run_id": ctx.run_id,
                f"vlmflow.execution.{label}": json.dumps(stage.model_dump(mode="json", include=EXECUTION)),
            },
            # MLflow refuses a param that changes, and these may when the training is continued: they are tags
            "params": {"stage": json.dumps(stage.model_dump(mode="json", exclude=EXECUTION))},
        },
        folder=uri,
        publication=Publication(
            root=ctx.root, name=f"{ctx.recipe.name}-{label}", lineage=_lineage(label, stage, uses, init, datasets, uri)
        ),
    )
    job.work.mkdir(parents=True, exist_ok=True)
    return job


def _lineage(
    label: str, stage: StageSpec, uses: list[DataUse], init: ModelRef, datasets: dict[str, Manifest], folder: str
) -> ModelLineage:
    return ModelLineage(
        step="train",
        stage=label,
        params={"stage": stage.model_dump(mode="json"), "uses": [use.model_dump(mode="json") for use in uses]},
        parents=[init.weights_sha256],
        ancestor=init.weights_sha256,
        data=sorted({datasets[use.dataset].digest for use in uses}),
        log_uri=storage.join(folder, LOG),
    )


def _train(ctx: Context, request: LaunchRequest) -> None:
    """Run the ranks; shows progress, prints the table and the notes."""
    with ExitStack() as stack:
        shown: dict[str, Any] = {}

        def on_event(event: dict[str, Any]) -> None:
            kind = event["event"]
            if kind == "table":
                print(event["text"], file=sys.stderr, flush=True)
            elif kind == "plan":
                if not shown:  # else the ranks were restarted and go on from a checkpoint
                    shown["progress"] = stack.enter_context(
                        ctx.progress(f"train {request.label}", event["steps"], "steps")
                    )
                    print(_plan_text(event), file=sys.stderr, flush=True)
                shown["progress"].advance(event["first"] - shown.get("done", 0))
                shown["done"] = event["first"]
            elif kind == "step" and shown:
                shown["progress"].note(f"loss {event['loss']:.3f}, {event['tokens_per_second']:.0f} tokens/s")
                shown["progress"].advance(event["step"] - shown["done"])
                shown["done"] = event["step"]
            elif kind == "note":
                ctx.notice(event["text"])

        launch(request, on_event)


def _plan_text(event: dict[str, Any]) -> str:
    report, data = event["report"], event["examples"]
    reasons = "".join(
        f"\n  {r['count']} x {r['reason']} (e.g. {r['example']})"
        for r in [*report["dropped_reasons"], *data["reasons"]]
    )
    return (
        f"{report['steps']} steps of {report['packs']} packs: {report['tokens']} tokens ({report['targets']} targets), "
        f"{report['tiles']} tiles, fill {report['fill_tokens']:.1%} of tokens and {report['fill_tiles']:.1%} of tiles, imbalance "
        f"{report['imbalance']:.3f}; {data['examples']} examples, {data['filtered']} filtered out, {data['failed']} unusable, "
        f"{report['dropped']} with parts too long{reasons}"
    )
