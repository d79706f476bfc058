"""Register a trained model: parameters, data lineage, scores and a version of NAME-candidates in MLflow.

Training writes NAME-candidates only; NAME belongs to the promoter (platform.md 4.3: one registered model cannot tell
"may register" from "may promote"). MLflow's transformers flavour refuses vision-language models (platform.md 4.4), so
the version is a LoggedModel that holds either the raw files or, when the model lies in S3, just its address: weights
of tens of gigabytes are never copied through the tracking server.

Everything is found again by one key (weights + recipe + scores): a second call, or one after a kill, completes what is
there and returns the same version. A version that is complete keeps what was recorded with it; only the gates, which
look at the stored files as they are now, are judged again.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

import vlmflow
from vlmflow.digest import digest
from vlmflow.registry import contaminated, dossier, gates, tracking
from vlmflow.registry.rows import UNTRAINED, ScoreRow, chosen_row, final_row, score_rows

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from vlmflow.dataset.manifest import Manifest
    from vlmflow.evaluation.scores import Scores
    from vlmflow.models.store import ModelRef
    from vlmflow.step import Context

PARAM_CHARACTERS = 6000  # MLflow's limit of a parameter value
PARAMS_A_BATCH = 100  # and of parameters in one request
RECIPE_DOCUMENT = "recipe.json"  # in the run of a version
DIGEST_CHARACTERS = 36  # and of a dataset digest


class Registered(BaseModel):
    """A version in the registry. `gates` is name -> pass|fail, decided on split `gate_split`; `url` is the version's page,
    `source` where its files lie."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    version: str
    run_id: str
    url: str
    source: str
    gates: dict[str, str]
    gate_details: dict[str, str]
    gate_split: str = ""


def run(
    ctx: Context,
    model: ModelRef,
    scores: Mapping[str, Scores],
    soup: Any = None,
    datasets: Mapping[str, Manifest] | None = None,
    judged: Mapping[str, Scores] | None = None,
) -> Registered:
    """Record a run and register the model as a version of `NAME-candidates`; the same input gives the same version.

    Args:
        model: the chosen model.
        scores: row name -> scores on the report split; must hold a row for `model`, should hold one named "untrained".
        soup: result of the soup step (its `chosen` and `trace` are recorded), or None when one model was trained.
        datasets: manifests by name; all that the model's lineage names should be among them.
        judged: row name -> scores on the selection split, by which the gates decide: the reported questions take part in
            no choice, and a promotion is one. Same rows as `scores` needs; None = `scores`, for a model without a soup step.

    Raises:
        RegistryError: MLFLOW_TRACKING_URI unset, server unreachable or refusing.
        DataError: no scores belong to the model's weights.
    """
    datasets = dict(datasets or {})
    rows = score_rows(scores)
    final = final_row(scores, model.weights_sha256, chosen_row(soup))
    spec = ctx.recipe.registry
    recipe_digest = digest(ctx.recipe)
    measured = [[row.row, row.benchmark, row.split, row.score, row.chance, row.n] for row in rows]
    key = digest({"weights": model.weights_sha256, "recipe": recipe_digest, "scores": measured})
    name = f"{spec.model}-candidates"
    ruling = score_rows(judged) if judged else rows
    judged_final = final_row(judged or scores, model.weights_sha256, chosen_row(soup))
    known = [each.digest for each in datasets.values()]
    results = gates.evaluate(ruling, judged_final, UNTRAINED, spec.gates, model, known, recipe_digest)
    brings = dossier.Dossier(
        model=model,
        rows=[row for row in ruling if row.row in (judged_final, UNTRAINED)],
        final=judged_final,
        untrained=UNTRAINED,
        tables={name: one.table_sha256 for name, one in (judged or scores)[judged_final].benchmarks.items()},
        gates=spec.gates,
        data=known,
        recipe_digest=recipe_digest,
        contamination=contaminated.measured(ctx.recipe, datasets, ctx.scratch),
    )
    tags = _tags(ctx, model, soup, datasets, recipe_digest, key)
    tags.update(result.tag for result in results)

    mlflow = tracking.client()
    with tracking.translated(f"registering {name}"):
        experiment_id = tracking.experiment(mlflow, spec.experiment)
        _registered_model(mlflow, name)
        version = _find_version(mlflow, name, key)
        if version is None:
            run_id = tracking.find_or_create_run(mlflow, experiment_id, key, f"{ctx.recipe.name}-{key[:8]}", tags)
            experiment_id = str(mlflow.get_run(run_id).info.experiment_id)  # a given run may belong to another one
            _log_params(mlflow, run_id, ctx.recipe.model_dump(mode="json"))
            _log_datasets(mlflow, run_id, datasets)
            model_id, source = _logged_model(ctx, mlflow, model, experiment_id, run_id, tags, name)
            _log_scores(mlflow, run_id, rows, final, model_id)
            _log_documents(mlflow, run_id, ctx, scores, soup)
            dossier.log(mlflow, run_id, brings)
            if not os.environ.get("MLFLOW_RUN_ID"):  # a given run is ended by whoever opened it
                mlflow.set_terminated(run_id, "FINISHED")
            made = mlflow.create_model_version(  # last: a version says that all of this is there
                name, source, run_id=run_id, tags=tags, model_id=model_id, description=_description(rows, final)
            )
            version, source = str(made.version), str(made.source)
        else:
            run_id, source, version = str(version.run_id), str(version.source), str(version.version)
            for result in results:
                mlflow.set_model_version_tag(name, version, *result.tag)
    return Registered(
        name=name, version=version, run_id=run_id, source=source,
        url=f"{tracking.shown_uri()}/#/models/{name}/versions/{version}",
        gates={result.name: result.tag[1] for result in results},
        gate_details={result.name: result.detail for result in results},
        gate_split=ruling[0].split if ruling else "",
    )  # fmt: skip


