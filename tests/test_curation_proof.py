"""A structure that is called whole is one that the decoder accepts: pictures are cut and damaged by the thousand."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image

from vlmflow.curation import proof
from vlmflow.curation.accept import Rejected, accept
from vlmflow.curation.decode_memory import DECODING, Budget, decode_bytes


def noise(mode: str, size=(61, 43)) -> Image.Image:
    image = Image.effect_noise(size, 80)
    return image.convert("I").convert("I;16") if mode == "I;16" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **settings)
    return out.getvalue()


JPEGS = [
    encoded(noise(mode), "JPEG", quality=80, **settings)
    for mode in ("RGB", "L", "CMYK")
    for settings in ({}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}, {"restart_marker_blocks": 3})
]
PNGS = [encoded(noise(mode, (31, 23)), "PNG") for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "I;16")]


def decodes(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception:  # Pillow raises nearly anything on damaged input
        return False
    return True


def damaged(data: bytes, rng: random.Random, head: int) -> bytes:
    """A copy that is cut, changed, shortened or stretched, mostly in its first `head` bytes."""
    copy, kind, end = bytearray(data), rng.random(), min(len(data), head)
    if kind < 0.2:
        return bytes(copy[: rng.randrange(4, len(copy))])
    if kind < 0.7:
        for _ in range(rng.choice((1, 1, 2, 4))):
            copy[rng.randrange(2, end)] = rng.randrange(256)
    elif kind < 0.8:
        start = rng.randrange(2, end)
        del copy[start : start + rng.randrange(1, 70)]
    elif kind < 0.9:
        start = rng.randrange(2, end)
        copy[start:start] = rng.randbytes(rng.randrange(1, 9))
    else:
        for _ in range(3):
            copy[rng.randrange(2, len(copy))] = rng.randrange(256)
    return bytes(copy)


def test_whole_pictures_are_seen_to_be_whole():
    assert all(map(proof.jpeg, JPEGS)) and all(map(proof.png, PNGS))
    assert proof.plain_jpeg(JPEGS[0]) == (61, 43, False)
    assert not proof.png(encoded(noise("RGB"), "PNG")[:-12]), "no end"


def test_no_damaged_jpeg_passes_that_the_decoder_refuses():
    rng = random.Random(5)
    passed = 0
    for _ in range(6000):
        data = damaged(rng.choice(JPEGS), rng, 720)
        found = proof.plain_jpeg(data)
        if found and found[0] * found[1] < 10_000_000:  # a header that promises more is refused before this matters
            passed += 1
            assert decodes(data), data.hex()
    assert passed > 1000, "the damage must leave some pictures readable, or this test shows nothing"


@pytest.mark.parametrize("data", JPEGS[:5] + PNGS[:2])
def test_every_cut_is_seen(data):
    check = proof.jpeg if data[0] == 0xFF else proof.png
    assert not any(check(data[:cut]) for cut in range(2, len(data)))


def test_every_flipped_bit_of_a_png_is_seen():
    rng = random.Random(6)
    for _ in range(3000):
        data = bytearray(rng.choice(PNGS))
        data[rng.randrange(8, len(data))] ^= 1 << rng.randrange(8)
        assert not proof.png(bytes(data))


def test_both_proofs_keep_the_same_pictures():
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = [*JPEGS, *PNGS, encoded(noise("RGB"), "JPEG", exif=turned), encoded(noise("RGB"), "PNG", exif=turned)]
    for data in pictures:
        found = accept(data, 10_000, proof="structure")
        assert found == accept(data, 10_000) and found.data == data
    assert (found.width, found.height) == (43, 61), "a PNG's orientation counts as well"
    for data in (JPEGS[0][:-2], JPEGS[1][:400], PNGS[0][:-30]):
        for way in ("decode", "structure"):
            with pytest.raises(Rejected, match="corrupt"):
                accept(data, 10_000, proof=way)


def test_pictures_that_no_decoder_may_take_on_are_refused_or_judged_by_structure(monkeypatch):
    monkeypatch.setattr(DECODING, "total", 5000)
    monkeypatch.setattr("vlmflow.curation.accept._LARGE", 1000)
    assert accept(JPEGS[1], 10_000).width == 61, "progressive: 2,623 pixels of coefficients are too many to decode"
    assert accept(PNGS[0], 10_000).width == 31
    with pytest.raises(Rejected, match=r"too_many_pixels.*takes 0 MiB to decode"):
        accept(encoded(noise("RGB"), "WEBP"), 10_000)
    with pytest.raises(Rejected, match="too_many_pixels"):
        accept(encoded(noise("L"), "GIF"), 10_000)


def test_decoders_share_their_memory():
    import threading

    budget, inside, most = Budget(10), [], []

    def work(size):
        with budget.share(size):
            inside.append(size)
            most.append(sum(min(s, 10) for s in inside))
            inside.remove(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in (3, 4, 5, 99, 1, 10) * 20]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(most) == 120 and max(most) <= 10


def test_what_a_decode_takes_is_known_from_the_header():
    with Image.open(io.BytesIO(encoded(noise("RGB", (800, 400)), "WEBP"))) as image:
        assert decode_bytes(image, "WEBP", None, False) == 800 * 400 * 16
    with Image.open(io.BytesIO(encoded(noise("RGB", (800, 400)), "JPEG"))) as image:
        assert decode_bytes(image, "JPEG", None, True) == 800 * 400 // 64 * 4
        assert decode_bytes(image, "JPEG", None, False) == 800 * 400 * 3 + 800 * 400 // 64 * 4
