"""dedup: exact and near duplicates over all shards, against a plain comparison of all with all."""

import io

import numpy as np
import pytest
from curation_world import context, dataset, seal_layer
from PIL import Image, ImageOps

from vlmflow.curation import dedup, phash
from vlmflow.dataset.layer import read_layer
from vlmflow.dataset.sample import Sample
from vlmflow.errors import DataError

FUSED = {"text": "str"}


def picture(seed: int, size=(96, 80)) -> Image.Image:
    """A smooth random picture that differs from every other seed's."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(key: str, *images: bytes, text=None, turns=()) -> Sample:
    about = []
    for data in images:
        with Image.open(io.BytesIO(data)) as image:
            about.append({"sha256": "", "width": image.width, "height": image.height, "format": image.format.lower()})
    meta = {"text": text, "images": about}
    if turns:
        meta["conversations"] = [{"from": "human", "value": t} for t in turns]
    return Sample(key, meta, images)


def run(folder, samples, per_shard=3, sources=("web",), fused=None, **spec):
    spec = {"images": 6, **spec}
    ctx = context(folder, dedup=spec)
    data = phash.run(ctx, dataset(folder / "d", samples, per_shard, sources))
    if fused:
        rows = {key: {"key": key, "text": text} for key, text in fused.items()}
        data = seal_layer(ctx, data, "fused", params={}, version=1, schema=FUSED, rows=rows)
    sealed = dedup.run(ctx, data)
    rows = read_layer(sealed, "dedup")
    return sealed.layers["dedup"].summary, {k: (r["of"], r["kind"], r["distance"]) for k, r in rows.items()}


def test_copies_scaled_compressed_bordered_and_equal_are_dropped_and_name_who_stays(tmp_path):
    one, other = picture(1, (192, 160)), picture(2)
    samples = [
        sample("a-small", encoded(one.resize((96, 80)))),
        sample("b-equal", encoded(one)),
        sample("c-large", encoded(one.resize((384, 320), Image.Resampling.BICUBIC))),
        sample("d-jpeg", encoded(one, "JPEG", quality=40)),
        sample("e-border", encoded(ImageOps.expand(one, (0, 40), "white"))),
        sample("f-other", encoded(other)),
        sample("g-mirror", encoded(ImageOps.mirror(one))),
        sample("h-equal", encoded(one)),
    ]
    summary, rows = run(tmp_path, samples, sources=("web", "sft"))
    assert [key for key, row in rows.items() if row[0] is None] == ["c-large", "f-other", "g-mirror"]
    assert {key: row[:2] for key, row in rows.items() if row[0]} == {
        "a-small": ("c-large", "near"), "b-equal": ("c-large", "near"), "d-jpeg": ("c-large", "near"),
        "e-border": ("c-large", "trimmed"), "h-equal": ("c-large", "near"),
    }  # fmt: skip
    assert rows["f-other"] == (None, None, None) and all(0 <= row[2] <= 6 for row in rows.values() if row[0])
    assert summary["stay"] == 3 and summary["dropped"] == {"near": 4, "trimmed": 1}
    assert summary["clusters"] == [["c-large", 5]]
    # a, b, c lie in web's first shard, d, e, f in sft's, g, h in web's second
    assert summary["sources"] == [["sft", "web", 2], ["web", "web", 3]]


def test_bytes_alone_when_asked_and_for_flat_pictures(tmp_path):
    flat, near_flat = encoded(Image.new("RGB", (64, 64), "red")), encoded(Image.new("RGB", (64, 64), "blue"))
    one = picture(3)
    samples = [sample("a", flat), sample("b", near_flat), sample("c", flat), sample("d", encoded(one)),
               sample("e", encoded(one, "JPEG")), sample("f", encoded(one))]  # fmt: skip
    summary, rows = run(tmp_path / "near", samples)
    assert {k: r[:2] for k, r in rows.items() if r[0]} == {"c": ("a", "bytes"), "e": ("d", "near"), "f": ("d", "bytes")}
    assert summary["by_bytes_only"] == 3
    _, rows = run(tmp_path / "bytes", samples, images=None)
    assert {k: r for k, r in rows.items() if r[0]} == {"c": ("a", "bytes", 0), "f": ("d", "bytes", 0)}


def test_conversations_about_one_picture_are_no_duplicates_and_same_text_asks_the_same_of_alt_texts(tmp_path):
    data = encoded(picture(4))
    samples = [
        sample("a", data, turns=["what is it?", "a dog"]), sample("b", data, turns=["what colour?", "red"]),
        sample("c", data, turns=["What is it", "A dog."]), sample("d", data, text="a dog"), sample("e", data, text="A dog. "),
        sample("f", data, text="a cat"), sample("g", text="only words"), sample("h", text="only  Words"), sample("i"),
        sample("j"),
    ]  # fmt: skip
    _, rows = run(tmp_path / "plain", samples)
    assert {k: r[:2] for k, r in rows.items() if r[0]} == {
        "c": ("a", "bytes"), "e": ("d", "bytes"), "f": ("d", "bytes"), "h": ("g", "text"),
    }  # fmt: skip
    _, rows = run(tmp_path / "same", samples, same_text=True)
    assert {k: r[0] for k, r in rows.items() if r[0]} == {"c": "a", "e": "d", "h": "g"}


def test_one_sample_a_wording_when_a_text_is_named(tmp_path):
    samples = [sample(key, encoded(picture(n))) for n, key in enumerate("abcde")] + [sample("f", encoded(picture(0)))]
    fused = {"a": "A house.", "b": "a  house", "c": "a tree", "d": "", "e": "", "f": "a tree"}
    _, rows = run(tmp_path, samples, fused=fused, text="fused")
    assert {k: r[:2] for k, r in rows.items() if r[0]} == {
        "b": ("a", "text"),
        "f": ("a", "bytes"),
    }  # c: f is not there to drop it


def test_all_images_of_a_sample_must_be_near_in_order(tmp_path):
    one, two, three = (picture(n) for n in (5, 6, 7))
    png, jpeg = encoded, lambda image: encoded(image, "JPEG", quality=50)
    samples = [sample("a", png(one), png(two)), sample("b", jpeg(one), jpeg(two)), sample("c", png(one), png(three)),
               sample("d", png(two), png(one)), sample("e", png(one)), sample("f", png(one), png(two))]  # fmt: skip
    _, rows = run(tmp_path, samples)
    assert {k: r[:2] for k, r in rows.items() if r[0]} == {"b": ("a", "near"), "f": ("a", "bytes")}


def test_damaged_images_have_a_reason_and_are_compared_by_bytes(tmp_path):
    broken = encoded(picture(8))[:60]
    samples = [sample("a", encoded(picture(8)))] + [
        Sample(key, {"images": [{"format": "png", "width": 9, "height": 9}]}, (broken,)) for key in "bc"
    ]
    ctx = context(tmp_path, dedup={})
    data = phash.run(ctx, dataset(tmp_path / "d", samples))
    assert data.layers["phash"].summary == {"failures": [["image cannot be decoded (OSError)", 2]]}
    rows = read_layer(dedup.run(ctx, data), "dedup")
    assert rows["c"]["of"] == "b" and rows["b"]["of"] is None and rows["a"]["of"] is None


def plant(rng, n, flips):
    """Hashes with families of likeness: chains, stars and equal ones, and their order of rank."""
    values = rng.integers(1, 1 << 63, n, dtype=np.uint64)
    for i in range(1, n):
        if rng.random() < 0.6:
            values[i] = values[rng.integers(0, i)]
            for bit in rng.choice(63, rng.integers(0, flips), replace=False):
                values[i] ^= np.uint64(1 << int(bit))
    return values


@pytest.mark.parametrize("seed", range(12))
def test_leaders_equal_a_plain_walk_over_all_pairs(tmp_path, seed):
    rng = np.random.default_rng(seed)
    n, distance = 160, int(rng.integers(0, 9))
    plain = plant(rng, n, 9)
    trimmed = np.where(rng.random(n) < 0.7, plain, plant(rng, n, 9))
    turns = np.where(rng.random(n) < 0.3, rng.integers(1, 3, n), 0)
    pixels = rng.integers(1, 4, n)
    keys = [f"k{i:03d}" for i in rng.permutation(n)]
    data = dataset(tmp_path / "d", [Sample(key, {"images": []}) for key in keys], 37)
    rows = {
        key: {"key": key, "plain": [int(plain[i])], "trimmed": [int(trimmed[i])], "mirrored": [0], "content": i + 1,
              "text": None, "turns": int(turns[i]) or None, "pixels": int(pixels[i])}
        for i, key in enumerate(keys)
    }  # fmt: skip
    ctx = context(tmp_path, dedup={"images": distance})
    data = seal_layer(ctx, data, "phash", params={}, version=1, schema=phash.SCHEMA, rows=rows)
    found = {key: row["of"] for key, row in read_layer(dedup.run(ctx, data), "dedup").items()}

    expected: dict[str, str | None] = {}
    for i in sorted(range(n), key=lambda i: (-pixels[i], keys[i])):
        for j in (
            k for k in sorted(range(n), key=lambda i: (-pixels[i], keys[i])) if expected.get(keys[k], "") is None
        ):
            bits = min((int(v[i]) ^ int(v[j])).bit_count() for v in (plain, trimmed))
            if bits <= distance and turns[i] == turns[j]:
                expected[keys[i]] = keys[j]
                break
        else:
            expected[keys[i]] = None
    assert found == expected and None in found.values()


def test_many_equal_and_many_alike_hashes_cost_no_pairs(tmp_path, monkeypatch):
    """A hundred thousand pictures that are all near each other: the first drops them all, whatever the block size."""
    n = 100_000
    rng = np.random.default_rng(0)
    base = np.uint64(0x5A5A_1234_5678_9ABC & ((1 << 63) - 1))
    low = rng.integers(0, 8, n, dtype=np.uint64)  # three bits at most apart
    compared = []
    near = dedup.Index._near
    monkeypatch.setattr(dedup.Index, "_near", lambda *a: compared.append(int((a[6] - a[5]).sum())) or near(*a))
    zeros = np.zeros(n, dtype=np.uint64)
    import pyarrow as pa

    empty = pa.array([[]] * n, pa.list_(pa.int64()))
    samples = dedup.Samples(
        base ^ low, base ^ low, empty, empty, np.ones(n, dtype=np.int64), np.arange(1, n + 1), zeros.view(np.int64), zeros,
        np.arange(n).astype(np.uint64), np.ones(n, dtype=bool),
    )  # fmt: skip
    of, kind, bits = dedup.duplicates(samples, 6, by_text=False)
    assert of[0] == -1 and (of[1:] == 0).all() and bits.max() <= 3 and set(kind[1:]) == {1}
    assert sum(compared) < 60 * n


def test_same_rows_under_any_sharding_and_repeated_keys_are_refused(tmp_path):
    pictures = [encoded(picture(n // 3), "JPEG", quality=40 + 20 * (n % 3)) for n in range(12)]
    samples = [sample(f"k{n}", data) for n, data in enumerate(pictures)]
    found = [run(tmp_path / str(size), samples[::step], per_shard=size)[1] for size, step in ((2, 1), (5, -1), (12, 1))]
    assert found[0] == found[1] == found[2] and sum(of is None for of, _, _ in found[0].values()) == 4
    with pytest.raises(DataError, match="key 'k0' stands in 2 shards"):
        run(tmp_path / "twice", [samples[0], samples[0]], per_shard=1)


def test_nothing_is_added_when_the_recipe_asks_for_nothing(tmp_path):
    data = dataset(tmp_path / "d", [sample("a", encoded(picture(1)))])
    assert dedup.run(context(tmp_path), phash.run(context(tmp_path), data)) is data


def test_documents_that_share_a_page_are_looked_up_by_another(tmp_path, monkeypatch):
    """Two thousand documents with one cover: their second pages tell them apart without comparing all pairs."""
    n = 2000
    pages = np.random.default_rng(1).integers(1, 1 << 63, n)
    keys = [f"k{i:04d}" for i in range(n)]
    data = dataset(tmp_path / "d", [Sample(key, {"images": []}) for key in keys], n)
    rows = {
        key: {"key": key, "plain": [77, int(pages[i]), 77], "trimmed": [77, int(pages[i]), 77], "mirrored": [],
              "content": i + 1, "pixels": n - i}
        for i, key in enumerate(keys)
    }  # fmt: skip
    rows["k1999"]["plain"] = [77 ^ 3, int(pages[4]) ^ 1, 77 ^ 4]
    ctx = context(tmp_path, dedup={"images": 2})
    data = seal_layer(ctx, data, "phash", params={}, version=1, schema=phash.SCHEMA, rows=rows)
    compared = []
    near = dedup.Index._near
    monkeypatch.setattr(dedup.Index, "_near", lambda *a: compared.append(int((a[6] - a[5]).sum())) or near(*a))
    found = read_layer(dedup.run(ctx, data), "dedup")
    assert {key: row["of"] for key, row in found.items() if row["of"]} == {"k1999": "k0004"} and sum(compared) < 10 * n
