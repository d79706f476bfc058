"""Gates are pure: the same numbers give the same verdict, and missing numbers never pass."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import registry_samples as samples

from vlmflow.errors import DataError
from vlmflow.registry import gates
from vlmflow.registry.rows import chosen_row, final_row, score_rows


@pytest.fixture
def ctx(tmp_path):
    return samples.context(tmp_path)


@pytest.fixture
def model(ctx, tmp_path):
    return samples.published(ctx, tmp_path)


def rows(model):
    return score_rows(samples.score_table(model))


def test_all_gates_pass_for_a_good_model(ctx, model):
    found = gates.evaluate(
        rows(model), "greedy soup", "untrained", ctx.recipe.registry.gates, model, [samples.manifest().digest], "r"
    )
    assert {g.name: g.passed for g in found} == dict.fromkeys(
        ["absolute_floor", "times_chance", "better_than_untrained", "lineage_complete", "weights_unchanged"], True
    )
    assert found[0].tag == ("gate.absolute_floor", "pass")


@pytest.mark.parametrize(("floor", "passed"), [(0.8, True), (0.8001, False)])
def test_floor(model, floor, passed):
    result = gates.absolute_floor(rows(model), "greedy soup", {"digits": floor})
    assert result.passed is passed and "0.800 of 0.800" in result.detail


@pytest.mark.parametrize(("factor", "passed"), [(8, True), (8.1, False)])
def test_times_chance(model, factor, passed):
    assert gates.times_chance(rows(model), "greedy soup", {"digits": factor}).passed is passed


def test_a_score_of_zero_never_passes_even_where_chance_is_zero(model):
    table = {"m": samples.scores("f" * 64, 0)}
    table["m"].benchmarks["digits"].chance = 0.0
    assert not gates.times_chance(score_rows(table), "m", {"digits": 4}).passed


def test_untrained_is_a_bar_and_must_be_measured(model):
    assert gates.better_than_untrained(rows(model), "greedy soup", "untrained").passed
    assert not gates.better_than_untrained(rows(model), "untrained", "greedy soup").passed
    assert not gates.better_than_untrained(rows(model), "untrained", "untrained").passed, "equal is not better"
    missing = gates.better_than_untrained(rows(model), "greedy soup", "nobody")
    assert not missing.passed and "not measured for 'nobody'" in missing.detail
    assert not gates.better_than_untrained([], "greedy soup", "untrained").passed


def test_an_unmeasured_benchmark_fails_by_name(model):
    for result in (
        gates.absolute_floor(rows(model), "greedy soup", {"charts": 0.1}),
        gates.times_chance(rows(model), "greedy soup", {"charts": 2}),
    ):
        assert not result.passed and "charts not measured" in result.detail


def test_lineage_names_what_is_missing(model):
    assert gates.lineage_complete(model, [samples.manifest().digest], "r").passed
    unknown = gates.lineage_complete(model, ["f" * 64], "r")
    assert not unknown.passed and samples.manifest().digest[:12] in unknown.detail
    bare = model.model_copy(update={"lineage": model.lineage.model_copy(update={"parents": [], "ancestor": ""})})
    assert "parents, ancestor" in gates.lineage_complete(bare, [samples.manifest().digest], "r").detail


def test_changed_cut_and_missing_files_are_found(model):
    weights = Path(model.uri.removeprefix("file://")) / "model.safetensors"
    assert gates.weights_unchanged(model).passed
    weights.write_bytes(b"weightS")
    assert "model.safetensors is " in gates.weights_unchanged(model).detail
    weights.write_bytes(b"weig")
    assert "4 bytes long, not 7" in gates.weights_unchanged(model).detail
    weights.unlink()
    assert not gates.weights_unchanged(model).passed


def test_scores_of_two_splits_do_not_share_a_table(model):
    table = samples.score_table(model)
    table["untrained"].split = "selection"
    with pytest.raises(DataError, match="different splits"):
        score_rows(table)


def test_the_choice_of_the_soup_step_is_found_among_equal_rows(model):
    """A greedy soup of one candidate has that candidate's weights; `chosen` speaks of soups, rows of soup-NAME."""
    one = samples.scores(model.weights_sha256, 32)
    table = {"base": one, "soup-average": one, "soup-maximum": one, "soup-greedy": one}
    soups = dict.fromkeys(("maximum", "average", "greedy"))
    for chosen, row in (("average", "soup-average"), ("maximum", "soup-maximum"), ("base", "base")):
        named = chosen_row(SimpleNamespace(chosen=chosen, soups=soups))
        assert final_row(table, model.weights_sha256, named) == row
    assert final_row(table, model.weights_sha256, chosen_row(None)) == "soup-greedy"


def test_the_model_must_have_scores_of_its_own(model):
    table = samples.score_table(model)
    assert final_row(table, model.weights_sha256) == "greedy soup"
    table["same weights"] = table["greedy soup"]
    assert final_row(table, model.weights_sha256, "greedy soup") == "greedy soup"
    assert final_row(table, model.weights_sha256, "untrained") == "same weights", (
        "a choice with other weights is not it"
    )
    with pytest.raises(DataError, match="no scores belong to the model"):
        final_row(samples.score_table(model), "9" * 64)
