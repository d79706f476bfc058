"""Recipes: what is wrong is refused before anything starts, with the field and what is allowed."""

from pathlib import Path

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
        (
            "stages.sft.train.0.modules=projectr",
            "stages.sft.train[0].modules: 'projectr' is no role of family 'points'",
        ),
        ("bootstrap.train.0.modules=vison", "did you mean 'vision'? Its roles are ['language', 'projector', 'vision'"),
        ("stages.sft.train.0.last=9", "stages.sft.train[0].last: role 'projector' has no numbered layers"),
        ("stages.sft.memory.recompute=[langage]", "stages.sft.memory.recompute: 'langage' is no role with layers"),
        ("model.vision.config.patch_size=a", "patch_size must be a whole number of pixels above 0 (got 'a')"),
        ("model.vision.config.patch_size=0", "patch_size must be a whole number of pixels above 0 (got 0)"),
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
    (tmp_path / "c.yaml").write_text("# nothing\n")
    with pytest.raises(RecipeError, match=r"c\.yaml is empty, not a recipe"):
        recipe.load(tmp_path / "c.yaml")


def test_a_key_that_stands_twice_is_refused_and_not_half_forgotten(tmp_path):
    text = Path(RECIPES[0]).read_text()
    lines = text.count("\n")
    first = text[: text.index("\nregistry:")].count("\n") + 2
    (tmp_path / "r.yaml").write_text(text + "registry: {model: other, experiment: other}\n")
    with pytest.raises(RecipeError, match=f"the key 'registry' stands in line {first} and again in line {lines + 1}"):
        recipe.load(tmp_path / "r.yaml")


def test_an_override_beyond_a_list_says_how_long_it_is():
    with pytest.raises(RecipeError, match=r"'stages\.sft\.data' is a list of 1, counted from 0, and has no entry '7'"):
        recipe.load(RECIPES[0], ["stages.sft.data.7.text=alt"])


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
