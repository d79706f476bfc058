"""Export step: the trained model as a Hugging Face directory that needs nothing of ours, tested before it is published.

The directory's address is the digest of its files, and `ref.json` is written last: an export exists when that file does,
and it only exists for a directory whose smoke test passed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from vlmflow import storage
from vlmflow.digest import digest
from vlmflow.export import card, folder, smoke
from vlmflow.models import store
from vlmflow.registry.rows import chosen_row, final_row, score_rows
from vlmflow.registry.run import soup_summary
from vlmflow.soup.tensors import open_weights

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.evaluation.scores import Scores
    from vlmflow.step import Context

MARKER = "ref.json"


class ExportRef(BaseModel):
    """A published export: where, its files, and the outcome of its smoke test."""

    model_config = ConfigDict(extra="forbid")
    name: str
    uri: str
    digest: str
    weights_sha256: str
    files: list[store.FileRef]
    smoke: smoke.SmokeResult


def run(
    ctx: Context,
    model: store.ModelRef,
    scores: Mapping[str, Scores],
    soup: Any = None,
    datasets: Mapping[str, Manifest] | None = None,
) -> ExportRef:
    """Build, test and publish the export under `{root}/exports/{digest}/`; finds a finished one again.

    Args: as `vlmflow.registry.run.run`.

    Raises:
        ModelError: the model folder is incomplete, or the export does not load alone or differs from the model.
        DataError: no scores belong to the model's weights.
    """
    rows = score_rows(scores)
    final = final_row(scores, model.weights_sha256, chosen_row(soup))
    source = store.fetch(model, ctx.scratch)
    text = card.render(
        card.CardInputs(
            recipe=ctx.recipe, recipe_digest=digest(ctx.recipe), model=model, rows=rows, final=final,
            parameters=parameters(source), datasets=dict(datasets or {}),
            soup=soup_story(soup),
        )
    )  # fmt: skip
    ctx.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ctx.scratch, prefix="export-") as work:
        target = Path(work) / ctx.recipe.name
        folder.build(source, target, text, ctx.recipe.export.shard_bytes)
        files = store.describe_files(target)
        address = digest([[file.path, file.sha256] for file in files])
        uri = storage.join(ctx.root, "exports", address)
        if (known := storage.read_finished(storage.join(uri, MARKER), ExportRef)) is not None:
            return known
        outcome = smoke.compare(source, target, questions(ctx), ctx.recipe.evaluation.max_new_tokens, ctx.scratch)
        with ctx.progress("export", len(files), "files") as progress:
            for file in files:
                storage.put_file(target / file.path, storage.join(uri, file.path))
                progress.advance()
    ref = ExportRef(
        name=ctx.recipe.name, uri=uri, digest=address, weights_sha256=model.weights_sha256, files=files, smoke=outcome
    )
    storage.write_json(storage.join(uri, MARKER), ref.model_dump(mode="json"))
    return ref


def questions(ctx: Context) -> list[smoke.Question]:
    """The first `export.examples` held-out questions, dealt from the benchmarks in turn; a drawn picture without any."""
    from vlmflow.evaluation import prompts
    from vlmflow.evaluation.split import divide
    from vlmflow.evaluation.table_file import table_of
    from vlmflow.evaluation.tsv import Table

    spec, wanted, queues = ctx.recipe.evaluation, ctx.recipe.export.examples, []
    for name, benchmark in sorted(spec.benchmarks.items()):
        table = Table(table_of(ctx, benchmark), benchmark.kind, name)
        sides, _ = divide(table.questions, ctx.recipe.seed, spec.selection_fraction, str(table.path))
        queues.append([(table, benchmark, question) for question in sides["report"][:wanted]])
    found = []
    for place in range(wanted):
        found += [queue[place] for queue in queues if place < len(queue)]
    asked = [
        smoke.Question(table.images(question), prompts.build(question, benchmark.kind, benchmark.suffix))
        for table, benchmark, question in found[:wanted]
    ]
    return asked or [smoke.Question([_drawn()], "Describe the image.")]


def parameters(source: Path) -> int:
    """Number of stored parameters, from the headers of the safetensors files (tied weights are stored once)."""
    with open_weights(source) as weights:
        return sum(prod(tensor.shape) for tensor in weights.tensors.values())


def soup_story(soup: Any) -> dict[str, Any]:
    """Choice, trace and the weight hashes of the chosen soup's ingredients."""
    story = soup_summary(soup)
    if soup is not None and hasattr(soup, "entries"):
        chosen = soup.entries[soup.chosen]
        story["ingredients"] = {name: soup.candidates[name].ref.weights_sha256 for name in chosen.ingredients}
    return story


def _drawn() -> Any:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (96, 64), "white")
    ImageDraw.Draw(image).ellipse((20, 8, 68, 56), fill="red", outline="black")
    return image
