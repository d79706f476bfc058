"""Duplicates of what other datasets hold (curation.dedup.against): found, named, part of the digest; never in a circle."""

from types import SimpleNamespace

import numpy as np
import pytest
from curation_world import context, dataset, seal_layer
from test_curation_dedup import encoded, picture, plant, sample

from vlmflow import ports, recipe
from vlmflow.curation import dedup, drops, elsewhere, phash
from vlmflow.dataset.layer import read_layer
from vlmflow.dataset.sample import Sample
from vlmflow.errors import DataError, RecipeError


def hashed(folder, name, samples, per_shard=3):
    """A dataset with layer `phash`, as `pull` leaves one that is compared with."""
    made = dataset(folder / name, samples, per_shard).model_copy(update={"name": name})
    return phash.run(context(folder, dedup={}), made)


def run(folder, mine, *, per_shard=3, against=("sft",), others=None, **spec):
    ctx = context(folder, dedup={"images": 6, "against": list(against), **spec})
    theirs = {name: hashed(folder, name, samples) for name, samples in (others or {}).items()}
    sealed = dedup.run(ctx, hashed(folder, "web", mine, per_shard), theirs)
    rows = read_layer(sealed, "dedup")
    return sealed, {key: (row["of"], row["kind"]) for key, row in rows.items() if row["of"]}


def test_copies_of_another_datasets_samples_go_first_and_say_of_whom(tmp_path):
    one, two, three = (picture(n) for n in (1, 2, 3))
    mine = [
        sample("a", encoded(one, "JPEG", quality=40)), sample("b", encoded(one)), sample("c", encoded(two)),
        sample("d", encoded(two, "JPEG")), sample("e", encoded(three)), sample("f", text="only words"),
    ]  # fmt: skip
    # far smaller than `a` and `b`, and yet they go: the other dataset's sample stays whatever its size
    theirs = [sample("x", encoded(one.resize((48, 40)))), sample("y", text="Only  words!"), sample("z", encoded(one))]
    sealed, gone = run(tmp_path, mine, others={"sft": theirs})
    assert gone == {
        "a": ("sft/z", "near"), "b": ("sft/z", "bytes"), "d": ("c", "near"), "f": ("sft/y", "text"),
    }  # fmt: skip
    summary = sealed.layers["dedup"].summary
    assert summary["stay"] == 2 and summary["against"] == {"sft": 3}
    assert summary["dropped"] == {"bytes": 1, "near": 2, "text": 1}
    assert summary["sources"] == [["web", "web", 1]] and summary["clusters"] == [["c", 1]]
    reasons = drops.read(sealed, context(tmp_path, dedup={}).recipe.curation, tmp_path / "scratch").reasons.to_pylist()
    assert reasons[1] == "repeats z of dataset sft (bytes, 0 bits apart)"
    assert reasons[3].startswith("repeats c (near, ") and reasons[4] is None


def test_a_dropped_copy_drops_nothing_itself(tmp_path):
    """a repeats x and would drop b, which is beyond the distance of x."""
    base = 0x0F0F_3333_5555_1234
    ctx = context(tmp_path, dedup={"images": 2, "against": ["sft"]})
    theirs = with_hashes(ctx, tmp_path, "sft", {"x": base})
    mine = with_hashes(ctx, tmp_path, "web", {"a": base ^ 0b11, "b": base ^ 0b1111})
    rows = read_layer(dedup.run(ctx, mine, {"sft": theirs}), "dedup")
    assert [(key, row["of"], row["distance"]) for key, row in rows.items()] == [("a", "sft/x", 2), ("b", None, None)]


def test_pictures_alone_decide_unless_the_sample_that_goes_has_conversations(tmp_path):
    data = encoded(picture(4))
    theirs = [sample("x", data, turns=["what is it?", "a dog"])]
    mine = [
        sample("a", data, text="a caption"), sample("b", data, turns=["what colour?", "red"]),
        sample("c", encoded(picture(4), "JPEG"), turns=["What is it", "A dog."]),
    ]  # fmt: skip
    _, gone = run(tmp_path / "plain", mine, others={"sft": theirs})
    assert gone == {"a": ("sft/x", "bytes"), "c": ("sft/x", "near")}
    _, gone = run(tmp_path / "same", mine, others={"sft": theirs}, same_text=True)
    assert gone == {"c": ("sft/x", "near")}


def test_wordings_are_compared_when_a_text_is_named(tmp_path):
    mine = [sample("a", encoded(picture(1)), text="A house."), sample("b", encoded(picture(2)), text="a tree")]
    theirs = [sample("x", encoded(picture(3)), text="a  house"), sample("y", encoded(picture(5)))]
    assert run(tmp_path / "images", mine, others={"sft": theirs})[1] == {}
    assert run(tmp_path / "text", mine, others={"sft": theirs}, text="alt")[1] == {"a": ("sft/x", "text")}


