"""Preference pairs from tables: the field's dialects give one form, and what is no pair is counted with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from curation_server import picture, serving
from test_curation_pull import context, failures, table

from vlmflow.curation import pull
from vlmflow.curation.table import columns_of
from vlmflow.curation.turns import preferences
from vlmflow.dataset.shard import ShardReader
from vlmflow.errors import DataError
from vlmflow.models.initial import corpus
from vlmflow.pages import preview
from vlmflow.recipe.data import SourceSpec

ONE = [{"conversations": [{"from": "human", "value": "<image>\nWhat?"}], "chosen": "a cat", "rejected": "a dog"}]


@pytest.mark.parametrize(
    "cell",
    [
        ONE,
        json.dumps(ONE),
        ONE[0],
        {"question": "What?", "chosen": "a cat", "rejected": "a dog"},  # RLAIF-V
        {  # TRL, conversational
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}],
            "rejected": [{"role": "assistant", "content": "a dog"}],
        },
        {"messages": [{"role": "user", "content": "<image>\nWhat?"}], "chosen": "a cat", "rejected": "a dog"},
    ],
)
def test_dialects_give_one_form(cell: Any) -> None:
    assert preferences(cell, 1) == (ONE, None)


@pytest.mark.parametrize(
    ("cell", "reason", "words"),
    [
        ("{oops", "bad_preferences", "not JSON"),
        ([3], "bad_preferences", "pair 0 is a int"),
        ({"chosen": "a", "rejected": "b"}, "bad_preferences", "has no prompt"),
        ([*ONE, {"prompt": "?", "chosen": "a"}], "bad_preferences", "pair 1: 'rejected' is not a text"),
        ({"prompt": "?", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, "bad_preferences", "'chosen'"),
        ({"prompt": [{"role": "robot", "content": "a"}], "chosen": "a", "rejected": "b"}, "bad_preferences", "turn 0"),
        ({"prompt": "<image><image>?", "chosen": "a", "rejected": "b"}, "image_marks", "2 <image> marks but 1 image"),
    ],
)
def test_what_is_no_pair_has_a_reason(cell: Any, reason: str, words: str) -> None:
    pairs, problem = preferences(cell, 1)
    assert pairs is None and problem is not None
    assert problem[0] == reason and words in problem[1]


def test_one_column_of_pairs_and_three_columns_pull_alike(tmp_path: Path) -> None:
    with serving() as server:
        urls = [server.url(f"/img/{i}") for i in range(3)]
        rows = [
            {"url": u, "prompt": "What?", "chosen": "a cat", "rejected": "a dog", "n": i} for i, u in enumerate(urls)
        ]
        rows[2]["prompt"] = ""
        three = {"table": table(tmp_path / "three.csv", rows), "preferences_column": {"prompt": "prompt"}}
        ctx = context(tmp_path / "three", {"web": three})
        manifest = pull.run(ctx, "web")
        kept = list(ShardReader(manifest.shards[0]))
        assert [s.meta["preferences"] for s in kept] == [ONE, ONE]
        assert kept[0].images == (picture(0),) and kept[0].meta["extra"] == {"n": "0"} and "text" not in kept[0].meta
        assert failures(ctx)[urls[2]][0] == "bad_preferences"
        assert list(corpus(manifest)) == ["What?", "a cat"] * 2, "a tokenizer may be trained on them"
        assert preview(ctx, manifest, None)[0]["of the table"].endswith("What? / + a cat / - a dog")
        cells = [{"url": u, "pairs": json.dumps(ONE)} for u in urls[:2]]
        one = {"table": table(tmp_path / "one.csv", cells), "preferences_column": "pairs"}
        again = list(ShardReader(pull.run(context(tmp_path / "one", {"web": one}), "web").shards[0]))
        assert [s.meta["preferences"] for s in again] == [ONE, ONE]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    uri = table(tmp_path / "t.csv", [{"url": "", "prompt": "?", "chosen": "a"}])
    spec = {"table": uri, "preferences_column": {"rejected": "worse"}}
    with pytest.raises(DataError, match=r"no column 'worse'.*web\.preferences_column"):
        pull.run(context(tmp_path, {"web": spec}), "web")


def test_columns_survive_a_resolved_recipe() -> None:
    written = SourceSpec(table="t.parquet", preferences_column={"prompt": "question"})
    assert columns_of(written).preferences == ("question", "chosen", "rejected")
    assert columns_of(SourceSpec.model_validate(written.model_dump())) == pull.columns_of(written)
    assert "text" in columns_of(written).optional
