"""Small HTML pages that each step shows in the Kubeflow UI: a table of values and a table of rows, nothing external."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

from vlmflow.errors import VlmflowError
from vlmflow.report.html import Safe, el

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.step import Context

PREVIEW_SAMPLES = 12
THUMBNAIL = 112  # pixels, longer side
_STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:1.5em;color:#1b1f24}table{border-collapse:collapse;margin:1em 0}"
    "td,th{border:1px solid #d0d7de;padding:4px 8px;text-align:left;vertical-align:top;max-width:32em;"
    "overflow-wrap:anywhere}th{background:#f6f8fa}h1{font-size:1.3em}"
)


Rows = list[Any] | Safe  # of a page: dictionaries that share their keys, or markup of the gallery


class Picture(str):
    """A data: URI that `page` shows as an image."""


def page(title: str, values: dict[str, Any], rows: Rows) -> str:
    """One page: a heading, name-value pairs, and rows (dictionaries that share their keys) or markup of the gallery."""
    from vlmflow.look.style import CSS

    gallery = rows if isinstance(rows, Safe) else None
    style = CSS if gallery else _STYLE
    parts = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{style}</style>"]
    parts.append("<main class='one'>" if gallery else "<main>")
    parts.append(f"<h1>{html.escape(title)}</h1>")
    if values:
        body = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{_cell(v)}</td></tr>" for k, v in values.items())
        parts.append(f"<table class='facts'>{body}</table>")
    if gallery:
        parts.append(gallery)
    elif isinstance(rows, list) and rows:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        head = "".join(f"<th>{html.escape(str(c))}</th>" for c in columns)
        body = "".join("<tr>" + "".join(f"<td>{_cell(r.get(c, ''))}</td>" for c in columns) + "</tr>" for r in rows)
        parts.append(f"<table><tr>{head}</tr>{body}</table>")
    return "\n".join([*parts, "</main>"]) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, Picture):
        return f"<img alt='' src='{html.escape(value, quote=True)}'>"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "<br>".join(f"{html.escape(str(k))}: {_cell(v)}" for k, v in value.items())
    return html.escape(str(value))


def preview(ctx: Context, manifest: Manifest, layer: str | None) -> Rows:
    """What a dataset's page shows: of one with layers a small gallery (lowest, highest, some of every reason and failure), of
    a pulled one its first samples."""
    from vlmflow.look import static

    if not manifest.shards:
        return []
    if manifest.layers:
        try:
            return static.excerpt(manifest, ctx.scratch, layer)
        except VlmflowError as error:  # a page must not fail a finished step
            return el("p", f"Its samples cannot be shown: {error}")
    return _first(ctx, manifest)


def _first(ctx: Context, manifest: Manifest) -> list[dict[str, Any]]:
    from vlmflow.dataset.shard import ShardReader

    reader = ShardReader(manifest.shards[0], ctx.scratch)
    rows = []
    for key in reader.keys()[:PREVIEW_SAMPLES]:
        sample = reader.read(key)
        row: dict[str, Any] = {"key": key, "image": _thumbnail(sample.images[0]) if sample.images else ""}
        talk = [str(turn.get("value", "")) for turn in sample.meta.get("conversations") or []]
        for pair in sample.meta.get("preferences") or []:
            talk += [*(turn["value"] for turn in pair["conversations"]), f"+ {pair['chosen']}", f"- {pair['rejected']}"]
        row["of the table"] = sample.meta.get("text") or " / ".join(talk)
        rows.append(row)
    return rows


def _thumbnail(data: bytes) -> str:
    """A small picture; what does not decode is said so, because a page must not fail a finished step."""
    from vlmflow.errors import DataError
    from vlmflow.vision.image import decode_scaled

    try:
        small = decode_scaled(data, lambda *_: (THUMBNAIL, THUMBNAIL)).image
    except DataError as error:
        return f"cannot be shown: {error}"
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return Picture("data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode())
