"""contamination: benchmark pictures and questions are found in training data, and nothing else is."""

from types import SimpleNamespace

import pytest
from curation_world import context, dataset, seal_layer
from PIL import Image, ImageOps
from test_curation_dedup import encoded, picture, sample

from vlmflow.curation import benchmark_pool, contamination, keep, phash
from vlmflow.dataset.layer import read_layer
from vlmflow.errors import RecipeError
from vlmflow.evaluation.tsv import write_table
from vlmflow.step import Context
from vlmflow.vision import phash as hashing

LONG = "Which of the two red boats in the old harbour of the island lies nearer to the lighthouse"
SHORT = "How many windows has the mill?"
BOILER = "Answer the question with a single word or a short phrase that you read in the picture"


def tables(folder):
    folder.mkdir(parents=True, exist_ok=True)
    chart = [
        {"index": str(n), "question": f"{'ABCDEFGH'[n]} is what? {BOILER}", "answer": "x", "image": picture(100 + n)}
        for n in range(8)
    ]
    boats = [
        {"index": "7", "question": LONG, "answer": "left", "image": picture(200, (192, 160))},
        {"index": "8", "question": SHORT, "answer": "three", "image": picture(201)},
        {"index": "9", "question": "What is this?", "answer": "mill", "image": picture(200, (192, 160))},
    ]
    write_table(folder / "chart.tsv", chart)
    write_table(folder / "boats.tsv", boats)
    return {name: SimpleNamespace(table=str(folder / f"{name}.tsv"), kind="reading") for name in ("chart", "boats")}


def world(folder, samples, benchmarks=None, per_shard=3, **spec) -> tuple[Context, object]:
    ctx = context(folder, contamination=spec, perplexity={"text": "alt"}, keep={"fraction": 1.0})
    ctx.recipe.evaluation = SimpleNamespace(benchmarks=tables(folder / "b") if benchmarks is None else benchmarks)
    return ctx, phash.run(ctx, dataset(folder / "d", samples, per_shard))


def run(folder, samples, **spec):
    sealed = contamination.run(*world(folder, samples, **spec))
    rows = read_layer(sealed, "contamination")
    met = {key: (r["benchmark"], r["item"], r["how"], r["found"]) for key, r in rows.items() if r["benchmark"]}
    return sealed.layers["contamination"].summary, met


def test_pictures_are_met_as_copies_bordered_and_mirrored(tmp_path):
    one = picture(200, (192, 160))
    both = ["boats/7", "boats/9"]
    samples = [
        sample("jpeg", encoded(one, "JPEG", quality=60)), sample("small", encoded(one.resize((96, 80)))),
        sample("border", encoded(ImageOps.expand(one, (0, 40), "white"))), sample("mirror", encoded(ImageOps.mirror(one))),
        sample("both", encoded(ImageOps.expand(ImageOps.mirror(one), (30, 0), "black"))), sample("other", encoded(picture(1))),
        sample("second", encoded(picture(1)), encoded(picture(103))), sample("flat", encoded(Image.new("RGB", (50, 50)))),
    ]  # fmt: skip
    summary, met = run(tmp_path, samples)
    assert met == {
        "jpeg": ("boats", "7", "image", both), "small": ("boats", "7", "image", both),
        "border": ("boats", "7", "image without border", both), "mirror": ("boats", "7", "mirrored image", both),
        "both": ("boats", "7", "mirrored image", both), "second": ("chart", "3", "image", ["chart/3"]),
    }  # fmt: skip
    assert summary["items"] == {"boats": 3, "chart": 8} and summary["samples"] == {"boats": 5, "chart": 1}
    assert summary["found"] == {"boats": 2, "chart": 1} and summary["share"] == {"boats": 0.666667, "chart": 0.125}
    assert summary["how"] == {"image": 3, "image without border": 1, "mirrored image": 2}


