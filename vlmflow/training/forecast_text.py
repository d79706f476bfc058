"""A forecast for people: one table a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmflow.estimate import human

if TYPE_CHECKING:
    from rich.table import Table

    from vlmflow.training.forecast import Machine, StageForecast

GIB = 2**30


def lines(forecast: StageForecast, machine: Machine) -> list[str]:
    """What stands above and below the table of memory."""
    size, work, operations = forecast.parameters, forecast.work, forecast.operations
    moved = ", ".join(f"{row['module']} {_count(row['parameters'])}" for row in size["rows"] if row["trainable"])
    shown = [
        f"parameters   {_count(size['total'])}, trainable {_count(size['trainable'])} ({size['trainable'] / size['total']:.1%}): {moved}",
        f"operations   {_flops(operations['per_token'])} a token, {_flops(operations['per_tile'])} a tile, {_flops(operations['per_target'])} a target, "
        f"{_flops(operations['step'])} a step"
        + (f", and {_flops(operations['recomputed'])} recomputed" if operations["recomputed"] else ""),
        f"speed        {work['seconds_a_step']:.3g} s a step at {machine.mfu:.0%} of {machine.peak / 1e12:g} TFLOP/s on "
        f"{machine.gpus} GPUs, {work['packs_a_rank']} packs a GPU",
    ]
    if work["steps"] is not None and work["tokens"] is not None and work["hours"] is not None:
        shown.append(
            f"work         {_count(work['tokens'])} tokens in {work['steps']:,} steps: {_flops(operations['stage'])}, {human(work['hours'] * 3600)}"
        )
    return shown


def table(forecast: StageForecast, machine: Machine) -> Table:
    """Memory of one GPU by part, a column for each ZeRO stage."""
    from rich.table import Table

    made = Table(
        title=f"GiB of one GPU at its peak, of {machine.memory / GIB:g} ({machine.usable / GIB:.1f} usable), {forecast.dtype}",
        title_justify="left",
    )
    made.add_column("part")
    for column in forecast.memory:
        made.add_column(f"ZeRO {column['zero']}", justify="right")
    names = dict.fromkeys(name for column in forecast.memory for name in column["parts"])
    for name in names:
        made.add_row(
            name,
            *(_gib(column["parts"].get(name, 0)) for column in forecast.memory),
            end_section=name == list(names)[-1],
        )
    made.add_row("peak", *(_gib(column["total"]) for column in forecast.memory))
    made.add_row("at the", *(column["moment"] for column in forecast.memory))
    made.add_row("fits", *("yes" if column["fits"] else "no" for column in forecast.memory))
    return made


def show(forecasts: list[StageForecast], machine: Machine, console: Any) -> None:
    """Print all stages."""
    for forecast in forecasts:
        choice = "nothing fits" if forecast.zero is None else f"ZeRO {forecast.zero}"
        console.print(f"\n[bold]{forecast.stage}[/bold]: {choice}")
        for line in lines(forecast, machine):
            console.print(line, markup=False, soft_wrap=True)
        console.print(table(forecast, machine))
        for text in forecast.assumed:
            console.print(f"assumed: {text}", markup=False, soft_wrap=True)
        for text in forecast.problems:
            console.print(f"problem: {text}", markup=False, soft_wrap=True)
    console.print(
        "\nModel operations: 2 a weight and row forward, 4 backward where both gradients are needed; causal attention by sample;\n"
        "patches for the encoders; the head on targets only; recomputation apart (docs/training.md).",
        markup=False,
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _scaled(value: float, names: str) -> str:
    step = 0
    while value >= 1000 and step < len(names):
        value, step = value / 1000, step + 1
    return f"{value:.3g}{names[step - 1] if step else ''}"


def _count(value: float) -> str:
    return _scaled(value, "kMGT")


def _flops(value: float | None) -> str:
    return _scaled(value or 0.0, "kMGTPEZY") + "FLOP"
