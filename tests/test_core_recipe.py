"""Recipes: what is wrong is refused before anything starts, with the field and what is allowed."""

import pytest

from vlmflow import recipe
from vlmflow.errors import RecipeError

RECIPES = ["recipes/points-tiny.yaml", "recipes/points-9b.yaml"]


@pytest.mark.parametrize("path", RECIPES)
def test_shipped_recipes_are_valid_and_survive_a_round_trip(path, tmp_path):
    loaded = recipe.load(path)
    (tmp_path / "r.yaml").write_text(recipe.dump(loaded))
    assert recipe.load(tmp_path / "r.yaml") == loaded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("curation.keep.fracton=0.3", "curation.keep.fracton: no such field; did you mean 'fraction'"),
        ("curation.keep.fraction=20", "curation.keep.fraction: Input should be less than or equal to 1"),
        ("pull.timeout=soon", "pull.timeout: Input should be a valid number"),
        ("model.family=llava", "model.family: Input should be 'points'"),
        ("model.tiling.tile=57", "even number of patches"),
        ("stages.sft.data.0.dataset=nowhere", "dataset 'nowhere' is not in data; defined are"),
        ("stages.sft.data.0.sources=[none]", "has no source 'none'"),
        ("stages.sft.prompt=continuation", "conversations can only be learned in chat style"),
        ("stages.ocr.data.0.dataset=seed", "text 'ocr' is made by curation"),
        ("soup.candidates.greedy=[{dataset: sft, text: conversations}]", "name soups and cannot name candidates"),
        ("bootstrap=null", "curation.scorer: perplexity needs a model that has learned to see"),
        ("soup.candidates.soup-greedy=[{dataset: sft, text: conversations}]", "name soups and cannot name candidates"),
        ("soup.candidates.untrained=[{dataset: sft, text: conversations}]", "name other rows of the score table"),
        ("soup.candidates.ocr=[{dataset: sft, text: conversations}]", "name other rows of the score table or stages"),
        ("registry.gates.floors.nowhere=0.5", "there is no benchmark 'nowhere'; evaluation.benchmarks has"),
        (
            "soup.candidates.more=[{dataset: seed, text: alt}]",
            "soup.candidates.more[0].text: 'alt' in chat style needs",
        ),
        ("soup.maximum=99", "99 models are asked for"),
        ("soup.stage=ocr", "must be the last stage"),
        ("stages.sft.processes=3", "cannot be dealt to 3 processes"),
        ("stages.sft.train.0.lr=3", "Input should be less than 1"),
        ("stages.sft.train.0.modules=re:(", "not a regular expression"),
    ],
)
def test_wrong_recipes_are_refused(override, message):
    with pytest.raises(RecipeError) as error:
        recipe.load(RECIPES[0], [override])
    assert message in str(error.value)


def test_all_problems_are_listed_at_once():
    with pytest.raises(RecipeError, match=r"2 problem\(s\)"):
        recipe.load(RECIPES[0], ["seed=-1", "name=UPPER"])


@pytest.mark.parametrize("override", ["seed", "name.x=1", "=3"])
def test_bad_overrides(override):
    with pytest.raises(RecipeError, match="override"):
        recipe.load(RECIPES[0], [override])


def test_not_yaml_and_not_a_recipe(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="is not YAML"):
        recipe.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="holds a list"):
        recipe.load(tmp_path / "b.yaml")


def test_both_learning_rate_orders_are_presets():
    rates = {
        preset: [
            rule.lr
            for stage in ("ocr", "align")
            for rule in recipe.load(RECIPES[1], [f"preset={preset}"]).stages[stage].train
        ]
        for preset in ("vit-first", "mlp-first")
    }
    assert rates == {"vit-first": [2e-4, 2e-5, 2e-4, 2e-5], "mlp-first": [2e-5, 2e-4, 2e-5, 2e-4]}
    with pytest.raises(RecipeError, match="no preset 'other'"):
        recipe.load(RECIPES[1], ["preset=other"])


def test_curation_that_cannot_work_is_told_before_a_run() -> None:
    with pytest.raises(
        RecipeError, match=r"curation\.contamination: compares with evaluation\.benchmarks, but the recipe has none"
    ):
        recipe.load(RECIPES[0], ["evaluation.benchmarks={}", "soup=null", "registry.gates={}"])
    with pytest.raises(
        RecipeError, match=r"curation\.keep\.quota: \['other'\] are no sources of dataset 'web'; it has \['web'\]"
    ):
        recipe.load(RECIPES[0], ["curation.keep.quota={other: 5}"])
