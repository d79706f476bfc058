"""The recipe reference says what the schema says, and every field has a description."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from vlmflow.recipe import Recipe

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_recipe_reference", DOCS / "make_recipe_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_reference_is_current(maker: ModuleType) -> None:
    assert maker.main(["--check"]) == 0, "run: python docs/make_recipe_reference.py"


def test_an_outdated_reference_is_noticed(maker: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(maker, "TARGET", tmp_path / "recipe.md")
    assert maker.main(["--check"]) == 1
    assert maker.main([]) == 0 and maker.main(["--check"]) == 0
    maker.TARGET.write_text(maker.TARGET.read_text().replace("`seed`", "`sead`", 1))
    assert maker.main(["--check"]) == 1


def test_every_field_is_described_and_listed(maker: ModuleType) -> None:
    places: dict = {}
    maker._walk(Recipe, "", places)
    text = maker.render()
    for section, paths in places.items():
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no description"
            assert f"`{paths[0]}.{name}`".replace("`.", "`") in text or any(f"`{p}.{name}`" in text for p in paths)


def test_bounds_and_defaults_are_those_of_the_schema(maker: ModuleType) -> None:
    rows = {line.split("|")[1].strip(): line for line in maker.render().splitlines() if line.startswith("| `")}
    assert "| 0.2 | > 0, <= 1 |" in rows["`curation.keep.fraction`"]
    assert "| required | > 0, < 1 |" in rows["`stages.NAME.train[].lr`"]
    assert "| `cosine` / `linear` / `constant` |" in rows["`stages.NAME.schedule.name`"]
    assert "| 0.9, 0.999 | >= 0, < 1 |" in rows["`stages.NAME.optimizer.betas`"]
