"""`vlmflow plan train`: the shipped recipes, offline, without weights; what it says and when it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vlmflow import cli, recipe
from vlmflow.errors import ModelError, RecipeError
from vlmflow.training import flops, forecast
from vlmflow.training.plan import ITEM, Plan

NINE, TINY = "recipes/points-9b.yaml", "recipes/points-tiny.yaml"


def _plan(path, stage, gpus=32, gib=80.0, changes=(), **options):
    return forecast.plan_train(recipe.load(path, list(changes)), forecast.machine(gpus, gib), stage, **options)[0]


def _run(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "train", *arguments])
    return int(stopped.value.code or 0)


def test_nine_billion_parameters_are_counted_from_the_recipe_alone(capsys):
    """Yi-1.5-9B has 8.83 billion parameters; with two encoders of 23 layers and the projector 9.44."""
    assert _run(NINE, "sft", "--gpus", "32", "--memory", "80", "--tokens", "1e9", "-o", "json") == 0
    (made,) = json.loads(capsys.readouterr().out)["stages"]
    rows = {row["module"]: row["parameters"] for row in made["parameters"]["rows"]}
    assert rows["projector"] == 33_562_624 and rows["language"] == 8_829_407_232
    assert made["parameters"]["trainable"] == rows["projector"] + rows["language"]
    assert made["operations"]["per_token"] == pytest.approx(6 * (8.83e9 - 2 * 64000 * 4096), rel=0.001)
    totals = {column["zero"]: column["total"] / 2**30 for column in made["memory"]}
    assert 0 not in totals  # bf16 runs at least ZeRO 1
    assert totals[1] > totals[2] > totals[3]
    assert made["zero"] == 2 and not made["memory"][0]["fits"]
    assert made["work"]["steps"] == -(-(10**9) // (4096 * 32))
    seconds = made["operations"]["step"] / (32 * 0.4 * 989.5e12)
    assert made["work"]["hours"] == pytest.approx(made["work"]["steps"] * seconds / 3600)


def test_all_stages_of_the_tiny_recipe_fit_a_small_machine(capsys):
    assert _run(TINY, "--gpus", "2", "--memory", "2", "--peak-tflops", "0.05") == 0
    said = capsys.readouterr().out
    for name in ("bootstrap", "ocr", "align", "sft"):
        assert f"{name}: ZeRO 0" in said
    assert "at 40% of 0.05 TFLOP/s on 2 GPUs" in said
    assert "the head on targets only" in said


def test_nothing_fits_is_an_exit_code_and_says_what_to_do(capsys):
    assert _run(NINE, "sft", "--gpus", "1", "--memory", "24") == 2
    said = capsys.readouterr().out
    assert "sft: nothing fits" in said and "stages.sft.memory.recompute" in said


def test_recomputation_trades_memory_for_operations_that_mfu_does_not_count():
    plain, again = (
        _plan(NINE, "align", changes=changes) for changes in ([], ["stages.align.memory.recompute=[language]"])
    )
    kept, small = (made.memory[0]["parts"]["activations"] for made in (plain, again))
    assert small < kept / 2
    assert plain.operations["recomputed"] == 0 < again.operations["recomputed"]
    assert plain.operations["step"] == again.operations["step"]


def test_adapters_train_a_share_of_the_parameters():
    made = _plan(TINY, "sft", 1, changes=["stages.sft.train.0.adapter={kind: lora, rank: 4}"])
    assert made.parameters["trainable"] < _plan(TINY, "sft", 1).parameters["trainable"]


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (64, "32 packs of a step cannot be dealt to 64 GPUs: 32 would only wait"),
        (24, "32 packs of a step do not divide by 24 GPUs.*stages.align.packs=48"),
        (8, "set stages.align.processes=8"),
    ],
)
def test_packs_and_processes_that_do_not_fit_the_gpus_are_named(gpus, message):
    import re

    assert re.search(message, " ".join(_plan(NINE, "align", gpus).problems))


def test_packs_that_do_not_divide_cost_the_time_of_the_slowest_rank():
    whole, uneven = _plan(NINE, "align", 32).work, _plan(NINE, "align", 24).work
    assert uneven["packs_a_rank"] == 2
    assert uneven["seconds_a_step"] == pytest.approx(2 * whole["seconds_a_step"])


def test_a_pack_plan_gives_its_own_tokens_and_steps():
    items = np.zeros(4, ITEM)
    items["tokens"], items["squares"], items["tiles"], items["targets"] = 100, 10_000, 1, 20
    packs, steps = np.array([0, 2, 4]), np.array([0, 1, 2])
    plan = Plan(items, packs, steps, [], flops.CostModel(), {})
    made = _plan(TINY, "sft", 1, plans={"sft": plan})
    assert made.work["tokens"] == 400 and made.work["steps"] == 2 and made.assumed == []
    each = made.operations
    expected = 400 * each["per_token"] + 40_000 * each["per_token_squared"] + 4 * each["per_tile"]
    assert each["stage"] == pytest.approx(expected + 80 * each["per_target"])


def test_a_source_that_is_not_here_is_named():
    with pytest.raises(ModelError, match=r"configuration of 'nobody/nothing' is not on this machine.*hf download"):
        _plan(NINE, "sft", changes=["model.language.source=nobody/nothing"])


def test_unknown_stages_are_refused():
    with pytest.raises(RecipeError, match="stage 'nowhere' is not in the recipe"):
        _plan(TINY, "nowhere")


def test_a_stated_peak_counts_more_than_the_default(monkeypatch):
    monkeypatch.setenv("VLMFLOW_PEAK_TFLOPS", "312")
    assert forecast.machine(1, 40).peak == 312e12
    assert forecast.machine(1, 40, peak_tflops=100).peak == 100e12
    monkeypatch.delenv("VLMFLOW_PEAK_TFLOPS")
    assert forecast.machine(1, 40).peak == 989.5e12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.vision.config.num_hidden_layer=3", "has no such field; did you mean 'num_hidden_layers'?"),
        ("model.language.config.vocab=9", r"model\.language\.config\.vocab: Qwen2Config has no such field"),
        ("model.language.config.model_type=qwenn2", "transformers knows no 'qwenn2'; did you mean 'qwen2'?"),
        ("model.vision.config.hidden_size=97", r"model\.vision\.config: CLIPVisionConfig refuses these sizes.*97"),
        (
            "model.language.config.num_key_value_heads=3",
            "num_attention_heads 4 is no multiple of num_key_value_heads 3",
        ),
    ],
)
def test_sizes_that_would_be_passed_over_or_cannot_work_are_refused(change, message):
    with pytest.raises(ModelError, match=message) as error:
        _plan(TINY, "sft", changes=[change])
    assert len(str(error.value)) < 400
