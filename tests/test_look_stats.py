"""Statistics and differences against plain Python on the same rows."""

from __future__ import annotations

import statistics
from html.parser import HTMLParser

import look_world
import pytest

from vlmflow.dataset.layer import read_layer
from vlmflow.look import diff, sql, stats, stats_page, table


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stats")
    manifest = look_world.small(folder)
    made = table.open_table(manifest, folder / "scratch")
    return manifest, made, stats.stats(manifest, made), folder


def test_numbers_are_those_of_plain_python(world):
    manifest, _, made, folder = world
    values = [row["ppl"] for row in read_layer(manifest, "ppl", folder).values() if row["error"] is None]
    found = made["columns"]["ppl.ppl"]
    assert found["filled"] == 22 and found["missing"] == 2
    assert found["mean"] == pytest.approx(statistics.mean(values)) and found["deviation"] == pytest.approx(
        statistics.pstdev(values)
    )
    assert (found["min"], found["max"], found["quantiles"]["0.5"]) == (10, 17, statistics.median(values))
    assert sum(map(sum, found["histogram"]["counts"].values())) == 22
    web = [
        row["ppl"]
        for key, row in read_layer(manifest, "ppl", folder).items()
        if row["error"] is None and key < "web" + "~" and key >= "web"
    ]
    assert found["by_source"]["web"] == {
        "count": len(web),
        "mean": pytest.approx(statistics.mean(web)),
        "median": statistics.median(web),
    }


def test_sources_reasons_and_failures_are_counted(world):
    _, _, made, _ = world
    assert made["state"] == {"dropped": 13, "kept": 11}
    assert made["reasons"]["not scored"] == 2 and sum(made["reasons"].values()) == 24
    assert made["failed"] == {"fused: the reply has # words": 2}
    assert {name: (s["samples"], s["kept"], s["failed"]) for name, s in made["sources"].items()} == {
        "docs": (8, 3, 1),
        "web": (16, 8, 1),
    }
    assert made["sources"]["web"]["share"] == 0.5
    assert made["not_pulled"] == {"reasons": {"bad_url": 1, "http_404": 1}, "hosts": {"": 1, "gone.example": 1}}


def test_texts_have_lengths_scripts_and_repetitions(tmp_path):
    manifest = look_world.small(tmp_path, hostile=False)
    ctx = look_world.context(tmp_path)
    texts = ["Ein Hund", "ein hund ", "一只狗", "", "собака", *(f"unique {i}" for i in range(19))]
    keys = list(read_layer(manifest, "keep", tmp_path))
    rows = {key: {"key": key, "text": text} for key, text in zip(keys, texts, strict=True)}
    manifest = look_world.seal_layer(
        ctx, manifest, "described", params={}, version=1, schema={"text": "str"}, rows=rows
    )
    found = stats.stats(manifest, table.open_table(manifest, tmp_path / "scratch"))["columns"]["described.text"]
    assert found["scripts"] == {"Latin": 21, "Han": 1, "Cyrillic": 1}
    assert found["repeated"] == 1 and found["empty"] == 1 and found["characters"]["max"] == 9
    assert found["characters"]["mean"] == pytest.approx(statistics.mean(map(len, texts)))


def test_images_and_lists_are_counted(world):
    _, _, made, _ = world
    assert made["columns"]["sample.format"]["values"] == {"png": 24}
    assert made["columns"]["sample.width"]["mean"] == 80 and made["columns"]["sample.aspect"]["min"] == 0.5
    assert made["columns"]["clean.problems"]["items"] == {"aspect # > #": 4}
    assert made["duplicates"]["first images with identical bytes"] == 0


def test_values_that_are_no_numbers_do_not_spoil_a_distribution(tmp_path):
    manifest = look_world.small(tmp_path)
    ctx = look_world.context(tmp_path)
    keys = list(read_layer(manifest, "keep", tmp_path))
    values = [float("nan"), float("inf"), *([1.0] * 22)]
    rows = {key: {"key": key, "score": value} for key, value in zip(keys, values, strict=True)}
    manifest = look_world.seal_layer(ctx, manifest, "judge", params={}, version=1, schema={"score": "float"}, rows=rows)
    found = stats.stats(manifest, table.open_table(manifest, tmp_path / "scratch"))["columns"]["judge.score"]
    assert found["mean"] == found["max"] == 1.0 and found["histogram"]["missing"] == 2


