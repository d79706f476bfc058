"""Arguments that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Output(StrEnum):
    """How data are printed."""

    text = "text"
    json = "json"


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file or URI of a recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes, e.g. stages.sft.epochs=2.")
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="text for people, json for programs.")]
StateOption = Annotated[Path, typer.Option("--state-dir", help="Folder of the local stack and of runs.")]
