"""What a user writes, before it is a recipe: YAML in which no key stands twice, presets, and ``section.key=value``."""

from __future__ import annotations

from typing import Any

from vlmflow.errors import RecipeError


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Set ``section.key=value`` pairs (value read as YAML) in a plain recipe dictionary.

    Raises:
        RecipeError: no ``=``, or a path through something that is not a section.
    """
    import yaml

    for item in overrides:
        path, sep, text = item.partition("=")
        if not sep or not path:
            raise RecipeError(f"override '{item}': expected section.key=value, for example stages.sft.epochs=2")
        node: Any = raw
        *parents, last = path.strip().split(".")
        for depth, part in enumerate(parents):
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict):
                node = node.setdefault(part, {})
            else:
                raise RecipeError(f"override '{item}': {_no_place(node, parents[:depth], part)}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"override '{item}': the value is not YAML ({' '.join(str(error).split())})") from error
        if isinstance(node, list) and last.isdigit() and int(last) < len(node):
            node[int(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise RecipeError(f"override '{item}': {_no_place(node, parents, last)}")
    return raw


def _no_place(node: Any, path: list[str], name: str) -> str:
    """Why an override finds no field `name` at a path."""
    where = ".".join(path)
    if isinstance(node, list):
        return f"'{where}' is a list of {len(node)}, counted from 0, and has no entry '{name}'"
    return f"'{where}' is not a section and has no field '{name}'"


def read_yaml(data: bytes, where: str) -> Any:
    """YAML in which no key stands twice: the standard reader keeps the last of two and says nothing of the first.

    Raises:
        RecipeError: naming the key and both lines. yaml.YAMLError: it is not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: dict[str, int] = {}
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                line = key.start_mark.line + 1
                if key.value in seen:
                    raise RecipeError(
                        f"{where}: the key '{key.value}' stands in line {seen[key.value]} and again in line {line}, and only one of "
                        "them could count; join them or rename one"
                    )
                seen[key.value] = line
            return super().construct_mapping(node, deep)

    return yaml.load(data, Loader)  # a SafeLoader: plain values only


def expand_presets(raw: dict[str, Any], overrides: list[str]) -> list[str]:
    """Replace each ``preset=NAME`` by the recipe's own list, in place, so that later overrides still win."""
    presets = raw.get("presets") or {}
    expanded: list[str] = []
    for item in overrides:
        name = item.removeprefix("preset=")
        if name == item:
            expanded.append(item)
        elif name in presets:
            expanded += presets[name]
        else:
            raise RecipeError(
                f"override '{item}': this recipe has no preset '{name}'; it has {sorted(presets) or 'none'}"
            )
    return expanded
