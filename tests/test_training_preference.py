"""What becomes of a preference sample: which tokens are targets, and why a pair is refused."""

from __future__ import annotations

from typing import Any

import pytest
from models_tiny import FAMILY, build, tokenizer

from vlmflow.errors import DataError, RecipeError
from vlmflow.training.preference import pairs_in, render_pair

ASK = [{"from": "human", "value": "<image>\nwhat?"}]


def pair(turns: Any = ASK, chosen: str = "a cat", rejected: str = "a dog") -> dict[str, Any]:
    return {"conversations": turns, "chosen": chosen, "rejected": rejected}


def said(segments: Any, target: bool) -> str:
    return "".join("<image>" if s.image is not None else s.text for s in segments if s.target == target)


def test_only_the_answer_in_question_is_a_target() -> None:
    turns = [*ASK, {"from": "gpt", "value": "an animal"}, {"from": "human", "value": "which?"}]
    chosen, rejected = render_pair(pair(turns, " a cat\n"), 1, "k")
    assert said(chosen, True) == "a cat<|im_end|>" and said(rejected, True) == "a dog<|im_end|>"
    assert said(chosen, False) == said(rejected, False)
    assert said(chosen, False).endswith("which?<|im_end|>\n<|im_start|>assistant\n") and "an animal" in said(
        chosen, False
    )


def test_both_answers_begin_with_equal_tokens() -> None:
    config = build().config
    (a, mask), (b, _) = (FAMILY.expand(s, tokenizer(), [2], config) for s in render_pair(pair(), 1, "k"))
    prompt = mask.index(True)
    assert a[:prompt] == b[:prompt] and a[prompt:] != b[prompt:]
    assert a.count(config.image_token_id) == 2 * config.tokens_per_tile


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (pair([]), "no prompt"),
        (pair([*ASK, {"from": "gpt", "value": "hm"}]), "ends with a turn of the assistant"),
        (pair(chosen="  "), "chosen answer of a preference is empty"),
        (pair(rejected=""), "rejected answer of a preference is empty"),
        (pair(chosen="x", rejected=" x\n"), "are the same"),
        (pair([{"from": "human", "value": "<image><image>?"}]), "2 <image> markers in its conversation but 1 images"),
        (pair([{"from": "human", "value": "?"}]), "0 <image> markers in its conversation but 1 images"),
        (pair([{"from": "robot", "value": "<image>?"}]), "unknown speaker 'robot'"),
        (pair(rejected="a <|image_pad|>"), "contains the image token"),
    ],
)
def test_a_pair_that_teaches_nothing_is_refused_with_its_reason(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match="sample 'k'") as refused:
        render_pair(bad, 1, "k")
    assert words in str(refused.value)


def test_a_sample_without_pairs_is_refused() -> None:
    with pytest.raises(DataError, match="preferences_column"):
        pairs_in({"text": "x"}, "k")


def test_a_stage_learns_preferences_by_dpo_alone() -> None:
    import training_world as world

    with pytest.raises(RecipeError, match="dpo learns from text: preferences"):
        world.recipe(objective={"kind": "dpo"})
    with pytest.raises(RecipeError, match=r"does not fit objective\.kind 'sft'"):
        world.recipe(data=[{"dataset": "seed", "text": "preferences"}])
    made = world.recipe(objective={"kind": "dpo"}, data=[{"dataset": "seed", "text": "preferences"}])
    assert made.stages["sft"].objective.beta == 0.1


def test_the_stage_of_the_docs_is_a_stage() -> None:
    import re
    from pathlib import Path

    import training_world as world
    import yaml

    text = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    (shown,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "kind: dpo" in block]
    (stage,) = yaml.safe_load(shown)["stages"].values()
    stage["data"][0]["dataset"] = "seed"
    made = world.recipe(**stage)
    assert made.stages["sft"].objective.kind == "dpo" and made.stages["sft"].data[0].text == "preferences"
