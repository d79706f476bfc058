"""Commands that speak to a cluster: runs in Kubeflow Pipelines, models in the registry, the installation's health."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmflow.cli_options import Output, OutputOption, Overrides, RecipeArgument

if TYPE_CHECKING:
    from vlmflow.client import Client, Run
    from vlmflow.registry.desk import Promotion
    from vlmflow.registry.promote import Outcome

Endpoint = Annotated[str | None, typer.Option(help="URL of Kubeflow Pipelines (VLMFLOW_KFP_ENDPOINT).")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace of the runs (VLMFLOW_NAMESPACE).")]
Experiment = Annotated[str | None, typer.Option(help="Experiment of the runs (VLMFLOW_EXPERIMENT).")]
RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="Id of a run, as `vlmflow runs` shows it.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Registered model NAME; candidates are NAME-candidates.")]


def add(app: typer.Typer) -> None:
    """Put the commands into the program."""
    for command in (submit, watch, logs, cancel, runs, register, compare, promote, rollback, history, doctor):
        app.command()(command)


def _client(**flags: str | None) -> Client:
    from vlmflow.client import Client

    return Client(**flags)


def _show(value: Any, output: Output, text: str) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False) if output is Output.json else text)


def _line(run: Run) -> str:
    return f"{run.run_id}  {run.state:<10} {run.created[:19]}  {run.name}"


def submit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    pipeline: Annotated[str, typer.Option(help="Registered pipeline.")] = "points",
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="Further parameter of the pipeline, NAME=VALUE.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    service_account: Annotated[str | None, typer.Option(help="Account of the run (VLMFLOW_SERVICE_ACCOUNT).")] = None,
    endpoint: Endpoint = None,
    namespace: Namespace = None,
    experiment: Experiment = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the recipe and print what would be sent.")] = False,
    output: OutputOption = Output.text,
) -> None:
    """Start a run of a recipe on the cluster."""
    client = _client(endpoint=endpoint, namespace=namespace, experiment=experiment, service_account=service_account)
    sent = client.submit(recipe, overrides or [], pipeline, name, parameters(parameter or []), dry_run)
    value = {
        "pipeline": sent.pipeline,
        "name": sent.name,
        "recipe": sent.recipe_uri,
        "parameters": sent.parameters,
        "run": sent.run.as_json() if sent.run else None,
    }
    text = f"{sent.run.run_id}  {sent.run.url}" if sent.run else f"would start {sent.pipeline} with {sent.parameters}"
    _show(value, output, text)
    if wait and sent.run:
        client.wait(sent.run.run_id, on_change=_tell)


def parameters(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs, values read as YAML. Raises RecipeError."""
    import yaml

    from vlmflow.errors import RecipeError

    found = {}
    for item in given:
        name, sign, value = item.partition("=")
        if not sign or not name:
            raise RecipeError(f"--parameter {item}: expected NAME=VALUE")
        found[name] = yaml.safe_load(value)
    return found


def _tell(run: Run) -> None:
    done = sum(task.state in ("SUCCEEDED", "SKIPPED", "CACHED") for task in run.tasks)
    active = [task.name for task in run.tasks if task.state == "RUNNING"]
    typer.echo(
        f"{run.state:<10} {done} of {len(run.tasks)} tasks done; running: {', '.join(active) or 'none'}", err=True
    )


def watch(
    run_id: RunId,
    timeout: Annotated[float | None, typer.Option(help="Seconds; without it, as long as it takes.")] = None,
    endpoint: Endpoint = None,
    output: OutputOption = Output.text,
) -> None:
    """Follow a run to its end. Exit code 4 when it fails."""
    run = _client(endpoint=endpoint).wait(run_id, timeout, on_change=_tell)
    _show(run.as_json(), output, _line(run))


def logs(
    run_id: RunId,
    task: Annotated[str | None, typer.Option(help="Only this task, by its name in the UI.")] = None,
    endpoint: Endpoint = None,
    namespace: Namespace = None,
) -> None:
    """Print the logs of a run's pods that still exist."""
    for name, line in _client(endpoint=endpoint, namespace=namespace).logs(run_id, task):
        typer.echo(f"{name}: {line}" if task is None else line)


def cancel(run_id: RunId, endpoint: Endpoint = None, output: OutputOption = Output.text) -> None:
    """Stop a run. Training writes a checkpoint; running the same recipe again goes on from it."""
    run = _client(endpoint=endpoint).cancel(run_id)
    _show(run.as_json(), output, _line(run))


def runs(
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many, newest first.")] = 20,
    endpoint: Endpoint = None,
    experiment: Experiment = None,
    output: OutputOption = Output.text,
) -> None:
    """List the newest runs of the experiment."""
    found = _client(endpoint=endpoint, experiment=experiment).runs(limit)
    _show([run.as_json() for run in found], output, "\n".join(map(_line, found)) or "no runs")


