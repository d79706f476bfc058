"""The page of one sample: its pictures, texts, decision, layers with their parameters, and how the dataset was made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from vlmflow.look.cards import link
from vlmflow.look.trace import of_sample
from vlmflow.report.html import Safe, el, facts, join, tag

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.look.samples import Samples


def body(manifest: Manifest, row: dict[str, Any], samples: Samples, beside: Safe | str = "") -> Safe:
    """The page's content; `beside` stands beside its pictures. Raises DataError when the shard does not hold what the manifest says."""
    found = of_sample(manifest, row["shard"], row["key"], samples)
    pictures = [
        el("a", el("img", src=f"/image?n={row['n']}&i={i}", alt=f"picture {i}"), href=f"/image?n={row['n']}&i={i}")
        for i in range(len(found["fetched"]))
    ]
    badge = {"kept": "good", "dropped": "bad"}.get(found["state"], "")
    head = el("h1", found["key"], " ", tag(found["state"], badge))
    parts: list[Any] = [head, el("p", found["reason"] or ""), el("div", *pictures, beside, cls="pics")]
    table = found["table"] or "its table is not recorded"
    parts += [
        el("h2", "Where it comes from"),
        facts([
            ("URL", link(found["url"]) if found["url"] else "none"),
            ("source", found["source"]), ("table", table), ("row", found["row"]),
            *((f"image {i}", _about(about)) for i, about in enumerate(found["fetched"])),
            ("shard", found["shard"]["uri"]), ("its sha256", found["shard"]["sha256"]),
            ("members", value({name: f"{length} bytes at {offset}" for name, (offset, length) in found["shard"]["members"].items()})),
        ]),
        el("h2", "Its JSON"), value({k: v for k, v in found["sample"].items() if k not in ("images", "url", "source")}),
    ]  # fmt: skip
    for name, layer in found["layers"].items():
        parts += [
            el("h2", f"Layer {name}"),
            value({k: _of(v) if k == "of" and v else v for k, v in (layer["row"] or {}).items()}),
            el(
                "details",
                el("summary", "step and parameters"),
                value(layer["params"]),
                facts(
                    [("version of the step", layer["version"]), ("digest", layer["digest"]), ("part", layer["part"])]
                ),
            ),
        ]
    parts.append(el("h2", "How the dataset was made"))
    for entry in found["lineage"]:
        parts.append(
            el("details", el("summary", entry["step"]), value({k: v for k, v in entry.items() if k != "step" and v}))
        )
    return join(parts)


def value(thing: Any) -> Safe:
    """Nested names and values as tables; what is deep as JSON."""
    if isinstance(thing, Safe):
        return thing
    if isinstance(thing, dict):
        rows = [(k, value(v)) for k, v in thing.items() if v is not None]
        return facts(rows) if rows else el("p", "nothing", cls="note")
    if isinstance(thing, list):
        if all(isinstance(item, str) for item in thing):
            return join([el("div", item) for item in thing])
        text = json.dumps(thing, ensure_ascii=False, indent=1)
        return el("pre", text if len(text) < 4000 else text[:4000] + " …")
    return el("span", "yes" if thing is True else "no" if thing is False else thing)


def _of(key: str) -> Safe:
    """The key of another sample, as a link to it."""
    return el("a", key, href="/?" + urlencode({"q": key, "in": "key"}))


def _about(image: dict[str, Any]) -> str:
    """What is known of a picture, in a line."""
    others = [f"{name} {image[name]}" for name in sorted(image) if name not in ("width", "height", "format")]
    return ", ".join([f"{image.get('width')}×{image.get('height')} {image.get('format')}", *others])
