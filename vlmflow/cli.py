"""The commands. `--help` needs no network and imports nothing heavy: every command imports its own work.

Exit codes: 0 done; 2 the input (recipe, data, model) is wrong; 3 the object store; 4 a step failed; 5 the registry;
6 a server; 130 stopped by Ctrl-C. Errors go to standard error as they are, without a traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmflow import cli_cluster
from vlmflow.cli_data import data_app
from vlmflow.cli_options import Output, OutputOption, Overrides, RecipeArgument, StateOption
from vlmflow.cli_plan import plan_app
from vlmflow.errors import VlmflowError

if TYPE_CHECKING:
    from vlmflow.local import RunResult

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train vision-language models by the POINTS recipe: curation, training, soup, evaluation, export.",
)
recipe_app = typer.Typer(no_args_is_help=True, help="Look at a recipe and check it.")
app.add_typer(recipe_app, name="recipe")
app.add_typer(data_app, name="data")
app.add_typer(plan_app, name="plan")
cli_cluster.add(app)


DEMO_RECIPE = "recipes/points-tiny.yaml"
Processes = Annotated[
    int,
    typer.Option(
        min=0, help="Groups that shards are dealt to, and tasks at a time; 0 = one group, two tasks at a time."
    ),
]

PipelineOption = Annotated[str, typer.Option(help="Pipeline: points, curate, train, soup, evaluate, export.")]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


@recipe_app.command("show")
def recipe_show(recipe: RecipeArgument, overrides: Overrides = None, output: OutputOption = Output.text) -> None:
    """Print the recipe with defaults filled in and overrides applied."""
    from vlmflow.recipe import dump, load

    loaded = load(recipe, overrides or [])
    if output is Output.json:
        _print_json(loaded.model_dump(mode="json"))
    else:
        typer.echo(dump(loaded), nl=False)


@recipe_app.command("validate")
def recipe_validate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    pipeline: PipelineOption = "points",
    output: OutputOption = Output.text,
) -> None:
    """Check the recipe, and that the pipeline can run it; starts nothing."""
    from vlmflow.digest import digest
    from vlmflow.preflight import resolve

    loaded = resolve(recipe, overrides or [], pipeline=pipeline)
    facts = {
        "name": loaded.name,
        "digest": digest(loaded),
        "datasets": list(loaded.data),
        "stages": [*(["bootstrap"] if loaded.bootstrap else []), *loaded.stages],
        "candidates": list(loaded.soup.candidates) if loaded.soup else [],
        "benchmarks": list(loaded.evaluation.benchmarks),
    }
    if output is Output.json:
        _print_json({"valid": True, **facts})
    else:
        typer.echo(f"{recipe} is valid")
        for name, value in facts.items():
            typer.echo(f"  {name:<11}{', '.join(value) if isinstance(value, list) else value}")


@app.command()
def up(
    state_dir: StateOption = Path(".vlmflow"),
    export: Annotated[
        bool,
        typer.Option(
            "--export", help='Print the variables, keys included, for a shell: eval "$(vlmflow up --export)".'
        ),
    ] = False,
    output: OutputOption = Output.text,
) -> None:
    """Start the local object store and MLflow (idempotent)."""
    import shlex

    from vlmflow import local_stack

    info = local_stack.up(state_dir, lambda text: typer.echo(text, err=True))
    if export:
        for name, value in local_stack.environment(info).items():
            typer.echo(f"export {name}={shlex.quote(str(value))}")
        return
    facts = {
        "store": info.root,
        "s3_endpoint": info.s3_endpoint,
        "mlflow": info.mlflow_uri,
        "state": str(info.state_dir),
    }
    if output is Output.json:
        _print_json(facts)
    else:
        for name, value in facts.items():
            typer.echo(f"{name:<12}{value}")


@app.command()
def down(state_dir: StateOption = Path(".vlmflow")) -> None:
    """Stop the local object store and MLflow; data stay."""
    from vlmflow import local_stack

    stopped = local_stack.down(state_dir)
    typer.echo(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


@app.command()
def status(state_dir: StateOption = Path(".vlmflow"), output: OutputOption = Output.text) -> None:
    """Show whether the local object store and MLflow run and answer. Exit code 6 when one does not."""
    from vlmflow import local_stack

    states = local_stack.status(state_dir)
    fields = ("name", "running", "healthy", "pid", "url", "rss_bytes")
    rows = [{field: getattr(each, field) for field in fields} for each in states]
    if output is Output.json:
        _print_json(rows)
    else:
        for row in rows:
            state = "healthy" if row["healthy"] else "does not answer" if row["running"] else "stopped"
            typer.echo(f"{row['name']:<8}{state:<17}{row['url'] or ''}  {(row['rss_bytes'] or 0) / 2**20:.0f} MiB")
    if not all(each.healthy for each in states):
        raise typer.Exit(6)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    pipeline: PipelineOption = "points",
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="Further parameter of the pipeline, NAME=VALUE.")
    ] = None,
    processes: Processes = 0,
    state_dir: StateOption = Path(".vlmflow"),
    output: OutputOption = Output.text,
) -> None:
    """Run a recipe on this machine, by default all of it; started again after a kill, it continues."""
    from rich.console import Console

    from vlmflow import local

    console = Console(highlight=False, stderr=output is Output.json)
    with _interruptible():
        named = cli_cluster.parameters(parameter or [])
        result = local.run(recipe, overrides or [], state_dir, console, pipeline, named, processes)
    _show_result(result, output)


@app.command()
def demo(
    recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help="Recipe on the demo's tables.")] = DEMO_RECIPE,
    overrides: Overrides = None,
    processes: Processes = 0,
    state_dir: StateOption = Path(".vlmflow"),
    output: OutputOption = Output.text,
) -> None:
    """Run the tiny recipe on real images served over HTTP by this command itself."""
    if "=" in recipe:  # only overrides were given
        recipe, overrides = DEMO_RECIPE, [recipe, *(overrides or [])]
    from rich.console import Console

    from vlmflow import demo as data
    from vlmflow import local
    from vlmflow.recipe import load

    console = Console(highlight=False, stderr=output is Output.json)
    plain = load(recipe, overrides or []).model_dump(mode="json")
    with _interruptible(), data.serve(state_dir) as site:
        moved = site.overrides(data.fields(plain))
        result = local.run(recipe, [*moved, *(overrides or [])], state_dir, console, processes=processes)
    _show_result(result, output)


@app.command("compile")
def compile_(
    pipelines: Annotated[list[str] | None, typer.Argument(help="Names of pipelines; none = all of them.")] = None,
    folder: Annotated[Path, typer.Option("--to", help="Folder for the YAML packages.")] = Path("pipelines/compiled"),
    image: Annotated[str, typer.Option(help="Image of all steps, e.g. registry/vlmflow@sha256:...")] = "",
    installation: Annotated[
        Path | None, typer.Option(help="Platform configuration: node pools, secrets, image (docs/pipelines.md).")
    ] = None,
    require_digest: Annotated[bool, typer.Option(help="Refuse an image that is not pinned by digest.")] = False,
) -> None:
    """Compile pipelines to the YAML packages for Kubeflow and check them."""
    from vlmflow import compiler
    from vlmflow.installation import load

    asked = load(installation) if installation else None
    made = {
        name: compiler.compile_pipeline(name, image or None, require_digest, asked)
        for name in pipelines or compiler.PIPELINES
    }
    for name, package in made.items():  # nothing is written unless all of them keep the rules
        typer.echo(f"wrote {compiler.write(package, folder / f'{name}.yaml')}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Say how to go on after Ctrl-C; the runner has ended its processes by then."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; start the same command again to continue", err=True)
        raise typer.Exit(130) from None


def _show_result(result: RunResult, output: Output) -> None:
    from vlmflow.estimate import human

    if output is Output.json:
        report = str(result.report) if result.report else None
        found = {"run": result.run_id, "report": report, "seconds": result.seconds, "datasets": result.datasets}
        _print_json({**found, **result.summary})
        return
    from rich.console import Console

    console = Console(highlight=False)
    if scores := result.summary.get("scores"):
        ordered = {name: scores[name] for name in result.summary.get("models", scores)}
        console.print(_score_table(ordered, result.summary.get("chance", {})))
    for name in ("chosen", "registered", "exported"):
        if value := result.summary.get(name):
            shown = value if isinstance(value, str) else ", ".join(f"{k} {v}" for k, v in value.items())
            console.print(f"{name:<11}{shown}", markup=False, soft_wrap=True)
    for name, uri in result.datasets.items():
        console.print(f"{'dataset':<11}{name} {uri}", markup=False, soft_wrap=True)
    console.print(
        f"{'steps':<11}{len(result.seconds)} in {human(sum(result.seconds.values()))} of step time", markup=False
    )
    if result.report:
        console.print(f"{'report':<11}{result.report}", markup=False, soft_wrap=True)


def _score_table(scores: dict[str, dict[str, float]], chance: dict[str, float]) -> Any:
    from rich.table import Table

    columns = sorted({name for row in scores.values() for name in row}, key=lambda name: (name == "mean", name))
    table = Table(title="Accuracy on the report split", title_justify="left")
    table.add_column("model")
    for name in columns:
        table.add_column(name, justify="right")
    rows = {"(chance)": chance, **scores} if chance else scores
    for model, row in rows.items():
        table.add_row(model, *(f"{row[name]:.1%}" if name in row else "" for name in columns))
    return table


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `vlmflow` command."""
    try:
        app(arguments)
    except VlmflowError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:  # of the state folder: every other place has words of its own
        from vlmflow.errors import StorageError
        from vlmflow.storage_file import full_disk

        shown = full_disk(error) or StorageError(f"{error.filename or 'a file'}: {error.strerror or error}")
        typer.echo(f"error: {shown}", err=True)
        sys.exit(shown.exit_code)


if __name__ == "__main__":
    main()
