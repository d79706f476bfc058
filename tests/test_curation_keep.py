"""keep: the exact share over all shards, whatever the sharding; threshold, control, duplicates, report."""

from decimal import ROUND_HALF_UP, Decimal

import pytest
from curation_world import context, dataset, png, sample, seal_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmflow.curation import keep, selection
from vlmflow.dataset.layer import add_layer, read_layer
from vlmflow.errors import DataError, RecipeError

PPL = {"ppl": "float", "nll": "float", "tokens": "int"}


def scored(folder, values: dict[str, float | None], per_shard=4, texts=None, sources=("web",), keys=None):
    """A dataset whose layer ppl holds `values` (None = not scored)."""
    texts = texts or {key: f"text {key}" for key in values}
    data = dataset(folder / "d", [sample(k, texts[k], png(1)) for k in keys or values], per_shard, sources)
    rows = {k: {"key": k, "ppl": v, "error": None if v is not None else "broken"} for k, v in values.items()}
    return seal_layer(context(folder), data, "ppl", params={}, version=1, schema=PPL, rows=rows)


def run(folder, manifest, seed=17, **spec):
    sealed = keep.run(context(folder, seed=seed, perplexity={"text": "alt"}, keep=spec), manifest)
    rows = read_layer(sealed, "keep")
    return sealed.layers["keep"].summary, rows, [k for k, r in rows.items() if r["keep"]]


def brute_force(values, fraction):
    """Half-up count by decimal arithmetic; a sample is kept when fewer than k samples come before it."""
    live = {k: v for k, v in values.items() if v is not None}
    k = int((Decimal(repr(fraction)) * len(live)).quantize(Decimal(1), ROUND_HALF_UP))
    before = {a: sum((w, b) < (v, a) for b, w in live.items()) for a, v in live.items()}
    return {a for a, n in before.items() if n < k}