def code_version() -> str:
    """Version of this code: VLMFLOW_CODE_VERSION (set by the image), else package version and git commit if any."""
    given = os.environ.get("VLMFLOW_CODE_VERSION")
    if given:
        return given
    version = getattr(vlmflow, "__version__", "0")
    folder = Path(vlmflow.__file__).parent
    if not (folder.parent / ".git").exists():
        return version
    try:
        out = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+{out.stdout.strip()}"


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as `a.b.0.c -> text`, in order of the names; empty containers keep their name."""
    if isinstance(value, Mapping) and value:
        parts = [flatten(value[k], f"{prefix}.{k}" if prefix else str(k)) for k in sorted(value, key=str)]
    elif isinstance(value, (list, tuple)) and value and any(isinstance(v, (Mapping, list)) for v in value):
        parts = [flatten(v, f"{prefix}.{i}") for i, v in enumerate(value)]
    else:
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
        return {prefix: text[:PARAM_CHARACTERS]}
    return {k: v for part in parts for k, v in part.items()}


def soup_summary(soup: Any) -> dict[str, Any]:
    """What the registry and the card say about a soup: which one was chosen, and the trace of the greedy choice."""
    if soup is None:
        return {}
    data = soup.model_dump(mode="json") if hasattr(soup, "model_dump") else dict(vars(soup))
    return {name: data[name] for name in ("chosen", "trace") if name in data}


def _tags(
    ctx: Context, model: ModelRef, soup: Any, datasets: Mapping[str, Manifest], recipe_digest: str, key: str
) -> dict[str, str]:
    summary = soup_summary(soup)
    return {
        tracking.KEY_TAG: key,
        "weights.sha256": model.weights_sha256,
        "recipe.digest": recipe_digest,
        "recipe.name": ctx.recipe.name,
        "code.version": code_version(),
        "lineage.step": model.lineage.step,
        "lineage.ancestor": model.lineage.ancestor,
        "lineage.parents": json.dumps(model.lineage.parents),
        **({"soup.chosen": str(summary["chosen"])} if "chosen" in summary else {}),
        **{f"data.{name}": manifest.digest for name, manifest in sorted(datasets.items())},
    }


def _registered_model(mlflow: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(
            name, description="Candidates of training; promotion copies one to the name without suffix."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find_version(mlflow: MlflowClient, name: str, key: str) -> Any | None:
    found = mlflow.search_model_versions(f"name = '{name}' and tag.`{tracking.KEY_TAG}` = '{key}'")
    return min(found, key=lambda version: int(version.version)) if found else None


def _log_params(mlflow: MlflowClient, run_id: str, recipe: dict[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(name, value) for name, value in flatten(recipe).items()]
    for start in range(0, len(params), PARAMS_A_BATCH):
        mlflow.log_batch(run_id, params=params[start : start + PARAMS_A_BATCH])


def _log_datasets(mlflow: MlflowClient, run_id: str, datasets: Mapping[str, Manifest]) -> None:
    """Each manifest as a dataset input: digest, sources and counts; the full digest is a tag (MLflow cuts at 36)."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for name, manifest in sorted(datasets.items()):
        source = json.dumps({"manifest": manifest.digest, "shards": [shard.uri for shard in manifest.shards][:100]})
        profile = json.dumps({"samples": manifest.samples, "shards": len(manifest.shards), "sources": manifest.sources})
        dataset = Dataset(name, manifest.digest[:DIGEST_CHARACTERS], "vlmflow", source, profile=profile)
        tags = [InputTag("mlflow.data.context", "training"), InputTag("manifest.sha256", manifest.digest)]
        inputs.append(DatasetInput(dataset, tags))
    if inputs:
        mlflow.log_inputs(run_id, inputs)


