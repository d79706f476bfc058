"""Everything a run needs, checked before anything is spent: by the pipeline's first task and by the command line.

Each check either passes or raises the error that says what to do; the list of passed checks is shown in the UI.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlmflow import storage, web
from vlmflow.curation.table import check_host
from vlmflow.errors import DataError, NotFound, ServiceError, VlmflowError
from vlmflow.pipeline_needs import Needs, needs_of, suits
from vlmflow.ports import used

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.recipe import Recipe
    from vlmflow.recipe.curation import OcrSpec
    from vlmflow.step import Context

TIMEOUT = 10.0  # seconds for one probe over HTTP
LEAST_FREE_BYTES = 256 * 2**20
LOOKED_FOR = 100  # tars of a source, evenly spread
OPENED_BYTES = 256 * 2**20  # a larger table is only looked for; the step that reads it checks its columns


def resolve(
    source: str,
    overrides: list[str],
    soup_choice: str = "recipe",
    pipeline: str = "points",
    scorer: str = "",
    model: str = "",
) -> Recipe:
    """Load a recipe from a path or URI with overrides, and refuse what the pipeline cannot run.

    Args:
        soup_choice: put in the place of `soup.choose`, unless it is `recipe`.
        scorer: address of the model that captions and scores, in the place of the recipe's; no bootstrap is trained then.
            The recipe gets the URI of its folder, so that an alias that moves meanwhile changes nothing.
        model: registered version whose recipe is used when `source` is empty.

    Raises:
        RecipeError: naming the field and what is allowed.
        ModelError, RegistryError: there is no such scorer.
    """
    from vlmflow.recipe import load
    from vlmflow.registry import address

    changes = list(overrides)
    if soup_choice != "recipe":
        changes.append(f"soup.choose={soup_choice}")
    if scorer:
        changes += [f"curation.scorer={address.find(scorer).uri}", "bootstrap=null"]
    if source:
        recipe = load(source, changes)
    else:
        with tempfile.TemporaryDirectory(prefix="vlmflow-recipe-") as folder:
            recipe = load(str(address.recorded_recipe(model, Path(folder))), changes)
    suits(recipe, pipeline)
    return recipe


def check_given(
    ctx: Context,
    models: Collection[str] = (),
    manifests: Mapping[str, str] | None = None,
    trainings: Collection[tuple[str, str]] = (),
) -> list[dict[str, str]]:
    """Look for what the form names, so that a wrong name or address ends the run in its first seconds.

    Args:
        models: addresses (URIs or registered versions); empty ones are none.
        manifests: dataset name -> URI of its manifest.
        trainings: as `trainings_of` lists them; their layers must be in the manifests.

    Raises:
        ModelError, RegistryError, DataError: there is none. RecipeError: the recipe has no such stage or candidate.
    """
    from vlmflow.dataset import manifest
    from vlmflow.registry import address

    rows, opened = [], {}
    for named in filter(None, models):
        rows.append({"check": f"model {named}", "found": address.find(named).weights_sha256})
    for name, uri in (manifests or {}).items():
        with _named(f"dataset {name}"):
            opened[name] = found = manifest.load(uri)
        rows.append({"check": f"dataset {name}", "found": f"{found.samples} samples, {found.digest}"})
    for name, extra in trainings:
        _check_layers(ctx.recipe, name, extra, opened)
        rows.append({"check": "stage and its layers", "found": f"{name} {extra}".strip()})
    return rows


def trainings_of(recipe: Recipe, pipeline: str, stage: str = "", candidate: str = "") -> list[tuple[str, str]]:
    """(stage, candidate) of what a pipeline trains from given datasets: the stage that is asked for, or the soup's
    candidates."""
    if stage:
        return [(stage, candidate)]
    if pipeline == "soup" and recipe.soup:
        return [(recipe.soup.stage, name) for name in recipe.soup.candidates]
    return []


def _check_layers(recipe: Recipe, stage: str, candidate: str, opened: Mapping[str, Manifest]) -> None:
    """The texts and selections that a stage learns from are made by `curate`; pulling alone does not make them."""
    from vlmflow.recipe.mixture import CURATED_TEXTS
    from vlmflow.training.run import ingredients

    for use in ingredients(recipe, stage, candidate or None):
        layers = [*([use.text] if use.text in CURATED_TEXTS else []), *(["keep"] if use.keep else [])]
        have = opened[use.dataset].layers if use.dataset in opened else {}
        if missing := [layer for layer in layers if layer not in have]:
            raise DataError(
                f"stage '{stage}' learns from layers {missing} of dataset '{use.dataset}'; the manifest given for it has "
                f"{sorted(have) or 'none'}. Run the pipeline curate and give the manifest of its last step as {use.dataset}."
            )


def check(
    ctx: Context, pipeline: str = "points", given: Collection[str] = (), stage: str = "", candidate: str = ""
) -> list[dict[str, str]]:
    """Probe what the pipeline needs of tables, object store, scratch disk, MLflow, services and, where stages are trained
    there, the cluster.

    Args:
        given: datasets that come as manifests; their tables are not looked for.
        stage: stage that is trained, with its soup candidate; empty = all of the recipe's datasets are pulled.

    Returns:
        One row a check: `check` (what) and `found` (what answered).

    Raises:
        StorageError: the store refuses, is full, or does not answer.
        DataError: a table of the recipe does not exist, lacks a column, or a benchmark has a wrong row.
        ServiceError: a server of tables, MLflow or another service does not answer, or its address is not configured.
    """
    needs, rows = needs_of(pipeline), []
    probes: list[Callable[[Context], list[tuple[str, str]]]] = [_store, _scratch]
    if needs.tables or needs.benchmarks:
        probes.append(partial(_tables, needs=needs, given=given, stage=stage, candidate=candidate))
    probes += [
        probe
        for wanted, probe in ((needs.mlflow, _mlflow), (needs.curation, _services), (needs.training, _training))
        if wanted
    ]
    with ctx.progress("preflight", len(probes), "checks") as progress:
        for probe in probes:
            rows += [{"check": what, "found": found} for what, found in probe(ctx)]
            progress.advance()
    return rows


def _store(ctx: Context) -> list[tuple[str, str]]:
    storage.check(ctx.root)
    return [("object store writes, reads and deletes", ctx.root)]


def _scratch(ctx: Context) -> list[tuple[str, str]]:
    ctx.scratch.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(ctx.scratch).free
    if free < LEAST_FREE_BYTES:
        raise ServiceError(
            f"scratch disk {ctx.scratch} has {free / 2**20:.0f} MiB free, a run wants at least "
            f"{LEAST_FREE_BYTES / 2**20:.0f} MiB: steps would fail in the middle. Free space or set VLMFLOW_SCRATCH."
        )
    return [("scratch disk", f"{free / 2**30:.1f} GiB free at {ctx.scratch}")]


def _tables(ctx: Context, needs: Needs, given: Collection[str], stage: str, candidate: str) -> list[tuple[str, str]]:
    from vlmflow.curation.table import check_columns, columns_of, localize
    from vlmflow.evaluation.table_file import local_table
    from vlmflow.evaluation.tsv import Table

    recipe = ctx.recipe
    allow = frozenset(host.lower() for host in recipe.pull.allow_hosts)
    large: list[str] = []
    several: list[str] = []
    data = {
        name: spec
        for name, spec in recipe.data.items()
        if needs.tables and name not in given and used(recipe, name, stage, candidate)
    }
    compared = needs.tables and recipe.curation.contamination
    benchmarks = recipe.evaluation.benchmarks if needs.benchmarks or compared else {}
    for dataset, spec in data.items():
        for name, source in spec.sources.items():
            field = f"data.{dataset}.sources.{name}"
            if (uri := source.table) is None:
                _tars(source.shards or [], f"{field}.shards")
                continue
            folder = uri.endswith("/") or "*" in uri
            if not folder and _size(f"{field}.table", uri, allow) > OPENED_BYTES and not uri.endswith(".parquet"):
                large.append(uri)
                continue
            with _named(f"{field}.table"):
                table = localize(uri, ctx.scratch, allow)
            check_columns(table, columns_of(source), field)
            several += [table.found] * (len(table.files) > 1)
    for name, benchmark in benchmarks.items():
        field = f"evaluation.benchmarks.{name}.table"
        if _size(field, benchmark.table, allow) > OPENED_BYTES:
            large.append(benchmark.table)
            continue
        with _named(f"{field}: {benchmark.table}"):
            Table(local_table(benchmark.table, ctx.scratch, allow), benchmark.kind, name)
    count = sum(len(spec.sources) for spec in data.values()) + len(benchmarks)
    found = f"{count} tables"
    if large:
        found += f"; not opened, above {OPENED_BYTES // 2**20} MiB: {', '.join(large)}"
    if several:
        found += f"; folders: {', '.join(several)}"
    return [("tables of the recipe exist, with their columns and, of benchmarks, their rows", found)]


def _tars(shards: list[str], field: str) -> None:
    """Look for the tars of a source (of many, for some). Raises DataError naming the first that is not there."""
    from vlmflow.curation.tar_stream import expand

    uris = expand(shards, field)
    for uri in uris[:: -(-len(uris) // LOOKED_FOR)]:
        try:
            with _named(f"{field}: {uri}"):
                storage.size(uri)
        except NotFound as error:
            raise DataError(f"{field}: there is no tar at {uri}. Correct the recipe or put the tar there.") from error


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Put the recipe's field before an error of the table that it names."""
    try:
        yield
    except VlmflowError as error:
        named = type(error)(f"{field}: {error}")
        raise named from error


