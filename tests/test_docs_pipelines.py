"""The page about the pipelines says what the compiled packages say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import yaml

from vlmflow import compiler
from vlmflow.installation import Installation

DOCS = Path(__file__).parents[1] / "docs"


def test_the_committed_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_pipeline_reference", DOCS / "make_pipeline_reference.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    text = maker.text()
    assert (DOCS / "pipelines.md").read_text(encoding="utf-8") == text, "run: python docs/make_pipeline_reference.py"
    for name in compiler.PIPELINES:
        part = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        package = compiler.compile_pipeline(name).spec
        for key in package["root"]["inputDefinitions"]["parameters"]:
            assert f"| `{key}` |" in part, (name, key)
        tasks = sum(len(c["dag"]["tasks"]) for c in package["components"].values() if "dag" in c) + 1
        loops = sum(
            "parameterIterator" in t
            for c in package["components"].values()
            for t in c.get("dag", {}).get("tasks", {}).values()
        )
        assert len(re.findall(r"^\| .* \| (?:yes|no) \|$", part, re.M)) == tasks - loops, name


def test_the_example_of_an_installation_is_one() -> None:
    example = (DOCS / "pipelines.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    asked = Installation.model_validate(yaml.safe_load(example.replace("sha256:...", "sha256:" + "a" * 64)))
    for name in compiler.PIPELINES:
        assert compiler.compile_pipeline(name, installation=asked, require_digest=True).spec
