"""Perceptual hashes: what changes them and what does not, and the search for near ones against all pairs."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from vlmflow.errors import DataError
from vlmflow.vision import phash
from vlmflow.vision.near import Index, blocks, near


def picture(seed: int, size=(480, 360)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def apart(a: int, b: int) -> int:
    return (a ^ b).bit_count()


@pytest.mark.parametrize("seed", range(4))
def test_copies_stay_near_and_borders_and_mirrors_are_seen_through(seed):
    image = picture(seed)
    plain, trimmed, mirrored = phash.hashes(image)
    assert plain == trimmed and plain < 1 << 63
    jpeg = encoded(image, "JPEG", quality=30)
    for copy in (
        Image.open(io.BytesIO(jpeg)), image.resize((160, 120)), ImageEnhance.Brightness(image).enhance(0.8),
        image.convert("L"), image.resize((960, 720), Image.Resampling.LANCZOS),
    ):  # fmt: skip
        assert apart(plain, phash.hashes(copy)[0]) <= 6
    assert apart(phash.of_bytes(jpeg)[0], phash.hashes(Image.open(io.BytesIO(jpeg)))[0]) <= 2  # decoded small
    boxed = phash.of_bytes(encoded(ImageOps.expand(image, (0, 60), "white"), "JPEG", quality=60))
    assert apart(plain, boxed[0]) > 6 and apart(plain, boxed[1]) <= 6
    flipped = phash.hashes(ImageOps.mirror(image))
    assert flipped[0] == mirrored and flipped[2] == plain and apart(plain, mirrored) > 6


def test_different_pictures_are_far_apart():
    hashes = [phash.hashes(picture(seed, (120, 90)))[0] for seed in range(60)]
    assert min(apart(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) >= 12


def test_orientation_is_applied_also_when_decoded_small():
    image = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter
    turned = encoded(image, "JPEG", quality=90, exif=exif)
    assert apart(phash.of_bytes(turned)[0], phash.hashes(image.transpose(Image.Transpose.ROTATE_270))[0]) <= 6


def test_flat_pictures_have_no_hash_and_a_border_that_is_the_picture_is_not_cut():
    assert phash.hashes(Image.new("RGB", (90, 70), "red")) == (phash.FLAT,) * 3
    dot = Image.new("L", (100, 100), 255)
    dot.paste(0, (45, 45, 55, 55))
    plain, trimmed, _ = phash.hashes(dot)
    assert plain == trimmed != phash.FLAT
    assert phash.trim(np.asarray(ImageOps.expand(picture(1).convert("L"), (30, 0), 7))).shape == (360, 480)


def test_broken_and_enormous_bytes_are_refused_with_a_reason():
    data = encoded(picture(1), "JPEG")
    for broken in (b"", b"GIF89a", data[:200]):
        with pytest.raises(DataError):
            phash.of_bytes(broken)
    with pytest.raises(DataError, match="over the limit of 1000"):
        phash.of_bytes(data, max_pixels=1000)


def flipped(rng, values, most):
    out = values.copy()
    for i in range(len(out)):
        for bit in rng.choice(64, rng.integers(0, most + 1), replace=False):
            out[i] ^= np.uint64(1 << int(bit))
    return out


@pytest.mark.parametrize("distance", range(17))
def test_near_finds_every_pair_and_no_other(distance):
    rng = np.random.default_rng(distance)
    a = rng.integers(0, 1 << 64, 250, dtype=np.uint64)
    b = flipped(rng, np.concatenate([a, a]), distance + 2)
    bits = np.bitwise_count(a[:, None] ^ b[None])
    expected = np.nonzero(bits <= distance)
    i, j, found = near(a, b, distance)
    assert len(i) > 100 and (i == expected[0]).all() and (j == expected[1]).all() and (found == bits[expected]).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=30),
    st.lists(st.tuples(st.integers(0, 29), st.lists(st.integers(0, 63), max_size=9), st.integers(0, 2)), max_size=40),
    st.integers(0, 16),
)
def test_later_pairs_of_a_group_equal_all_pairs(values, copies, distance):
    pairs = [(v, 0) for v in values]
    for source, bits, group in copies:
        if values:
            changed = values[source % len(values)]
            for bit in bits:
                changed ^= 1 << bit
            pairs.append((changed, group))
    hashes = np.array([v for v, _ in pairs], dtype=np.uint64)
    index = Index(hashes, distance, np.array([g for _, g in pairs], dtype=np.uint64))
    positions = np.arange(len(pairs))[::2]
    query, found, bits = index.later(positions)
    expected = [
        (q, j) for q, i in enumerate(positions.tolist()) for j in range(i + 1, len(pairs))
        if pairs[i][1] == pairs[j][1] and apart(pairs[i][0], pairs[j][0]) <= distance
    ]  # fmt: skip
    assert list(zip(query.tolist(), found.tolist(), strict=True)) == expected
    assert all(b == apart(pairs[positions[q]][0], pairs[j][0]) for q, j, b in zip(query, found, bits, strict=True))


def test_one_bit_at_every_place_and_the_bounds():
    base = np.uint64(0x0123_4567_89AB_CDEF)
    ones = np.array([base ^ np.uint64(1 << bit) for bit in range(64)])
    assert len(near(np.array([base]), ones, 1)[0]) == 64 and len(near(np.array([base]), ones, 0)[0]) == 0
    assert len(near(ones, ones, 2)[0]) == 64 * 64
    assert len(near(ones[:0], ones, 6)[0]) == 0 and len(near(ones, ones[:0], 6)[0]) == 0
    with pytest.raises(ValueError, match="distance 17"):
        near(ones, ones, 17)


def test_blocks_keep_to_the_budget_or_hold_one():
    costs = np.array([3, 3, 9, 0, 0, 1, 4, 4])
    parts = list(blocks(costs, 6))
    assert [(p.start, p.stop) for p in parts] == [(0, 2), (2, 3), (3, 7), (7, 8)]
