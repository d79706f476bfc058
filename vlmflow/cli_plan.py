"""`vlmflow plan`: what a recipe will do and need, before anything is started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmflow.cli_options import Output, OutputOption, RecipeArgument, StateOption

if TYPE_CHECKING:
    from vlmflow.recipe import Recipe
    from vlmflow.training.plan import Plan

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
    measured: Annotated[
        bool, typer.Option("--measured", help="Count the packs of the last run's data instead of full ones.")
    ] = False,
    state_dir: StateOption = Path(".vlmflow"),
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
    plans = _largest_plans(loaded, recipe, state_dir.absolute(), stages) if measured else None
    made = forecast.plan_train(loaded, machine, stages[0] if stages else None, tokens, plans)
    if output is Output.json:
        plain = {"machine": vars(machine), "stages": [each.as_json() for each in made]}
        typer.echo(json.dumps(plain, indent=1, ensure_ascii=False))
    else:
        from rich.console import Console

        from vlmflow.training.forecast_text import show

        show(made, machine, Console(highlight=False))
    if any(each.zero is None for each in made):
        raise typer.Exit(2)


def _largest_plans(recipe: Recipe, source: str, state: Path, stages: list[str]) -> dict[str, Plan]:
    """For each stage the pack plan of the last run's data; of its soup candidates the one with most tokens."""
    from rich.console import Console

    from vlmflow import local, plan_data

    labels = plan_data.labels_of(recipe, stages)
    manifests, init = plan_data.from_last_run(recipe, source, state, labels, set(), False)
    assert init is not None
    os.environ.setdefault("VLMFLOW_SCRATCH", str(state / "scratch"))
    with local.stack(state, Console(highlight=False, stderr=True)):
        made = plan_data.plans_of(recipe, labels, manifests, init, None)
    found: dict[str, Plan] = {}
    for (name, _), (plan, _) in zip(labels, made.values(), strict=True):
        if name not in found or plan.pack_tokens.sum() > found[name].pack_tokens.sum():
            found[name] = plan
    return found
