"""`vlmflow plan`: what a recipe will do and need, before anything is started."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from vlmflow.cli_options import Output, OutputOption, RecipeArgument

plan_app = typer.Typer(no_args_is_help=True, help="What a recipe will do and need, before anything is started.")


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
