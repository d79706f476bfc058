"""The exported directory: a model folder plus everything that transformers needs to run it without vlmflow.

The code files are vlmflow's own (model, configuration, processor, tiling); their imports are made relative to each
other, and nothing in them may import vlmflow. Bytes depend on the model and the card only: no clock, no host.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import vlmflow
from vlmflow.digest import sha256_file
from vlmflow.errors import ModelError

SUMS = "SHA256SUMS"
CARD = "README.md"
# Code of a family, by its config's model_type: file in the export -> file in vlmflow.
CODE: dict[str, dict[str, str]] = {
    "points": {
        "configuration_points.py": "models/points/configuration_points.py",
        "modeling_points.py": "models/points/modeling_points.py",
        "processing_points.py": "models/points/processing_points.py",
        "catty.py": "vision/catty.py",
        "rgb.py": "vision/rgb.py",
    }
}
AUTO_MAP: dict[str, dict[str, str]] = {
    "points": {
        "AutoConfig": "configuration_points.PointsConfig",
        "AutoModelForImageTextToText": "modeling_points.PointsForConditionalGeneration",
        "AutoProcessor": "processing_points.PointsProcessor",
    }
}
NEEDED = (
    "config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja",
)  # fmt: skip


def build(source: Path, target: Path, card: str, shard_bytes: int) -> None:
    """Fill `target` (absent or empty) from a model folder; weights above `shard_bytes` are split.

    Raises ModelError when the folder lacks a file, its family has no exportable code, or that code imports vlmflow.
    """
    missing = [name for name in NEEDED if not (source / name).is_file()]
    if missing:
        raise ModelError(f"the model in {source} cannot be exported: it lacks {', '.join(missing)}")
    config = json.loads((source / "config.json").read_text())
    kind = config.get("model_type")
    if kind not in CODE:
        raise ModelError(f"model_type '{kind}' has no exportable code; known: {', '.join(sorted(CODE))}")
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != "model.json":
            shutil.copyfile(path, target / path.name)
    _weights(source, target, shard_bytes)
    auto_map = AUTO_MAP[kind]
    _update(target / "config.json", {"auto_map": {k: v for k, v in auto_map.items() if k != "AutoProcessor"}})
    for name in ("processor_config.json", "tokenizer_config.json"):
        _update(target / name, {"auto_map": {"AutoProcessor": auto_map["AutoProcessor"]}})
    for name, origin in CODE[kind].items():
        (target / name).write_text(remote_code(Path(vlmflow.__file__).parent / origin, set(CODE[kind])))
    (target / CARD).write_text(card)
    sums = [f"{sha256_file(path)}  {path.name}" for path in sorted(target.iterdir()) if path.name != SUMS]
    (target / SUMS).write_text("\n".join(sums) + "\n")


def remote_code(path: Path, siblings: set[str]) -> str:
    """A source file with `from vlmflow.a.b import c` turned into `from .b import c` for files that are exported too.

    Raises ModelError when an import of vlmflow is left, because the file could not run where vlmflow is not.
    """
    text = path.read_text()
    for name in sorted(siblings):
        text = re.sub(
            rf"^(\s*)from vlmflow(?:\.\w+)*\.{Path(name).stem} import ",
            rf"\1from .{Path(name).stem} import ",
            text,
            flags=re.M,
        )
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.split(".")[0] == "vlmflow" for name in names):
            raise ModelError(f"{path.name} imports vlmflow (line {node.lineno}); exported code must run without it")
        if isinstance(node, ast.ImportFrom) and node.level and f"{node.module}.py" not in siblings:
            raise ModelError(f"{path.name} imports .{node.module} (line {node.lineno}), which is not exported")
    return text


def _update(path: Path, values: dict[str, Any]) -> None:
    data = json.loads(path.read_text())
    data.pop("_name_or_path", None)  # would name a folder of the machine that trained
    path.write_text(json.dumps({**data, **values}, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _weights(source: Path, target: Path, shard_bytes: int) -> None:
    """Copy the safetensors files; when one is larger than `shard_bytes`, write all tensors into new shards + index."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ModelError(f"the model in {source} has no *.safetensors")
    if all(path.stat().st_size <= shard_bytes for path in files):
        for path in files:
            shutil.copyfile(path, target / path.name)
        return
    from safetensors import safe_open
    from safetensors.torch import save_file

    groups: list[list[tuple[Path, str]]] = [[]]
    size = 0
    for path in files:
        with safe_open(path, "pt") as opened:
            for name in opened.keys():
                tensor = opened.get_tensor(name)
                here = tensor.numel() * tensor.element_size()
                if groups[-1] and size + here > shard_bytes:
                    groups.append([])
                    size = 0
                groups[-1].append((path, name))
                size += here
    total, weight_map = 0, {}
    for number, group in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {}
        for path, name in group:
            with safe_open(path, "pt") as opened:
                tensors[name] = opened.get_tensor(name)
            weight_map[name] = shard
            total += tensors[name].numel() * tensors[name].element_size()
        save_file(tensors, target / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
