"""Write docs/recipe.md from the recipe schema, so that the reference cannot say anything else than the code.

python docs/make_recipe_reference.py          # rewrite docs/recipe.md
python docs/make_recipe_reference.py --check  # exit 1 when it is out of date
"""

from __future__ import annotations

import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vlmflow.recipe import Recipe
from vlmflow.recipe.base import Section

TARGET = Path(__file__).with_name("recipe.md")
INTRO = """\
# Recipe reference

Generated from `vlmflow/recipe/` by `python docs/make_recipe_reference.py`; do not edit by hand. Two complete recipes
are [`recipes/points-tiny.yaml`](../recipes/points-tiny.yaml) and [`recipes/points-9b.yaml`](../recipes/points-9b.yaml).

A recipe is one YAML file (JSON is YAML too). `vlmflow recipe validate FILE` checks it and starts nothing;
`vlmflow recipe show FILE` prints it with every default filled in. Unknown fields are refused with the names that are
allowed there; all problems are listed at once.

**Overrides** follow the file on the command line as `section.key=value`; the value is read as YAML and list items are
addressed by number: `stages.sft.epochs=2`, `stages.ocr.train.0.lr=2e-4`, `pull.allow_hosts=[127.0.0.1]`. YAML reads
`2e-4` without a dot as text, which the schema turns into a number; `2.0e-4` is a number at once. `preset=NAME` stands
for the recipe's own list `presets.NAME`; what follows it on the command line wins.

**Sources.** "POINTS" is arXiv 2409.04828 v3, "POINTS1.5" its successor (arXiv 2412.08443), "CapsFusion" the repository
baaivision/CapsFusion. A default without a source is a choice of this project.

**Notation.** `NAME` stands for a name that you choose (lower-case letters, digits, `_` and `-`, at most 63 characters,
beginning with a letter or digit), `[]` for the items of a list. "required" means that there is no default.

**What the schema checks beyond single fields**: datasets and sources that are named must exist in `data`; `text: ocr`,
`synthetic` or `fused` and `keep: true` are possible for the curated dataset only; `soup.stage` must be the last stage;
candidates cannot be called greedy, average or maximum; `soup.maximum` is at most the number of candidates; a soup needs
benchmarks; `packs` must be a multiple of `processes`; a tile must hold an even number of patches a side; conversations
are learned in chat style; captions in chat style need at least one instruction; `bootstrap` is not a name for a stage.

**What the pipeline `points` carries**: datasets `seed`, `web` and `sft`; stages `ocr`, `align` and `sft` in this order;
`curation.dataset` is `web` or absent; there is a soup. `vlmflow recipe validate` and `vlmflow run` refuse anything else.
"""


def render() -> str:
    """The whole reference as Markdown."""
    places: dict[type[Section], list[str]] = {}
    _walk(Recipe, "", places)
    parts = [INTRO]
    for section, paths in places.items():
        paths.sort(key=lambda path: path.startswith("bootstrap"))  # the usual place first
        title = "Top level" if paths == [""] else ", ".join(f"`{path}`" for path in paths)
        parts.append(f"\n## {title}\n\n{_purpose(section)}\n")
        parts.append("\n| field | type | default | allowed | meaning |\n| --- | --- | --- | --- | --- |\n")
        prefix = f"{paths[0]}." if paths[0] else ""
        for name, field in section.model_fields.items():
            cells = (
                f"`{prefix}{name}`",
                _type(field),
                _default(field),
                _allowed(field),
                _words(field.description or ""),
            )
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(parts)


def _walk(section: type[Section], path: str, places: dict[type[Section], list[str]]) -> None:
    """Collect every section with the paths where it stands, in order of first appearance."""
    places.setdefault(section, []).append(path)
    for name, field in section.model_fields.items():
        for inner, suffix in _sections(field.annotation):
            _walk(inner, f"{path}.{name}{suffix}".lstrip("."), places)


def _sections(annotation: Any) -> list[tuple[type[Section], str]]:
    """(section, path suffix) of the sections that a type holds: `.NAME` in a mapping, `[]` in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [(annotation, "")]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is dict:
        return [(section, f".NAME{rest}") for section, rest in _sections(arguments[1])]
    if origin is list:
        return [(section, f"[]{rest}") for section, rest in _sections(arguments[0])]
    return [found for argument in arguments for found in _sections(argument)] if _is_union(origin) else []


def _is_union(origin: Any) -> bool:
    return origin in (typing.Union, types.UnionType)


def _purpose(section: type[Section]) -> str:
    return _words(" ".join((section.__doc__ or "").split()).replace("``", "`"))


def _words(text: str) -> str:
    """Python's None as YAML writes it."""
    return re.sub(r"\bNone\b", "null", text)


def _type(field: FieldInfo) -> str:
    return _name(field.annotation)


def _name(annotation: Any) -> str:
    """A type in the words of YAML."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _name(arguments[0])
    if origin is typing.Literal:
        return "choice"
    if _is_union(origin):
        return " or ".join("null" if a is type(None) else _name(a) for a in arguments)
    if origin is dict:
        inner = _name(arguments[1])
        return f"mapping of {inner}" if inner != "any" else "mapping"
    if origin is list:
        return f"list of {_name(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {_name(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return {str: "text", int: "integer", float: "number", bool: "true/false", Any: "any"}[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if field.default_factory is not None:
        value = field.default_factory()  # type: ignore[call-arg]
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Section):
        return "its own defaults"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"`{value}`" if value else "empty text"
    if isinstance(value, dict | list) and not value:
        return "empty"
    if isinstance(value, list):
        return ", ".join(f"`{item}`" for item in value)
    if isinstance(value, tuple):
        return ", ".join(f"{item:g}" for item in value)
    return f"{value:_}" if isinstance(value, int) else f"{value:g}"


def _allowed(field: FieldInfo) -> str:
    """Choices and bounds; a bound of an item of a union or list is that of its inner annotation."""
    found = [text for item in field.metadata for text in _bound(item).split(", ")]
    found += _inner_bounds(field.annotation)
    kept = list(dict.fromkeys(text for text in found if text))
    if "> 0" in kept and ">= 0" in kept[:2]:
        kept.remove(">= 0")
    return ", ".join(kept)


def _inner_bounds(annotation: Any) -> list[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return [" / ".join(f"`{value}`" for value in arguments)]
    if origin is typing.Annotated:
        inner = [item for extra in arguments[1:] for item in (extra.metadata if isinstance(extra, FieldInfo) else [])]
        return [_bound(item) for item in inner] + _inner_bounds(arguments[0])
    if origin in (dict, tuple, list) or _is_union(origin):
        return [text for argument in arguments for text in _inner_bounds(argument)]
    return []


def _bound(item: Any) -> str:
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    texts = [f"{sign} {_number(getattr(item, name))}" for name, sign in signs if getattr(item, name, None) is not None]
    if (least := getattr(item, "min_length", None)) is not None:
        texts.append(f"at least {least}")
    return ", ".join(texts)


def _number(value: float) -> str:
    return f"{value:_}" if isinstance(value, int) else f"{value:g}"


def main(arguments: list[str]) -> int:
    """Write the reference, or with `--check` compare it."""
    text = render()
    if "--check" in arguments:
        current = TARGET.read_text(encoding="utf-8") if TARGET.exists() else ""
        if current != text:
            print(f"{TARGET} is out of date; run: python docs/make_recipe_reference.py", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
