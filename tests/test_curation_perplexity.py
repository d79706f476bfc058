"""Perplexity: the formula, rounding, failures counted, no dependence on grouping; the real model against one by one."""

import math
import threading
from types import SimpleNamespace

import pytest
from curation_world import MODEL, FakeVLM, context, dataset, fake_nll, png, sample
from PIL import Image

from vlmflow.curation import inputs, perplexity
from vlmflow.dataset.layer import read_layer
from vlmflow.errors import DataError, StepFailed


@pytest.fixture
def vlm(monkeypatch):
    fake = FakeVLM()
    monkeypatch.setattr(perplexity.Lazy, "__call__", lambda self: fake)
    return fake


def web_samples(n=10):
    return [sample(f"k{i:02d}", f"the word number {i} is here", png(i)) for i in range(n)]


def test_equals_the_formula_and_names_what_failed(tmp_path, vlm):
    bad = [
        sample("z0", "x", png(1)[:20]),
        sample("z1", None, png(1)),
        sample("z2", "nan", png(2)),
        sample("z3", "t", None),
    ]
    ctx = context(tmp_path, perplexity={"text": "alt", "failure_limit": 0.5, "batch_tokens": 99})
    sealed = perplexity.run(ctx, dataset(tmp_path / "d", web_samples() + bad), MODEL)
    rows = read_layer(sealed, "ppl")
    for i in range(10):
        nll = fake_nll(
            Image.new("RGB", (1, 1), (i, 0, 0)),
            "please generate a caption for this image.",
            f"the word number {i} is here",
        )
        r = rows[f"k{i:02d}"]
        assert r["tokens"] == 7 and r["error"] is None
        assert r["ppl"] == pytest.approx(math.exp(nll / 7), rel=1e-5) and r["nll"] == pytest.approx(nll, rel=1e-5)
        assert r["ppl"] == float(f"{r['ppl']:.5e}")
    assert rows["z0"]["error"].startswith("image cannot be decoded") and rows["z3"]["error"] == "no image"
    assert rows["z1"]["error"] == "upstream: the sample has no alt text"
    assert rows["z2"]["error"].startswith("the model gives the text no probability")
    summary = sealed.layers["ppl"].summary
    assert summary["scored"] == 10 and sum(n for _, n in summary["failures"]) == 4
    assert vlm.calls[0][2] == 99


def test_own_failures_count_against_the_limit_upstream_ones_do_not(tmp_path, vlm):
    no_text = [sample(f"n{i}", "", png(i)) for i in range(5)]
    ctx = context(tmp_path, perplexity={"text": "alt"})
    perplexity.run(ctx, dataset(tmp_path / "a", web_samples(3) + no_text), MODEL)
    with pytest.raises(StepFailed, match=r"1 of 4 samples failed \(25.0%\), the recipe allows 2.0%"):
        perplexity.run(ctx, dataset(tmp_path / "b", web_samples(3) + no_text + [sample("z", "x", None)]), MODEL)


def test_same_values_under_any_sharding_and_a_rerun_loads_nothing(tmp_path, vlm):
    one = perplexity.run(
        context(tmp_path / "a", perplexity={"text": "alt"}), dataset(tmp_path / "a", web_samples(), 3), MODEL
    )
    ctx, data = (
        context(tmp_path / "b", perplexity={"text": "alt", "batch_tokens": 64}),
        dataset(tmp_path / "b", web_samples(), 10),
    )
    two = perplexity.run(ctx, data, MODEL)
    assert read_layer(one, "ppl") == read_layer(two, "ppl")
    assert one.layers["ppl"].digest == two.layers["ppl"].digest  # batch_tokens decides nothing
    vlm.calls.clear()
    assert perplexity.run(ctx, data, MODEL).digest == two.digest and not vlm.calls


def test_the_scored_layer_must_exist(tmp_path, vlm):
    with pytest.raises(DataError, match="no layer 'fused'"):
        perplexity.run(context(tmp_path), dataset(tmp_path / "d", web_samples(2)), MODEL)


def test_ocr_text_is_scored_under_an_ocr_instruction():
    default = "please generate a caption for this image."
    assert perplexity.scoring_prompt("fused", default) == default
    assert perplexity.scoring_prompt("ocr", default) == "please write down the text in this image."
    assert perplexity.scoring_prompt("ocr", "read it") == "read it"


@pytest.mark.parametrize(
    ("nll", "tokens", "error"), [(float("inf"), 3, "not finite"), (3000.0, 2, "not finite"), (0.0, 0, "no token")]
)
def test_values_without_a_perplexity(nll, tokens, error):
    assert error in perplexity.row("k", nll, tokens)["error"]


def test_values_are_written_finer_than_the_promised_equality():
    value = 12.3456789
    assert perplexity.significant(value) == 12.3457 == pytest.approx(value, rel=1e-5)


def test_pictures_in_memory_together_are_bounded(monkeypatch):
    monkeypatch.setattr(inputs, "PIXELS", 100)
    samples = [sample(f"k{i}", "t", png(i)) for i in range(5)]  # 48 pixels each
    samples[2].meta["images"][0]["width"] = 1000
    assert [[s.key for s in w] for w in inputs.picture_windows(samples)] == [["k0", "k1"], ["k2"], ["k3", "k4"]]


def test_prepared_windows_keep_order_bound_memory_and_run_one_ahead(monkeypatch):
    """The results come in order whatever thread was first; windows are cut by their bytes; the next is made meanwhile."""
    monkeypatch.setattr(inputs, "SCORED", 4)
    monkeypatch.setattr(inputs, "BYTES", 25)
    made = []

    def prepare(n):
        made.append(n)
        return SimpleNamespace(n=n, nbytes=10 if n < 6 else 0)

    found = inputs.prepared_windows(range(14), prepare)
    assert [[item.n for item in window] for window in found] == [[0, 1], [2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]
    assert sorted(made) == list(range(14))
    started = threading.Event()

    def second():
        yield 1
        started.set()
        yield 2

    items = inputs.ahead(second())
    assert next(items) == 1 and started.wait(60) and list(items) == [2]  # it was made before it was asked for
    with pytest.raises(DataError, match="bad"):
        list(inputs.ahead(iter_failing()))


def iter_failing():
    yield 1
    raise DataError("bad")


def test_a_named_scorer_replaces_the_model_built_by_the_run(tmp_path):
    """POINTS' P may be a model of an earlier round: the recipe names its folder in the store."""
    from vlmflow.curation.inputs import scorer
    from vlmflow.models import store

    plain = context(tmp_path)
    assert scorer(plain, None) is None
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"earlier")
    earlier = store.publish(plain, tmp_path / "weights", "earlier", store.ModelLineage(step="train"), "earlier-round")
    assert scorer(context(tmp_path, scorer=earlier.uri), None) == earlier
