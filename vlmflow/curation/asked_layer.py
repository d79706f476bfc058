"""A layer whose rows come from text models: `dataset.layer.add_layer` with an `Asker` behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vlmflow.curation.ask import Asker, Row, Script, columns, prefixed
from vlmflow.curation.chat_format import Endpoint
from vlmflow.curation.inputs import check_own_failures
from vlmflow.curation.journal import sweep
from vlmflow.dataset.layer import add_layer, digest_for, read_columns
from vlmflow.errors import StepFailed

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import LayerPart, Manifest
    from vlmflow.dataset.shard import ShardReader
    from vlmflow.recipe.curation import EndpointFields
    from vlmflow.step import Context

Scripts = Callable[["ShardReader", dict[str, dict[str, Row]]], Iterator[Script]]


def endpoint(spec: EndpointFields, seed: int, **others: Any) -> Endpoint:
    """The endpoint that a section of the recipe describes; `others` replace what it says (another url_env, ...)."""
    given: dict[str, Any] = {
        "url_env": spec.endpoint_env, "key_env": spec.key_env, "model": str(spec.model_name),  # type: ignore[attr-defined]
        "lost_limit": spec.lost_limit,
    }  # fmt: skip
    given |= {"concurrency": spec.concurrency, "timeout": spec.timeout, "seed": seed}
    return Endpoint(**{**given, **others})


def add_asked_layer(
    ctx: Context,
    manifest: Manifest,
    name: str,
    *,
    params: dict[str, Any],
    version: int,
    schema: Mapping[str, str],
    endpoints: Mapping[str, Endpoint],
    scripts: Scripts,
    section: str,
    failure_limit: float,
    prices: Mapping[str, tuple[float | None, float | None]],
    reads: Iterable[str] = (),
    pictures: bool = False,
    summary: Callable[[Manifest], dict[str, Any]] | None = None,
) -> Manifest:
    """Like `dataset.layer.add_layer`, the rows being made by scripts. Adds the cost columns and the summary's `failures`,
    tokens and, where `prices` (server -> prices of a million prompt and completion tokens) are given, `cost`.

    Raises:
        ServiceError, RecipeError: an endpoint does not work or is not configured.
        StepFailed: more of the samples that reached this step failed than `failure_limit`.
    """
    reads = tuple(reads)
    schema = {**schema, **columns(*endpoints)}
    journalled = f"{name}/{digest_for(manifest, name, params, version, schema, reads)[:24]}"
    shards = {shard.uri: shard.sha256[:24] for shard in manifest.shards}
    asker: Asker | None = None

    def compute(reader: ShardReader, upstream: dict[str, dict[str, Row]]) -> list[Row]:
        nonlocal asker
        asker = asker or Asker(ctx, journalled, endpoints)  # a finished step needs no endpoint
        return asker.rows(shards[reader.uri], scripts(reader, upstream), pictures)

    def whole_summary(sealed: Manifest) -> dict[str, Any]:
        reasons = check_own_failures(sealed, name, failure_limit, section, ctx.scratch)
        paid = costs(sealed.layer(name).parts, prices, ctx.scratch)
        return {"failures": reasons, **(summary(sealed) if summary else {}), **paid}

    try:
        sealed = add_layer(
            ctx, manifest, name, params=params, version=version, schema=schema, compute=compute, reads=reads,
            failure_limit=1.0, summary=whole_summary,
        )  # fmt: skip
    except StepFailed:
        sweep(ctx, name)
        raise
    finally:
        if asker:
            asker.close()
    sweep(ctx, name)
    return sealed


def costs(
    parts: Iterable[LayerPart], prices: Mapping[str, tuple[float | None, float | None]], scratch: Any = None
) -> dict[str, Any]:
    """Requests and tokens of a layer by server, and what they cost where the recipe gives prices."""
    import pyarrow.compute as pc

    total: Counter[str] = Counter(dict.fromkeys(columns(*prices), 0))
    for part in parts:
        table = read_columns(part, scratch, columns(*prices))
        total.update({name: pc.sum(table[name]).as_py() or 0 for name in table.column_names})
    found: dict[str, Any] = dict(total)
    for server, (price_in, price_out) in prices.items():
        if price_in is not None or price_out is not None:
            read, written = total[prefixed(server, "prompt_tokens")], total[prefixed(server, "completion_tokens")]
            found[prefixed(server, "cost")] = round((read * (price_in or 0) + written * (price_out or 0)) / 1e6, 6)
    return found
