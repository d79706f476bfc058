"""Texts `described` and `docqa` in training: a caption, and a conversation whose rounds the planner may split."""

from types import SimpleNamespace

import pytest
import training_world as world
from training_world import sample

from vlmflow import models, recipe
from vlmflow.errors import RecipeError
from vlmflow.training import length
from vlmflow.training.examples import KINDS, Encoder, NoText, Wording, render
from vlmflow.training.length import Reading
from vlmflow.training.plan import Item

CONFIG = SimpleNamespace(tile=28, max_tiles=2, tokens_per_tile=4, image_token_id=258)
PAIRS = [{"question": f"What is {i}?", "answer": f"It is {i} {'x' * i}."} for i in range(4)]


def wording(text):
    return Wording(text, "chat", ("Describe.",), 0)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_pairs_are_rounds_with_the_images_in_the_first(images):
    one = sample(0, images=images)
    row = {"pairs": PAIRS, "error": None}
    (segments,) = render(one, row, wording("docqa"))
    turns = [
        {"from": who, "value": pair[part]} for pair in PAIRS for who, part in (("human", "question"), ("gpt", "answer"))
    ]
    turns[0] = {"from": "human", "value": "<image>\n" * images + turns[0]["value"]}
    talk = sample(0, images=images, conversations=turns)
    assert segments == render(talk, None, wording("conversations"))[0]
    assert KINDS["docqa"].units(KINDS["docqa"].of(one, row)) == [images] * 4
    assert "conversations" not in one.meta


@pytest.mark.parametrize("images", [0, 2])
def test_every_stretch_of_pairs_is_as_long_as_measured(images):
    reading = Reading(models.family("points"), world.tokenizer(), CONFIG, "tokenizer")
    one, stored = sample(0, images=images), {"pairs": PAIRS, "error": None}
    stage = world.recipe().stages["sft"]
    use = stage.data[0].model_copy(update={"text": "docqa"})
    row = length.measure(one, stored, Wording.of(use, stage, 0), reading)
    assert len(row["end"]) == 4
    encode = Encoder(reading.family, reading.tokenizer, CONFIG, stage, [use], 0)
    for first in range(4):
        for last in range(first, 4):
            sizes = zip(row["widths"], row["heights"], strict=True)
            tiles = sum(reading.family.tiles_for(w, h, CONFIG) for w, h in sizes)
            tokens = row["end"][last] - row["begin"][first] + CONFIG.tokens_per_tile * tiles
            item = Item(0, 0, 0, first, last, 2, tokens, tiles, 0, 0)
            (part,) = encode(item, one, stored)  # raises when it is not as long as the item says
            assert part.target.any()


def test_pages_without_pairs_are_left_out_with_the_reason():
    for row, reason in (
        ({"error": "no pair left: long", "pairs": []}, "docqa failed: no pair left"),
        ({"pairs": []}, "no questions"),
    ):
        with pytest.raises(NoText, match=reason):
            render(sample(0), row, wording("docqa"))
    with pytest.raises(NoText, match="described failed: rejected: short"):
        render(sample(0), {"error": "rejected: short", "text": None}, wording("described"))


def test_a_description_is_learned_like_a_caption():
    row = {"text": "A long description.", "error": None}
    assert render(sample(0), row, wording("described")) == render(sample(0), row, wording("fused"))


def load(**changes):
    return recipe.load("recipes/points-tiny.yaml", [f"{k}={v}" for k, v in changes.items()])


DOCQA, DESCRIBE = "{model_name: m}", "{engine: model, repair: false}"


def test_a_recipe_may_learn_from_both():
    stage = "stages.sft.data"
    uses = "[{dataset: web, text: docqa}, {dataset: web, text: described}]"
    made = load(
        **{
            stage: uses,
            "stages.sft.instructions": "[Describe.]",
            "curation.docqa": DOCQA,
            "curation.describe": DESCRIBE,
        }
    )
    assert [use.text for use in made.stages["sft"].data] == ["docqa", "described"]


@pytest.mark.parametrize(("changes", "problem"), [
    ({"stages.sft.data": "[{dataset: web, text: docqa}]"}, "'docqa' is made by the step of section curation.docqa, which this recipe lacks"),
    ({"stages.align.data": "[{dataset: web, text: described}]"}, "section curation.describe, which this recipe lacks"),
    ({"stages.sft.data": "[{dataset: sft, text: docqa}]", "curation.docqa": DOCQA}, "works on dataset 'web', not on 'sft'"),
    ({"stages.align.data": "[{dataset: web, text: docqa}]", "curation.docqa": DOCQA}, "docqa can only be learned in chat style"),
    ({"curation.perplexity.text": "described"}, "curation.perplexity.text is 'described'"),
    ({"curation.judge": "{model_name: m, text: docqa}"}, "curation.judge.text is 'docqa'"),
    ({"curation.judge": "{model_name: m, text: fused, checks: [needs_image]}"}, "needs_image asks the questions"),
    ({"curation.describe": "{engine: model}"}, "repair_model_name is required"),
    ({"curation.describe": "{engine: openai, repair: false}"}, "curation.describe.model_name is required"),
])  # fmt: skip
def test_what_cannot_work_is_said_before_anything_starts(changes, problem):
    with pytest.raises(RecipeError, match=problem):
        load(**changes)
