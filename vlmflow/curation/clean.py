"""Checks of each sample by itself, as layer `clean`: picture, length, language, repetition, marks of a model's own.

A check that fails is a problem, a code with its numbers for people ("aspect 41.2 > 30"); `keep` drops samples that have
one. The layer also tells the language and the main object of the text, by which `keep` balances.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vlmflow.curation import phash
from vlmflow.curation.columns import stacked
from vlmflow.curation.inputs import text_of
from vlmflow.curation.language import language
from vlmflow.curation.objects import OTHER, main_object
from vlmflow.curation.repetition import repetition
from vlmflow.curation.words import turns, words
from vlmflow.dataset.layer import add_layer

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.dataset.shard import ShardReader
    from vlmflow.recipe.curation import CleanSpec
    from vlmflow.step import Context

LAYER = "clean"
VERSION = 1
SCHEMA = {"problems": "list<str>", "language": "str", "words": "int", "object": "str"}
CODES = {
    "image": "a picture that cannot be decoded",
    "side": "a picture with too short a side",
    "aspect": "a picture too long for its width, or the other way round",
    "empty": "no word in the text",
    "words": "too few or too many words",
    "language": "a language that the recipe does not name; texts whose language cannot be told stay",
    "repetition": "the text says the same again and again",
    "token": "a special token of a chat format or a tokenizer stands in the text",
}
TOKENS = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|</?(?:s|unk|pad|bos|eos|mask|img|image|video|box|ref|quad|im_start|im_end|im_patch|image_placeholder)>"
    r"|\[/?INST\]|<</?SYS>>",
    re.IGNORECASE,
)
"""What tokenizers and chat formats reserve. A text that spells one would be cut into another structure than it has."""
PLACE = "<image>"  # where an image stands in conversations: legal there, and there alone
Row = dict[str, Any]


def run(ctx: Context, manifest: Manifest) -> Manifest:
    """Add layer `clean`: problems (codes of CODES with numbers), language (ISO 639-1 or null), words, object.

    The text is that of `curation.clean.text`; with "alt" the turns of samples that have conversations or preferences
    instead. A text that an earlier step could not write is no problem here: such samples are not scored.

    Raises:
        DataError: no layer `phash`, or no layer of that text.
    """
    spec = ctx.recipe.curation.clean
    if spec is None:
        return manifest
    reads = [phash.LAYER, *([spec.text] if spec.text not in (None, "alt") else [])]
    for name in reads:
        manifest.layer(name)

    def compute(reader: ShardReader, upstream: dict[str, dict[str, Row]]) -> Iterator[Row]:
        for key in reader.keys():
            meta = reader.meta(key)
            yield row(spec, key, meta, _text(spec.text, key, meta, upstream), upstream[phash.LAYER][key]["error"])

    return add_layer(
        ctx, manifest, LAYER, params=spec.model_dump(mode="json"), version=VERSION, schema=SCHEMA, compute=compute,
        reads=reads, summary=lambda sealed: _summary(sealed, ctx.scratch),
    )  # fmt: skip


def _text(which: str | None, key: str, meta: Mapping[str, Any], upstream: dict[str, dict[str, Row]]) -> str | None:
    """The text to check; None where there is none to check."""
    if which is None:
        return None
    if which == "alt":
        said = turns(meta)
        return "\n".join(said).replace(PLACE, " ") if said else str(meta.get("text") or "")
    text, missing = text_of(which, key, meta, upstream)
    return None if missing else text


def row(spec: CleanSpec, key: str, meta: Mapping[str, Any], text: str | None, broken: str | None) -> Row:
    """The layer's row of one sample. `broken`: why its images could not be decoded."""
    problems = [f"image: {broken}"] if broken else []
    for number, about in enumerate(meta.get("images") or []):
        width, height = int(about.get("width") or 0), int(about.get("height") or 0)
        which = f" (image {number})" if len(meta["images"]) > 1 else ""
        if min(width, height) < spec.min_side:
            problems.append(f"side {min(width, height)} < {spec.min_side}{which}")
        if max(width, height) > spec.max_aspect * min(width, height):
            problems.append(
                f"aspect {max(width, height) / max(1, min(width, height)):.1f} > {spec.max_aspect:g}{which}"
            )
    if text is None:
        return {"key": key, "problems": problems, "object": OTHER}
    count, spoken, repeated = len(words(text)), language(text), repetition(text)
    if not count:
        problems.append("empty")
    elif count < spec.min_words:
        problems.append(f"words {count} < {spec.min_words}")
    if count > spec.max_words:
        problems.append(f"words {count} > {spec.max_words}")
    if spec.languages and spoken and spoken not in spec.languages:
        problems.append(f"language {spoken} is not {' or '.join(spec.languages)}")
    if repeated > spec.max_repetition:
        problems.append(f"repetition {repeated:.2f} > {spec.max_repetition:g}")
    if token := TOKENS.search(text):
        problems.append(f"token {token.group()}")
    return {"key": key, "problems": problems, "language": spoken, "words": count, "object": main_object(text)}


def code(problem: str) -> str:
    """The code (a key of CODES) of a problem with its numbers."""
    return problem.split(" ", 1)[0].rstrip(":")


def _summary(sealed: Manifest, scratch: Any) -> dict[str, Any]:
    if not sealed.shards:
        return {}
    table = stacked(sealed, LAYER, scratch, ["problems", "language", "object"])
    found = Counter(code(p) for p in table["problems"].combine_chunks().flatten().to_pylist())
    return {
        "dropped": sum(n > 0 for n in table["problems"].combine_chunks().value_lengths().to_pylist()),
        "problems": _counted(found),
        "languages": _counted(Counter(table["language"].fill_null("unknown").to_pylist())),
        "objects": _counted(Counter(table["object"].to_pylist())),
    }


def _counted(counts: Counter[str]) -> list[list[Any]]:
    """[name, count], commonest first."""
    return [list(pair) for pair in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