VALUES = st.dictionaries(
    st.text("abcxyz0189", min_size=1, max_size=4), st.one_of(st.none(), st.sampled_from([1.0, 2.5, 2.5, 7.25, 9000.0]), st.floats(1, 50)),
    min_size=1, max_size=40,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(VALUES, st.sampled_from([0.2, 0.1, 0.5, 1.0, 0.35, 0.07, 1e-3]), st.randoms())
def test_ranking_equals_brute_force_in_any_order(values, fraction, random):
    keys = list(values)
    random.shuffle(keys)
    order = selection.ranking(keys, [values[k] for k in keys], "lowest").tolist()
    count = selection.keep_count(fraction, len(order))
    assert {keys[i] for i in order[:count]} == brute_force(values, fraction)


@pytest.mark.parametrize(
    ("fraction", "scored", "count"),
    [(0.2, 10, 2), (0.2, 12, 2), (0.2, 13, 3), (0.5, 5, 3), (0.1, 5, 1), (0.1, 4, 0), (0.15, 10, 2), (0.35, 10, 4), (1.0, 7, 7), (0.29, 50, 15), (0.2, 0, 0)],
)  # fmt: skip
def test_count_is_rounded_half_up_without_binary_error(fraction, scored, count):
    assert selection.keep_count(fraction, scored) == count


def test_the_same_samples_stay_under_any_sharding(tmp_path):
    values = {f"k{i:03d}": float((i * 37) % 23) + 1 for i in range(57)} | {"k100": None}
    expected = brute_force(values, 0.2)
    for run_number, (per_shard, keys) in enumerate(
        [(4, list(values)), (58, list(values)[::-1]), (11, sorted(values, key=hash))]
    ):
        folder = tmp_path / str(run_number)
        summary, rows, kept = run(folder, scored(folder, values, per_shard, keys=keys))
        assert set(kept) == expected and len(kept) == 11
        assert (summary["kept"], summary["scored"], summary["total"]) == (11, 57, 58)
        ranked = sorted((k for k in values if values[k] is not None), key=lambda k: (values[k], k))
        assert [rows[k]["rank"] for k in ranked] == list(range(57))
        assert summary["threshold"] == max(values[k] for k in expected)


def test_rows_tell_why_and_what_was_not_scored_never_stays(tmp_path):
    values = {"a": 3.0, "b": 3.0, "c": 9.0, "d": None, "e": 2.0, "f": 20.0}
    summary, rows, kept = run(tmp_path, scored(tmp_path, values), fraction=0.4)
    assert kept == ["a", "e"]
    assert rows["a"]["reason"] == "perplexity 3 is in the lowest 40 % (to 3)"
    assert rows["b"]["reason"] == "perplexity 3 ties with the cut of the lowest 40 %; the key decides"
    assert rows["c"]["reason"] == "perplexity 9 is beyond the lowest 40 % (to 3)"
    assert rows["d"] == {"key": "d", "keep": False, "reason": "not scored: broken", "rank": None, "error": None}
    assert summary["histogram"]["edges"] == keep.EDGES
    assert sum(summary["histogram"]["kept"]) == 2 and sum(summary["histogram"]["dropped"]) == 3


def test_highest_threshold_and_control(tmp_path):
    values = {f"k{i:02d}": float(i + 1) for i in range(20)}
    data = scored(tmp_path, values)
    assert run(tmp_path, data, order="highest", fraction=0.1)[2] == ["k18", "k19"]
    summary, rows, kept = run(tmp_path, data, threshold=5.0)
    assert kept == ["k00", "k01", "k02", "k03", "k04"] and summary["threshold"] == 5.0
    assert rows["k05"]["reason"] == "perplexity 6 beyond the threshold 5"
    assert run(tmp_path, data, threshold=19.5, order="highest")[2] == ["k19"]
    assert run(tmp_path, data, threshold=0.5)[2] == []
    control = run(tmp_path, data, order="random")[2]
    assert len(control) == 4 and control == run(tmp_path / "again", data, order="random")[2]
    assert control != run(tmp_path, data, order="random", seed=18)[2]
    with pytest.raises(RecipeError, match="threshold and order 'random'"):
        run(tmp_path, data, order="random", threshold=2.0)


def test_duplicates_are_reported_and_removed_only_when_asked(tmp_path):
    values = {f"k{i}": float(i + 1) for i in range(10)}
    texts = {k: f"text {k}" for k in values} | {"k0": "Same  text.", "k1": "same text", "k2": "same text"}
    data = scored(tmp_path, values, texts=texts)
    summary, _, kept = run(tmp_path, data, fraction=0.4)
    assert kept == ["k0", "k1", "k2", "k3"]
    assert summary["duplicates_among_kept"] == {"texts": 1, "samples": 3, "most": [["same text", 3]]}
    summary, rows, kept = run(tmp_path, data, fraction=0.4, drop_duplicate_texts=True)
    assert kept == ["k0", "k3", "k4"] and summary["repeated_texts_dropped"] == 2  # 40 % of the 8 different texts
    assert rows["k1"]["reason"] == "repeats a kept text's wording" and rows["k1"]["rank"] is None


def test_share_kept_by_source(tmp_path):
    values = {f"k{i:02d}": float(i + 1) for i in range(16)}
    summary, _, _ = run(tmp_path, scored(tmp_path, values, sources=("a", "b")), fraction=0.5)
    assert summary["sources"] == {
        "a": {"total": 8, "scored": 8, "kept": 4, "share": 0.5}, "b": {"total": 8, "scored": 8, "kept": 4, "share": 0.5},
    }  # fmt: skip


def test_nothing_scored_and_repeated_keys_are_refused(tmp_path):
    with pytest.raises(DataError, match="0 of 2 samples have a perplexity"):
        run(tmp_path / "a", scored(tmp_path / "a", {"a": None, "b": None}))
    folder = tmp_path / "b"
    data = dataset(folder / "d", [sample("a", "x", png(1)), sample("a", "y", png(1))], per_shard=1)

    def score(reader, _):
        return [{"key": key, "ppl": 2.0} for key in reader.keys()]

    data = add_layer(context(folder), data, "ppl", params={}, version=1, schema=PPL, compute=score)
    with pytest.raises(DataError, match="key 'a' stands in 2 shards"):
        run(folder, data)


def test_run_again_gives_the_same_manifest(tmp_path):
    data = scored(tmp_path, {f"k{i}": float(i % 3) + 1 for i in range(9)})
    ctx = context(tmp_path, perplexity={"text": "alt"})
    assert keep.run(ctx, data).digest == keep.run(ctx, data).digest


def with_layer(folder, manifest, name, schema, rows, **curation):
    """The dataset with a further layer whose rows are given by key."""
    rows = {key: {"key": key, **row} for key, row in rows.items()}
    return seal_layer(context(folder, **curation), manifest, name, params={}, version=1, schema=schema, rows=rows)


def choose(folder, manifest, **curation):
    sealed = keep.run(context(folder, perplexity={"text": "alt"}, **curation), manifest)
    rows = read_layer(sealed, "keep")
    return sealed.layers["keep"].summary, rows, [k for k, r in rows.items() if r["keep"]]


CLEAN = {"problems": "list<str>", "object": "str"}


def test_what_earlier_steps_drop_goes_first_with_its_reason(tmp_path):
    values = {key: float(i + 1) for i, key in enumerate("abcdefgh")}
    data = scored(tmp_path, values)
    none = {"problems": [], "object": "other"}
    data = with_layer(tmp_path, data, "clean", CLEAN, dict.fromkeys(values, none) | {
        "a": {"problems": ["side 3 < 20", "words 1 < 3"], "object": "other"}, "b": {"problems": ["empty"], "object": "other"}})  # fmt: skip
    data = with_layer(tmp_path, data, "judge", {"problems": "list<str>"}, {key: {"problems": []} for key in values} | {
        "b": {"problems": ["grammar"]}, "c": {"problems": ["grammar: it are"]}})  # fmt: skip
    data = with_layer(tmp_path, data, "dedup", {"of": "str", "kind": "str", "distance": "int"}, {key: {} for key in values} | {
        "d": {"of": "h", "kind": "near", "distance": 3}})  # fmt: skip
    judge = {"model_name": "m"}
    summary, rows, kept = choose(tmp_path, data, clean={"text": "alt"}, judge=judge, dedup={}, keep={"fraction": 0.5})
    assert kept == ["e", "f"]  # half of e, f, g, h
    assert [rows[key]["reason"] for key in "abcd"] == [
        "clean: side 3 < 20; words 1 < 3", "clean: empty", "judge: grammar: it are", "repeats h (near, 3 bits apart)",
    ]  # fmt: skip
    assert [rows[key]["rank"] for key in "abcdefgh"] == [None] * 4 + [0, 1, 2, 3]
    assert summary["dropped"] == {"clean": 2, "judge": 1, "dedup": 1} and summary["scored"] == 8
    _, _, kept = choose(tmp_path, data, judge=judge | {"drop": False}, keep={"fraction": 0.5})
    assert kept == ["a", "b", "c", "d"]
    with pytest.raises(DataError, match="no layer 'contamination'"):
        choose(tmp_path, data, contamination={})


def test_everything_dropped_is_told_apart_from_nothing_scored(tmp_path):
    data = scored(tmp_path, {"a": 1.0, "b": None})
    rows = {key: {"problems": ["empty"], "object": "other"} for key in "ab"}
    data = with_layer(tmp_path, data, "clean", CLEAN, rows)
    with pytest.raises(DataError, match=r"2 samples, 1 of them scored, and earlier steps drop every one .*clean 2"):
        choose(tmp_path, data, clean={"text": "alt"})


def test_the_commonest_objects_are_thinned_to_their_first_in_rank(tmp_path):
    kinds = ["person"] * 10 + ["text"] * 6 + ["food"] * 2 + ["other"] * 10 + ["plant"] * 2
    values = {f"k{i:02d}": float((i * 7) % 31) + 1 for i in range(len(kinds))}
    rows = {key: {"problems": [], "object": kind} for key, kind in zip(values, kinds, strict=True)}
    data = with_layer(tmp_path, scored(tmp_path, values), "clean", CLEAN, rows)
    clean = {"text": "alt"}
    summary, found, kept = choose(tmp_path, data, clean=clean, keep={"fraction": 1.0, "balance": {"top": 1}})
    people = sorted((key for key in values if rows[key]["object"] == "person"), key=values.__getitem__)
    assert set(values) - set(kept) == set(people[6:]) and summary["thinned"] == {"person": [10, 6]}  # mean: 6
    assert found[people[6]]["reason"] == "its main object is too common: the first 60 % of such samples go on"
    assert found[people[6]]["rank"] is None
    summary, _, kept = choose(tmp_path, data, clean=clean, keep={"fraction": 0.5, "balance": {"to": 0.5}})
    assert (
        summary["thinned"] == {"person": [10, 5]} and len(kept) == 13
    )  # half of 25, rounded half up; text is not above the mean
    with pytest.raises(ValueError, match=r"keep\.balance needs the main objects"):
        choose(tmp_path, data, keep={"balance": {}})


def test_each_source_has_its_share_and_its_quota(tmp_path):
    values = {f"k{i:02d}": float(i + 1) for i in range(16)}
    data = scored(tmp_path, values, sources=("a", "b"))  # a: k00-k03, k08-k11; b: the others
    summary, rows, kept = choose(tmp_path, data, keep={"fraction": 0.25, "per_source": True})
    assert kept == ["k00", "k01", "k04", "k05"] and summary["threshold"] is None
    assert rows["k04"]["reason"] == "perplexity 5 is in the lowest 25 % of source 'b' (to 6)"
    assert rows["k02"]["reason"] == "perplexity 3 is beyond the lowest 25 % of source 'a' (to 2)"
    summary, rows, kept = choose(tmp_path, data, keep={"fraction": 0.5, "quota": {"a": 3}})
    assert kept == ["k00", "k01", "k02", "k04", "k05", "k06", "k07"] and summary["over_quota"] == 1
    assert rows["k03"]["reason"] == "source 'a' is full: its quota is 3" and summary["threshold"] == 8.0
    with pytest.raises(RecipeError, match=r"quota names \['c'\]"):
        choose(tmp_path, data, keep={"quota": {"c": 3}})
    with pytest.raises(ValueError, match="per_source is about fraction"):
        choose(tmp_path, data, keep={"per_source": True, "threshold": 3.0})


def test_order_of_shards_changes_nothing(tmp_path):
    kinds = ["person", "text", "other"]
    values = {f"k{i:03d}": float((i * 37) % 11) + 1 for i in range(60)}
    found = []
    for number, keys in enumerate([list(values), list(values)[::-1], sorted(values, key=lambda k: k[::-1])]):
        folder = tmp_path / str(number)
        data = scored(folder, values, (7, 60, 13)[number], keys=keys)
        rows = {k: {"problems": ["empty"] * (i % 9 == 0), "object": kinds[i % 7 % 3]} for i, k in enumerate(values)}
        data = with_layer(folder, data, "clean", CLEAN, rows)
        summary, rows, _ = choose(
            folder, data, clean={"text": "alt"}, keep={"fraction": 0.3, "balance": {}, "drop_duplicate_texts": True}
        )
        summary = {k: v for k, v in summary.items() if k != "sources"}
        found.append((summary, rows))
    assert found[0] == found[1] == found[2] and found[0][0]["thinned"]