def test_all_images_of_a_sample_must_be_near_in_order(tmp_path):
    one, two, three = (encoded(picture(n)) for n in (5, 6, 7))
    small = [encoded(picture(n), "JPEG", quality=50) for n in (5, 6)]
    mine = [sample("a", *small), sample("b", two, one), sample("c", one, three), sample("d", one)]
    _, gone = run(tmp_path, mine, others={"sft": [sample("x", one, two)]})
    assert gone == {"a": ("sft/x", "near")}


def test_the_nearest_is_named_then_the_first_of_the_list(tmp_path):
    data = encoded(picture(1))
    mine = [sample("a", data), sample("b", encoded(picture(2)))]
    others = {"seed": [sample("s", data)], "sft": [sample("x", data), sample("y", encoded(picture(2)))]}
    sealed, gone = run(tmp_path / "1", mine, against=("sft", "seed"), others=others)
    assert gone == {"a": ("sft/x", "bytes"), "b": ("sft/y", "bytes")}
    assert sealed.layers["dedup"].summary["against"] == {"sft": 2, "seed": 0}
    _, gone = run(tmp_path / "2", mine, against=("seed", "sft"), others=others)
    assert gone == {"a": ("seed/s", "bytes"), "b": ("sft/y", "bytes")}


def with_hashes(ctx, folder, name, plain, trimmed=None, turns=None, per_shard=37):
    """A dataset of samples without files whose layer `phash` says what the test wants."""
    made = dataset(folder / name, [Sample(key, {"images": []}) for key in plain], per_shard)
    rows = {
        key: {"key": key, "plain": [int(value)], "trimmed": [int((trimmed or plain)[key])], "mirrored": [0],
         "content": n + (1000 if name == "sft" else 1), "text": None, "turns": (turns or {}).get(key), "pixels": 1}
        for n, (key, value) in enumerate(plain.items())
    }  # fmt: skip
    made = made.model_copy(update={"name": name})
    return seal_layer(ctx, made, phash.LAYER, params={}, version=1, schema=phash.SCHEMA, rows=rows)


def test_pages_that_all_look_alike_on_both_sides_are_not_compared_pair_by_pair(tmp_path, monkeypatch):
    rng, n = np.random.default_rng(0), 3000

    def alike():  # around one picture, four bits off at most: all different, most within six bits of each other
        values = np.full(n, 0x0F0F_3333_5555_1234, dtype=np.uint64)
        for _ in range(4):
            values ^= np.uint64(1) << rng.integers(0, 60, n).astype(np.uint64)
        return values.tolist()

    ctx = context(tmp_path, dedup={"images": 6, "against": ["sft"]})
    made = {name: {f"{name}-{i:04d}": value for i, value in enumerate(alike())} for name in ("sft", "web")}
    sealed = {name: with_hashes(ctx, tmp_path, name, values, per_shard=n) for name, values in made.items()}
    compared, near = [], elsewhere.Index._near
    monkeypatch.setattr(elsewhere.Index, "_near", lambda *a: compared.append(int((a[6] - a[5]).sum())) or near(*a))
    rows = read_layer(dedup.run(ctx, sealed["web"], {"sft": sealed["sft"]}), "dedup")
    assert all(row["of"] for row in rows.values()) and sum(compared) < n * n
    for key, row in rows.items():
        if row["of"].startswith("sft/"):
            bits = (made["web"][key] ^ made["sft"][row["of"].removeprefix("sft/")]).bit_count()
            assert row["distance"] == bits <= 6


@pytest.mark.parametrize("first", [3, 256])
@pytest.mark.parametrize("seed", range(8))
def test_what_goes_equals_a_plain_walk_over_all_pairs(tmp_path, monkeypatch, seed, first):
    monkeypatch.setattr(elsewhere, "FIRST", first)
    rng = np.random.default_rng(seed)
    n, distance = 240, int(rng.integers(0, 9))
    values = plant(rng, n, 12)
    borders = np.where(rng.random(n) < 0.7, values, plant(rng, n, 12))
    said = np.where(rng.random(n) < 0.3, rng.integers(1, 3, n), 0)
    keys = [f"k{i:03d}" for i in rng.permutation(n)]
    split = {"sft": range(0, 100), "web": range(100, n)}
    ctx = context(tmp_path, dedup={"images": distance, "against": ["sft"]})
    made = {
        name: with_hashes(
            ctx, tmp_path, name, {keys[i]: values[i] for i in rows}, {keys[i]: borders[i] for i in rows},
            {keys[i]: int(said[i]) or None for i in rows},
        )
        for name, rows in split.items()
    }  # fmt: skip
    rows = read_layer(dedup.run(ctx, made["web"], {"sft": made["sft"]}), "dedup")
    away = {key for key, row in rows.items() if (row["of"] or "").startswith("sft/")}

    def bits(i, j):
        return min((int(v[i]) ^ int(v[j])).bit_count() for v in (values, borders))

    expected = {
        keys[i]: min(bits(i, j) for j in near)
        for i in split["web"]
        if (near := [j for j in split["sft"] if bits(i, j) <= distance and said[i] in (0, said[j])])
    }
    assert away == expected.keys() and 0 < len(away) < len(rows)
    if first > 100:  # all of the others are asked at once
        assert {key: rows[key]["distance"] for key in away} == expected