def _size(field: str, uri: str, allow: frozenset[str]) -> int:
    """Bytes of a table (0 where a web server does not tell). Raises DataError or ServiceError when it is not there."""
    if uri.startswith(web.SCHEMES):
        if field.startswith("data."):
            check_host(uri, allow)
        try:
            with web.opener(allow).open(urllib.request.Request(uri, method="HEAD"), timeout=TIMEOUT) as answer:
                return int(answer.headers.get("Content-Length") or 0)
        except urllib.error.HTTPError as error:
            if error.code in (405, 501):  # a server that knows no HEAD; the GET will show what there is
                return 0
            raise DataError(
                f"{field}: the server answers {error.code} {error.reason} for {uri}. Correct the address or put the table there."
            ) from error
        except OSError as error:
            if refused := web.forbidden(error):
                raise DataError(
                    f"{field}: {uri}: {refused}, an address of a private network; name the host in pull.allow_hosts "
                    f"({sorted(allow)}) if that is meant, or copy the table to the store."
                ) from None
            raise ServiceError(
                f"{field}: no server answers at {uri} ({getattr(error, 'reason', error)}); the steps would fail that need "
                "the table. Start the server or correct the address, then run the same command again."
            ) from error
    try:
        with _named(f"{field}: {uri}"):
            return storage.size(uri)
    except NotFound as error:
        raise DataError(f"{field}: there is no table at {uri}. Correct the recipe or put the table there.") from error


