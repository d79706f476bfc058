"""`vlmflow plan`: what a recipe will do and need, before anything is started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from vlmflow.cli_options import Output, OutputOption, RecipeArgument, StateOption

plan_app = typer.Typer(no_args_is_help=True, help="What a recipe will do and need, before anything is started.")


@plan_app.command("data")
def data(
    recipe: RecipeArgument,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STAGE] [SECTION.KEY=VALUE]...", help="One stage instead of all; changes to the recipe."
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Ranks that packs are dealt to; default: the stage's.")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="NAME=URI", help="Manifest of a dataset; default: the last run's."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="URI", help="model.json of the model whose tokenizer counts; default: the last run's."),
    ] = None,
    page: Annotated[Path | None, typer.Option(help="HTML page to write; default: in the state folder.")] = None,
    state_dir: StateOption = Path(".vlmflow"),
    output: OutputOption = Output.text,
) -> None:
    """How each stage's data are mixed and packed: steps, fill, padding, imbalance, shares, and what is left out."""
    from rich.console import Console

    from vlmflow import local, plan_data
    from vlmflow.dataset import manifest
    from vlmflow.models.store import load_ref
    from vlmflow.recipe import load
    from vlmflow.storage_file import write_atomically
    from vlmflow.training import plan_view

    stages = [text for text in arguments or [] if "=" not in text]
    if len(stages) > 1:
        raise typer.BadParameter(f"one stage at most, found {', '.join(stages)}; changes are written SECTION.KEY=VALUE")
    loaded = load(recipe, [text for text in arguments or [] if "=" in text])
    state = state_dir.absolute()
    labels = plan_data.labels_of(loaded, stages)
    given = plan_data.given_data(loaded, dataset or [])
    manifests, init = plan_data.from_last_run(loaded, recipe, state, labels, set(given), model is not None)
    os.environ.setdefault("VLMFLOW_SCRATCH", str(state / "scratch"))
    with local.stack(state, Console(highlight=False, stderr=True)):
        manifests |= {name: manifest.load(uri) for name, uri in given.items()}
        init = load_ref(model) if model else init
        assert init is not None
        plans = plan_data.plans_of(loaded, labels, manifests, init, processes)
    target = page or state / "plans" / f"{loaded.name}.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = plan_view.page(f"Data plan of {loaded.name}", plans)
    write_atomically(target, lambda file: file.write(text.encode()))
    if output is Output.json:
        numbers = {name: summary for name, (_, summary) in plans.items()}
        typer.echo(json.dumps({"stages": numbers, "page": str(target)}, indent=1, ensure_ascii=False))
        return
    for name, (_, summary) in plans.items():
        typer.echo(plan_data.as_text(name, summary))
    typer.echo(f"page  {target}")


@plan_app.command("train")
def train(
    recipe: RecipeArgument,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs over all nodes.")],
    memory: Annotated[float, typer.Option(min=0.0, help="GiB of one GPU.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STAGE] [SECTION.KEY=VALUE]...", help="One stage instead of all; changes to the recipe."
        ),
    ] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the peak that is reached.")] = 0.4,
    tokens: Annotated[float | None, typer.Option(min=1, help="Tokens a stage shows, e.g. 2e9.")] = None,
    peak_tflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="bf16 peak of one GPU; default VLMFLOW_PEAK_TFLOPS, else 989.5 (H100, H200)."),
    ] = None,
    output: OutputOption = Output.text,
) -> None:
    """Parameters, operations, memory of a GPU under each ZeRO stage, steps and hours. Exit code 2 when nothing fits."""
    from vlmflow.recipe import load
    from vlmflow.training import forecast

    stages = [text for text in arguments or [] if "=" not in text]
    if len(stages) > 1:
        raise typer.BadParameter(f"one stage at most, found {', '.join(stages)}; changes are written SECTION.KEY=VALUE")
    loaded = load(recipe, [text for text in arguments or [] if "=" in text])
    machine = forecast.machine(gpus, memory, mfu, peak_tflops)
    made = forecast.plan_train(loaded, machine, stages[0] if stages else None, tokens)
    if output is Output.json:
        plain = {"machine": vars(machine), "stages": [each.as_json() for each in made]}
        typer.echo(json.dumps(plain, indent=1, ensure_ascii=False))
    else:
        from rich.console import Console

        from vlmflow.training.forecast_text import show

        show(made, machine, Console(highlight=False))
    if any(each.zero is None for each in made):
        raise typer.Exit(2)


def _labels(recipe: Recipe, wanted: list[str]) -> list[tuple[str, str | None]]:
    """(stage, soup candidate) of every training of the recipe. Raises RecipeError for a stage that it lacks."""
    from vlmflow.training.run import stage_of

    for name in wanted:
        stage_of(recipe, name)
    found: list[tuple[str, str | None]] = []
    for name in [*(["bootstrap"] if recipe.bootstrap else []), *recipe.stages]:
        soup = recipe.soup if recipe.soup and recipe.soup.stage == name else None
        if not wanted or name in wanted:
            found += [(name, candidate) for candidate in (soup.candidates if soup else [None])]
    return found