def test_same_rows_under_any_sharding_and_a_changed_dataset_makes_a_new_layer(tmp_path):
    pictures = [encoded(picture(n // 2), "JPEG", quality=40 + 20 * (n % 3)) for n in range(10)]
    samples = [sample(f"k{n}", data) for n, data in enumerate(pictures)]
    theirs = [sample("x", encoded(picture(0))), sample("y", encoded(picture(3)))]
    one, first = run(tmp_path / "1", samples, others={"sft": theirs}, per_shard=2)
    assert run(tmp_path / "2", samples[::-1], others={"sft": theirs}, per_shard=7)[1] == first
    assert {key: of for key, (of, _) in first.items()} == {
        "k0": "sft/x", "k1": "sft/x", "k6": "sft/y", "k7": "sft/y",
        **{key: of for key, (of, _) in first.items() if "/" not in of},
    }  # fmt: skip
    again, _ = run(tmp_path / "1", samples, others={"sft": theirs}, per_shard=2)
    fewer, left = run(tmp_path / "3", samples, others={"sft": theirs[:1]}, per_shard=2)
    alone, _ = run(tmp_path / "4", samples, against=(), per_shard=2)
    digests = [made.layers["dedup"].digest for made in (one, fewer, alone)]
    assert again.digest == one.digest and len(set(digests)) == 3
    assert not any(of == "sft/y" for of, _ in left.values()) and left["k0"] == first["k0"]
    assert "against" not in alone.layers["dedup"].params and "against" not in alone.layers["dedup"].summary


def test_a_dataset_that_is_not_there_or_has_no_hashes_is_refused_before_anything_is_read(tmp_path):
    ctx = context(tmp_path, dedup={"against": ["sft"]})
    mine = hashed(tmp_path, "web", [sample("a", encoded(picture(1)))])
    with pytest.raises(DataError, match=r"names \['sft'\], but this step was given no other datasets"):
        dedup.run(ctx, mine)
    bare = dataset(tmp_path / "d", [sample("x", encoded(picture(1)))])
    with pytest.raises(DataError, match=r"datasets \['sft'\] have no layer 'phash'.*run it again"):
        dedup.run(ctx, mine, {"sft": bare})


def test_pull_gives_hashes_to_the_datasets_that_are_named(tmp_path, monkeypatch):
    from vlmflow.curation import pull

    made = {name: dataset(tmp_path / name, [sample("a", encoded(picture(1)))]) for name in ("web", "sft", "seed")}
    made = {name: manifest.model_copy(update={"name": name}) for name, manifest in made.items()}
    monkeypatch.setattr(pull, "run", lambda ctx, name, group=None: made[name])
    ctx = context(tmp_path, dataset="web", dedup={"against": ["sft"]})
    ctx.recipe.data = dict.fromkeys(made)
    found = {name: sorted(ports.pull(ctx, name).layers) for name in made}
    assert found == {"web": [], "sft": ["phash"], "seed": []}
    ctx.recipe = SimpleNamespace(
        **vars(ctx.recipe) | {"curation": context(tmp_path, dedup={"against": ["sft"]}).recipe.curation}
    )
    assert not ports.pull(ctx, "sft").layers  # nothing is curated, so nothing is compared


def test_a_recipe_names_other_datasets_of_its_own_each_once():
    def read(against):
        return recipe.load("recipes/points-tiny.yaml", [f"curation.dedup.against={against}"])

    assert read("[sft, seed]").curation.dedup.against == ["sft", "seed"]
    for against, said in (
        ("[web]", r"against\[0\]: 'web' is the dataset that is curated"),
        ("[sft, gone]", r"against\[1\]: dataset 'gone' is not in data"),
        ("[sft, sft]", "names a dataset twice"),
    ):
        with pytest.raises(RecipeError, match=said):
            read(against)