def _mlflow(ctx: Context) -> list[tuple[str, str]]:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise ServiceError(
            "MLFLOW_TRACKING_URI is not set: the last steps register the model there, after hours of training. "
            "Set it, or let `vlmflow run` start the local stack."
        )
    if uri.startswith(("http://", "https://")):
        _answers(f"{web.without_credentials(uri).rstrip('/')}/health", "MLflow (MLFLOW_TRACKING_URI)")
    return [("MLflow answers", web.without_credentials(uri))]


def _services(ctx: Context) -> list[tuple[str, str]]:
    rows = []
    for field, variable in ctx.recipe.curation.endpoints():
        if not (url := os.environ.get(variable, "")):
            raise ServiceError(
                f"{field} asks a model server, but {variable} is not set; it must hold the base URL of an OpenAI-compatible "
                "endpoint, up to and with /v1."
            )
        _alive(web.without_credentials(url), f"{field}: the server that {variable} names")
        rows.append((f"endpoint of {field} answers", variable))  # its address may hold a key
    return [*rows, *(_ocr(ctx.recipe.curation.ocr) if ctx.recipe.curation.dataset else [])]


def _ocr(spec: OcrSpec) -> list[tuple[str, str]]:
    """The OCR engine and where it runs. On a cluster the ocr step has an image and a node of its own: nothing to see here."""
    if not os.environ.get("VLMFLOW_PROGRESS"):
        return []
    from vlmflow.curation.ocr_engine import choose_provider, engine_name, model_files

    name = engine_name(spec.engine)
    model_files()
    return [("OCR engine and its models", f"{name} on {choose_provider(spec.provider)}")]


def _training(ctx: Context) -> list[tuple[str, str]]:
    from vlmflow.training import launchers

    rows = []
    if importlib.util.find_spec("transformers"):  # not in the smallest image; the model's own step looks again
        from vlmflow.models import config_fields

        config_fields.check(ctx.recipe.model)
        rows.append(("sizes of the model's random parts", "every field is known to transformers"))
    if launchers.chosen() != "trainjob":
        return rows
    from vlmflow.training.trainjob.preflight import check as check_cluster

    return [*rows, *check_cluster(ctx.recipe)]


def _alive(url: str, what: str) -> None:
    """Any answer will do: only the step itself sends the key. The address stays out of messages, as it may be private."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT):
            return
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServiceError(
            f"{what} does not answer ({getattr(error, 'reason', error)}); its step would fail after the steps before it. Start it or "
            "correct the variable, then run the same command again."
        ) from error


def _answers(url: str, what: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT):
            return
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ServiceError(
                f"{what} at {url} refuses us ({error.code}); check its user name and password."
            ) from error
        raise ServiceError(f"{what} at {url} answers with {error.code}; look at its log.") from error
    except (urllib.error.URLError, OSError) as error:
        raise ServiceError(
            f"{what} does not answer at {url}: {getattr(error, 'reason', error)}. Start it (`vlmflow up`) or correct the address."
        ) from error
