"""`vlmflow data`: look at datasets: what they hold, how it is distributed, single samples, differences; and export them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmflow.cli_options import Output, OutputOption, StateOption

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.look.table import Table

data_app = typer.Typer(no_args_is_help=True, help="Look at datasets: statistics, gallery, differences, single samples.")

DEFAULT_STATE = Path(".vlmflow")
DatasetArgument = Annotated[
    str, typer.Argument(metavar="DATASET", help="Path or URI of a manifest, or a dataset's name in the last local run.")
]
SamplesOption = Annotated[
    bool | None,
    typer.Option(
        "--samples/--no-samples",
        help="Also what the samples' own JSON says (alt text, URL, size); default: when little has to be fetched for it.",
    ),
]
ScratchNote = "The layers are read once into a file under the scratch folder; the next command finds it."


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _table(manifest: Manifest, samples: bool | None) -> Table:
    from vlmflow.look.table import open_table
    from vlmflow.storage import default_scratch

    return open_table(manifest, default_scratch(), samples, _say)


@data_app.command("show")
def show(dataset: DatasetArgument, state_dir: StateOption = DEFAULT_STATE, output: OutputOption = Output.text) -> None:
    """Print what a dataset holds: sources, shards, layers, failures, lineage."""
    from vlmflow.look import find, summary
    from vlmflow.storage import default_scratch

    with find.opened([dataset], state_dir) as (manifest,):
        facts = summary.facts(manifest, default_scratch())
    if output is Output.json:
        _print_json(facts)
    else:
        typer.echo(summary.as_text(facts))


@data_app.command("stats", epilog=ScratchNote)
def stats(
    dataset: DatasetArgument,
    samples: SamplesOption = None,
    page: Annotated[Path | None, typer.Option(help="HTML page with plots to write.")] = None,
    state_dir: StateOption = DEFAULT_STATE,
    output: OutputOption = Output.text,
) -> None:
    """Distribution of every column of every layer, over all samples and by source; image sizes; duplicates."""
    from vlmflow.look import find
    from vlmflow.look import stats as measure

    with find.opened([dataset], state_dir) as (manifest,):
        made = measure.stats(manifest, _table(manifest, samples))
    if page:
        from vlmflow.look import stats_page

        _write(page, stats_page.page(made))
    if output is Output.json:
        _print_json(made)
    else:
        typer.echo(measure.as_text(made))


@data_app.command("gallery", epilog=ScratchNote)
def gallery(
    dataset: DatasetArgument,
    filters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILTER=VALUE]...",
            help="As in the page's address: source, state, reason, error, is.COLUMN, min.COLUMN, max.COLUMN, q, in, sort, order, show.",
        ),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve pages on 127.0.0.1 until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 = a free one.")] = 0,
    page: Annotated[Path, typer.Option("--to", help="File to write without --serve.")] = Path("gallery.html"),
    each: Annotated[int, typer.Option(min=1, max=100, help="Samples of each group in the file.")] = 8,
    samples: SamplesOption = None,
    state_dir: StateOption = DEFAULT_STATE,
) -> None:
    """Look at samples: filter, sort, see what was dropped and why. A served gallery, or a file with a bounded choice."""
    from vlmflow.look import find, query
    from vlmflow.look.samples import Samples
    from vlmflow.storage import default_scratch

    with find.opened([dataset], state_dir) as (manifest,):
        table = _table(manifest, samples)
        asked = query.parse([_pair(text) for text in filters or []], table)
        reading = Samples(manifest, default_scratch())
        if not serve:
            from vlmflow.look import static

            _write(page, static.page(manifest, table, reading, asked, each))
            typer.echo(f"wrote {page}")
            return
        from vlmflow.look.gallery import Gallery
        from vlmflow.look.server import GalleryServer

        shown = Gallery(manifest, table, reading)
        try:
            with GalleryServer(shown, port) as server:
                typer.echo(server.url + asked.url().rstrip("?") + "  (Ctrl-C ends it)")
                server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("ended", err=True)
        finally:
            shown.close()


@data_app.command("export")
def export(
    dataset: DatasetArgument,
    to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="A folder of its own: a path, file:// or s3://.")],
    form: Annotated[
        str, typer.Option("--format", help="webdataset (tars) or parquet (as the Hugging Face Hub shows it).")
    ] = "webdataset",
    layers: Annotated[str, typer.Option(help="Layers to merge in, with commas between; 'all' = all of them.")] = "",
    kept: Annotated[bool, typer.Option("--kept", help="Only samples that layer keep keeps.")] = False,
    caption: Annotated[
        str | None, typer.Option(help="The text for tools of image-text pairs: alt, or a layer such as fused.")
    ] = None,
    samples_per_file: Annotated[int, typer.Option(min=1, help="Samples of every file but the last.")] = 1000,
    state_dir: StateOption = DEFAULT_STATE,
    output: OutputOption = Output.text,
) -> None:
    """Write a merged WebDataset or a Parquet dataset for other tools; started again after a kill, it continues."""
    from dataclasses import asdict

    from vlmflow.dataset.export import export as write
    from vlmflow.look import find
    from vlmflow.step import Progress
    from vlmflow.storage import default_scratch

    with find.opened([dataset], state_dir) as (manifest,):
        chosen = list(manifest.layers) if layers == "all" else [name for name in layers.split(",") if name]
        total = manifest.layers["keep"].summary.get("kept") if kept and "keep" in manifest.layers else None
        with Progress("export", f"export {manifest.name}", total or manifest.samples, "samples") as progress:
            made = write(
                manifest, to, form, layers=chosen, kept_only=kept, caption=caption, samples_per_file=samples_per_file,
                scratch=default_scratch(), advance=progress.advance,
            )  # fmt: skip
    if output is Output.json:
        _print_json(asdict(made))
    else:
        dropped = f", {made.dropped} not kept" if kept else ""
        found = f" ({made.found} were there already)" if made.found else ""
        typer.echo(f"{made.uri}: {made.samples} samples in {len(made.files)} files{found}{dropped}")


@data_app.command("diff", epilog=ScratchNote)
def diff(
    before: DatasetArgument,
    after: DatasetArgument,
    examples: Annotated[int, typer.Option(min=0, max=1000, help="Examples of each kind.")] = 5,
    samples: SamplesOption = None,
    state_dir: StateOption = DEFAULT_STATE,
    output: OutputOption = Output.text,
) -> None:
    """What differs between two datasets: shards, samples, parameters, values, and decisions that flipped."""
    from vlmflow.look import diff as compare
    from vlmflow.look import find

    with find.opened([before, after], state_dir) as (first, second):
        made = compare.diff(first, second, _table(first, samples), _table(second, samples), examples)
    if output is Output.json:
        _print_json(made)
    else:
        typer.echo(compare.as_text(made))


@data_app.command("trace")
def trace(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key of a sample, e.g. web-00000301.")],
    dataset: Annotated[
        str | None, typer.Argument(metavar="[DATASET]", help="Path or URI of a manifest, or a dataset's name.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--from-model", metavar="URI", help="Look in the data of this model instead (URI or models:/NAME/3)."
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Write the sample's picture into this file.")] = None,
    state_dir: StateOption = DEFAULT_STATE,
    output: OutputOption = Output.text,
) -> None:
    """Everything of one sample: table row, URL, shard, layers with parameters, decision; or why it is not there."""
    from vlmflow.look import trace as follow
    from vlmflow.storage import default_scratch

    if (dataset is None) == (model is None):
        raise typer.BadParameter("give a dataset or --from-model, one of the two")
    with follow.datasets(dataset, model, state_dir) as manifests:
        found = follow.among(manifests, key, default_scratch())
        if image:
            _write_image(follow.picture(manifests, found, default_scratch()), image)
    if output is Output.json:
        _print_json(found)
    else:
        typer.echo(follow.as_text(found))


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise typer.BadParameter(f"filters are written NAME=VALUE, found '{text}'")
    return name, value


def _write(page: Path, text: str) -> None:
    _write_image(text.encode(), page)


def _write_image(data: bytes, path: Path) -> None:
    from vlmflow.storage_file import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(data))