def test_the_page_has_plots_and_escapes_what_strangers_wrote(world):
    _, _, made, _ = world
    made = {**made, "reasons": {look_world.HOSTILE: 3}, "name": look_world.HOSTILE}
    text = stats_page.page(made)
    tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            assert not [name for name, _ in attrs if name.startswith("on")]

    Tags().feed(text)
    assert "script" not in tags and tags.count("svg") > 5 and "ppl.ppl" in text


def test_a_million_rows_are_the_same_code_as_few(tmp_path):
    """50,000 rows under a small memory limit: exact quantiles, no list of rows in Python."""
    manifest = look_world.large(tmp_path, 50_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sql, "MEMORY", "128MB")
        made = stats.stats(manifest, table.open_table(manifest, tmp_path / "scratch"))
    found = made["columns"]["ppl.ppl"]
    values = sorted(row["ppl"] for row in read_layer(manifest, "ppl").values())
    assert found["quantiles"]["0.5"] == pytest.approx(statistics.median(values)) and found["filled"] == 50_000
    assert sum(s["samples"] for s in made["sources"].values()) == 50_000 and not made["with_samples"]


# --- differences -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diff")
    return [
        (m, table.open_table(m, folder / "scratch"))
        for m in (look_world.small(folder / name, shift) for name, shift in (("a", 0.0), ("b", 1.5)))
    ]


def test_a_dataset_does_not_differ_from_itself(two):
    (a, table_a), _ = two
    made = diff.diff(a, a, table_a, table_a)
    assert made["same"] and diff.as_text(made).endswith("nothing differs")


def test_changed_parameters_values_and_decisions_are_named(two):
    (a, table_a), (b, table_b) = two
    made = diff.diff(a, b, table_a, table_b, examples=2)
    assert not made["same"] and made["shards"]["common"] == 3 and made["images"]["changed"] == 0
    assert made["layers"]["changed"] == {"keep": {"threshold": [13.0, 14.5]}, "ppl": {"model": ["m0", "m1.5"]}}
    assert made["values"]["ppl.ppl"]["changed"] == 22 and made["values"]["ppl.ppl"]["difference"] == {
        "least": 1.5,
        "median": 1.5,
        "most": 1.5,
    }
    assert "fused.text" not in made["values"] and "ppl.tokens" not in made["values"]
    flipped = [i for i in range(24) if i % 12 != 5 and i % 8 in (2, 3)]
    (change,) = made["decisions"].items()
    assert change[0] == "kept -> dropped" and change[1]["count"] == len(flipped) and len(change[1]["examples"]) == 2
    assert change[1]["examples"][0] == {
        "key": "web-00000002", "a": "perplexity 12 is in the lowest 50 % (to 13)", "b": "perplexity 13.5 is beyond the lowest 50 % (to 13)",
    }  # fmt: skip
    assert "kept -> dropped: 6 samples" in diff.as_text(made)
    back = diff.diff(b, a, table_b, table_a)
    assert list(back["decisions"]) == ["dropped -> kept"]


def test_added_and_removed_shards_samples_and_layers(two, tmp_path):
    (a, table_a), _ = two
    fewer = a.select(["web"]).model_copy(
        update={"layers": {n: r for n, r in a.select(["web"]).layers.items() if n != "clean"}}
    )
    table_b = table.open_table(fewer, tmp_path)
    made = diff.diff(a, fewer, table_a, table_b, examples=3)
    assert made["samples"]["removed"] == 8 and made["samples"]["added"] == 0 and made["samples"]["common"] == 16
    assert made["samples"]["removed_examples"] == [f"docs-{i:08d}" for i in (16, 17, 18)]
    assert len(made["shards"]["removed"]) == 1 and made["sources"] == {"docs": [8, 0], "web": [16, 16]}
    assert (
        made["layers"]["removed"] == ["clean"]
        and made["images"]["removed"] == 8
        and not made["values"]
        and not made["decisions"]
    )
    assert diff.diff(fewer, a, table_b, table_a)["samples"]["added"] == 8


def test_many_rows_differ_in_bounded_memory(tmp_path):
    a, b = (look_world.large(tmp_path / str(seed), 50_000, seed=seed) for seed in (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sql, "MEMORY", "128MB")
        made = diff.diff(a, b, *(table.open_table(m, tmp_path / "scratch") for m in (a, b)), examples=4)
    assert made["samples"]["common"] == 50_000 and made["values"]["ppl.ppl"]["changed"] > 49_000
    assert sum(c["count"] for c in made["decisions"].values()) > 1000 and all(
        len(c["examples"]) == 4 for c in made["decisions"].values()
    )
    assert made["images"] is None and len(made["shards"]["added"]) == 5