def register(
    pipeline: Annotated[list[str], typer.Argument(metavar="PIPELINE...", help="Pipelines of vlmflow.")],
    image: Annotated[str | None, typer.Option(help="Image that the steps run in, by digest.")] = None,
    endpoint: Endpoint = None,
    output: OutputOption = Output.text,
) -> None:
    """Register pipelines in Kubeflow; an unchanged one gets no new version."""
    import tempfile
    from pathlib import Path

    from vlmflow import compiler, kfp_api

    kfp = _client(endpoint=endpoint).kfp
    found = []
    with tempfile.TemporaryDirectory(prefix="vlmflow-packages-") as folder:
        for name in pipeline:
            package = compiler.compile_pipeline(name, image)
            pipeline_id, version_id, new = kfp_api.register(kfp, name, package.text, Path(folder))
            found.append({"pipeline": name, "pipeline_id": pipeline_id, "version_id": version_id, "new": new})
    _show(found, output, "\n".join(f"{f['pipeline']}  {'new version' if f['new'] else 'unchanged'}" for f in found))


def compare(
    model: Model,
    version: Annotated[list[str], typer.Argument(metavar="VERSION...", help="Versions of NAME-candidates.")],
    output: OutputOption = Output.text,
) -> None:
    """Scores and gates of candidates, side by side, with chance."""
    rows = _client().compare(version, model)
    names = sorted({name for row in rows for name in row["scores"]})
    head = f"{'':<14}{'chance':>8}" + "".join(f"{row['version']:>9}" for row in rows)
    lines = [head]
    for name in names:
        chance = next((row["chance"][name] for row in rows if name in row["chance"]), float("nan"))
        cells = "".join(f"{row['scores'][name]:>9.3f}" if name in row["scores"] else f"{'-':>9}" for row in rows)
        lines.append(f"{name:<14}{chance:>8.3f}{cells}")
    for row in rows:
        failed = [name for name, verdict in row["gates"].items() if verdict != "pass"]
        lines.append(f"version {row['version']}: {'fails ' + ', '.join(failed) if failed else 'passes its gates'}")
    _show(rows, output, "\n".join(lines))


def promote(
    model: Model,
    candidate: Annotated[str, typer.Option(help="Version of NAME-candidates.")],
    approval_tag: Annotated[str, typer.Option(help="Tag that must also be set on the candidate.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Judge, change nothing.")] = False,
    output: OutputOption = Output.text,
) -> None:
    """Make a candidate champion, if it passes every gate of its recipe and of the installation. Exit code 5 when it does not."""
    from vlmflow.registry import desk

    if dry_run:
        _, results = desk.verdict(model, candidate, approval_tag)
        value = [{"gate": r.name, "passed": r.passed, "detail": r.detail} for r in results]
        text = "\n".join(f"{'pass' if r.passed else 'FAIL'}  {r.name:<22} {r.detail}" for r in results)
        _show(value, output, text)
        if not all(result.passed for result in results):
            raise typer.Exit(5)
        return
    _outcome(_client().promote(model, candidate, approval_tag), output)


def rollback(
    model: Model,
    why: Annotated[str, typer.Option(help="Reason; it stays in the registry.")],
    output: OutputOption = Output.text,
) -> None:
    """Make the previous champion champion again; the promoter will not take the withdrawn candidate back."""
    _outcome(_client().rollback(model, why), output)


def _outcome(outcome: Outcome | Promotion, output: Output) -> None:
    text = (
        f"{outcome.model}: {outcome.action}; champion is version {outcome.version}, from candidate {outcome.candidate}"
    )
    _show(dict(vars(outcome)), output, text)


def history(model: Model, output: OutputOption = Output.text) -> None:
    """Who promoted or rolled back what, and when."""
    from vlmflow.registry import promote as promotion
    from vlmflow.registry import tracking

    rows = promotion.history(tracking.client(), model)
    lines = [
        f"{row.get('at', ''):<26} version {row['version']}: {row.get('action', '')} by {row.get('by', '?')}"
        for row in rows
    ]
    _show(rows, output, "\n".join(lines) or "nothing was promoted yet")


def doctor(
    endpoint: Endpoint = None,
    namespace: Namespace = None,
    kubernetes: Annotated[
        bool, typer.Option("--kubernetes/--no-kubernetes", help="Also ask the Kubernetes API.")
    ] = True,
    output: OutputOption = Output.text,
) -> None:
    """Check the installation: each fault with its cure. Exit code 6 when there is one."""
    from vlmflow import doctor as examination

    found = examination.examine(_client(endpoint=endpoint, namespace=namespace).settings, kubernetes)
    marks = {"ok": "ok  ", "fault": "FAIL", "skipped": "-   "}
    lines = [
        f"{marks[f.state]}  {f.what:<34} {f.detail}" + (f"\n        cure: {f.cure}" if f.cure else "") for f in found
    ]
    _show([vars(f) for f in found], output, "\n".join(lines))
    if any(each.state == "fault" for each in found):
        raise typer.Exit(6)