def test_questions_are_met_by_thirteen_words_or_whole_and_boilerplate_is_not(tmp_path):
    samples = [
        sample("caption", text=f"Quiz: {LONG.upper()}, they asked."), sample("turn", turns=[f"<image>\n{LONG}?", "left"]),
        sample("short", turns=[f"<image>\n{SHORT}\nAnswer briefly.", "three"]), sample("twelve", text=" ".join(LONG.split()[:12])),
        sample("thirteen", text=" ".join(LONG.split()[:13])), sample("inside", text=f"Tell me: {SHORT} Or doors?"),
        sample("boiler", turns=[f"Who? {BOILER}", "me"]), sample("common", turns=["What is this?", "a mill"]), sample("none"),
    ]  # fmt: skip
    _, met = run(tmp_path, samples)
    assert {key: row[:3] for key, row in met.items()} == {
        "caption": ("boats", "7", "words"), "turn": ("boats", "7", "words"), "thirteen": ("boats", "7", "words"),
        "short": ("boats", "8", "words"),
    }  # fmt: skip


def test_another_layers_text_is_compared_when_named(tmp_path):
    ctx, data = world(tmp_path, [sample("a", text=LONG), sample("b", text="x")], text="fused")
    rows = {"a": {"key": "a", "text": "a boat"}, "b": {"key": "b", "text": LONG}}
    data = seal_layer(ctx, data, "fused", params={}, version=1, schema={"text": "str"}, rows=rows)
    found = read_layer(contamination.run(ctx, data), "contamination")
    assert [found[key]["item"] for key in "ab"] == [None, "7"]


def test_keep_drops_what_stands_in_a_benchmark_and_tells_the_share_that_stays(tmp_path):
    samples = [sample("a", encoded(picture(200, (192, 160))), text="x"), sample("b", encoded(picture(103)), text="y"),
               sample("c", encoded(picture(1)), text="z")]  # fmt: skip
    for drop, kept in ((True, ["c"]), (False, ["a", "b", "c"])):
        ctx, data = world(tmp_path / str(drop), samples, drop=drop)
        data = contamination.run(ctx, data)
        rows = {key: {"key": key, "ppl": 2.0} for key in "abc"}
        data = seal_layer(ctx, data, "ppl", params={}, version=1, schema={"ppl": "float"}, rows=rows)
        data = keep.run(ctx, data)
        found = read_layer(data, "keep")
        assert [key for key in "abc" if found[key]["keep"]] == kept
        summary = data.layers["keep"].summary
        expected = {"boats": 2, "chart": 1} if not drop else {"boats": 0, "chart": 0}
        assert {name: each["found"] for name, each in summary["benchmarks"].items()} == expected
        assert summary["benchmarks"]["chart"]["share"] == expected["chart"] / 8
    dropped = read_layer(keep.run(*_again(tmp_path / "True", samples)), "keep")["a"]["reason"]
    assert dropped == "stands in benchmark boats, item 7 (image)"


def _again(folder, samples):
    ctx, data = world(folder, samples)
    data = contamination.run(ctx, data)
    rows = {key: {"key": key, "ppl": 2.0} for key in "abc"}
    return ctx, seal_layer(ctx, data, "ppl", params={}, version=1, schema={"ppl": "float"}, rows=rows)


def test_hashes_of_a_benchmark_are_computed_once_and_a_changed_table_again(tmp_path, monkeypatch):
    calls = []
    real = hashing.hashes
    monkeypatch.setattr(benchmark_pool.phash, "hashes", lambda image: calls.append(1) or real(image))
    ctx, data = world(tmp_path, [sample("a", encoded(picture(1)))])
    calls.clear()
    first = contamination.run(ctx, data)
    assert len(calls) == 8 + 3
    assert contamination.run(ctx, data).digest == first.digest and len(calls) == 11
    write_table(tmp_path / "b" / "boats.tsv", [{"index": "1", "question": "q", "answer": "x", "image": picture(1)}])
    again = contamination.run(ctx, data)
    assert len(calls) == 12 and read_layer(again, "contamination")["a"]["found"] == ["boats/1"]


def test_without_a_benchmark_there_is_nothing_to_compare_with(tmp_path):
    with pytest.raises(RecipeError, match=r"evaluation\.benchmarks is empty"):
        contamination.run(*world(tmp_path, [sample("a", text="x")], benchmarks={}))