def _given(recipe: Recipe, data: list[str]) -> dict[str, str]:
    """URIs of ``--data`` by dataset. Raises RecipeError for anything else than NAME=URI."""
    from vlmflow.errors import RecipeError

    found = {}
    for item in data:
        name, sign, uri = item.partition("=")
        if not sign or name not in recipe.data:
            raise RecipeError(
                f"--data {item}: give NAME=URI with a dataset of the recipe, one of {sorted(recipe.data)}"
            )
        found[name] = uri
    return found


def _last_run(
    recipe: Recipe, source: str, state: Path, labels: list[tuple[str, str | None]], given: set[str], model: bool
) -> tuple[dict[str, Manifest], ModelRef | None]:
    """Datasets and the initial model of the last runs, as far as they are not given. Raises DataError that names the
    command to run first."""
    from vlmflow import last_run
    from vlmflow.errors import DataError
    from vlmflow.training.run import ingredients

    needed = {use.dataset for stage, candidate in labels for use in ingredients(recipe, stage, candidate)} - given
    found: dict[str, Manifest] = {}
    init: ModelRef | None = None
    folders = last_run.folders(state, recipe.name)
    for folder in folders:
        if (init or model) and needed <= set(found):
            break
        found = last_run.datasets(folder) | found
        init = init or last_run.initial_model(folder)
    missing = [*sorted(needed - set(found)), *([] if init or model else ["initial model"])]
    if missing:
        where = f"{len(folders)} runs of it in {state}" if folders else f"no run of it in {state}"
        raise DataError(
            f"recipe '{recipe.name}': nothing is known of {', '.join(missing)}; there is {where}, and lengths of samples are "
            f"measured on pulled data with the model's tokenizer. Run `vlmflow run {source}` first (it may be stopped when "
            "training begins), or name them with --data NAME=URI and --model URI."
        )
    return found, init


def _plans(
    recipe: Recipe,
    labels: list[tuple[str, str | None]],
    manifests: dict[str, Manifest],
    init: ModelRef,
    processes: int | None,
) -> dict[str, tuple[Any, dict[str, Any]]]:
    from vlmflow import step
    from vlmflow.training import plan_view, prepare
    from vlmflow.training.run import ingredients, stage_of

    ctx = step.context(recipe, "plan")
    reading = prepare.reading(ctx, init)
    plans = {}
    for name, candidate in labels:
        stage = stage_of(recipe, name)
        examples = prepare.examples_of(ctx, stage, ingredients(recipe, name, candidate), manifests, reading)
        plan = prepare.plan_of(ctx, stage.model_copy(update={"failure_limit": 1.0}), examples, reading)
        numbers = plan_view.summary(plan, stage.budget.tokens, processes or stage.processes)
        counted = plan.examples["failed"] + plan.report["dropped"]
        numbers["above_failure_limit"] = counted > stage.failure_limit * plan.examples["seen"]
        plans["-".join(filter(None, [name, candidate]))] = (plan, numbers)
    return plans


def _text(name: str, n: dict[str, Any]) -> str:
    waste = n["padding_of"]
    lines = [
        name,
        f"  samples    {n['samples']} usable, {n['shown']} shown ({n['split']} stretches of long ones); {n['filtered']} filtered out, "
        f"{n['failed']} unusable, {n['dropped']} with parts too long",
        f"  steps      {n['steps']}, {n['packs']} packs; {n['tokens']} tokens, {n['targets']} targets, {n['tiles']} tiles",
        f"  fill       {n['fill_tokens']:.1%} of tokens, {n['fill_tiles']:.1%} of tiles",
        f"  padding    0.0%; batches of the same samples {waste['batches']:.1%}, by similar length {waste['buckets']:.1%}",
        f"  imbalance  {n['imbalance']:.3f} over {n['processes']} processes",
    ]
    if "text_share" in n:
        shares = " ".join(f"{row['text_share']:.0%}" for row in n["over_time"])
        lines.append(
            f"  text share {n['text_share']:.1%} of samples, over the steps {shares}; passes: text {n['text_passes']:g}, images "
            f"{n['image_passes']:g}"
        )
    for row in n["ingredients"]:
        sources = row["sources"] if isinstance(row["sources"], str) else ", ".join(row["sources"])
        lines.append(
            f"  data       {row['share']:>6.1%}  {row['dataset']} ({sources}), {row['text']}: {row['samples']} samples, {row['shown']} "
            f"shown, {row['tokens']} tokens"
        )
    lines += [f"  left out   {r['count']} x {r['reason']} (e.g. {r['example']})" for r in n["reasons"]]
    if n["above_failure_limit"]:
        lines.append("  WARNING    more samples are left out than failure_limit allows: training would refuse to start")
    return "\n".join(lines)