def _logged_model(
    ctx: Context,
    mlflow: MlflowClient,
    model: ModelRef,
    experiment_id: str,
    run_id: str,
    tags: dict[str, str],
    name: str,
) -> tuple[str, str]:
    """(id, source) of the LoggedModel: an address for models in S3, raw files for models on a local disk."""
    from mlflow.entities import LoggedModelStatus

    external = model.uri.startswith("s3://")
    found = mlflow.search_logged_models(
        [experiment_id], f"tags.`{tracking.KEY_TAG}` = '{tags[tracking.KEY_TAG]}' AND source_run_id = '{run_id}'"
    )
    if found:
        logged = found[0]
    else:
        logged = mlflow.create_logged_model(
            experiment_id, name=name, source_run_id=run_id, model_type="image-text-to-text",
            tags={**tags, **({"mlflow.model.isExternal": "true"} if external else {})},
        )  # fmt: skip
    if logged.status != LoggedModelStatus.READY:
        if not external:
            from vlmflow.models import store

            mlflow.log_model_artifacts(logged.model_id, str(store.fetch(model, ctx.scratch)))
        mlflow.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return logged.model_id, model.uri if external else f"models:/{logged.model_id}"


def _log_scores(mlflow: MlflowClient, run_id: str, rows: list[ScoreRow], final: str, model_id: str) -> None:
    """Metrics `BENCHMARK/ROW`, with the rows `chance` and `final`; the final ones also belong to the LoggedModel.

    The time of all is the start of the run, so that logging them twice leaves one point.
    """
    from mlflow.entities import Metric

    at = mlflow.get_run(run_id).info.start_time
    values = {f"{row.benchmark}/{row.row}": row.score for row in rows}
    values.update({f"{row.benchmark}/chance": row.chance for row in rows})
    metrics = [Metric(metric, value, at, 0) for metric, value in sorted(values.items())]
    for row in gates.of_row(rows, final).values():
        metrics.append(Metric(f"{row.benchmark}/final", row.score, at, 0, model_id=model_id, run_id=run_id))
    mlflow.log_batch(run_id, metrics=metrics)


def _log_documents(mlflow: MlflowClient, run_id: str, ctx: Context, scores: Mapping[str, Scores], soup: Any) -> None:
    mlflow.log_dict(run_id, ctx.recipe.model_dump(mode="json"), RECIPE_DOCUMENT)
    mlflow.log_dict(run_id, {name: each.model_dump(mode="json") for name, each in scores.items()}, "scores.json")
    if soup is not None:
        mlflow.log_dict(run_id, soup_summary(soup), "soup.json")


def _description(rows: list[ScoreRow], final: str) -> str:
    found = gates.of_row(rows, final).values()
    return "; ".join(f"{r.benchmark} {r.score:.3f} (chance {r.chance:.3f}, n {r.n}, {r.split} split)" for r in found)
