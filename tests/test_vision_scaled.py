"""JPEGs decoded at the scale that tiling needs: same tiles of nearly the same pixels, from a smaller picture."""

import io

import numpy as np
import pytest
from PIL import Image

from vlmflow.errors import DataError
from vlmflow.models.points.family import POINTS
from vlmflow.vision.catty import catty_pixels, catty_tiles
from vlmflow.vision.image import decode, decode_scaled


def photo(width, height, seed=0):
    """Smooth in large, with some grain: what photographs are to a JPEG encoder."""
    chance = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells, weight in ((3, 1.0), (12, 0.5), (48, 0.2)):
        noise = Image.fromarray(chance.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight * np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray(np.clip(total / 1.7, 0, 255).astype(np.uint8))


def jpeg(image, orientation=None):
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(buffer, "JPEG", quality=90, exif=exif)
    return buffer.getvalue()


def least(tile, max_tiles):
    return lambda width, height: catty_pixels(width, height, tile, max_tiles)


@pytest.mark.parametrize(
    ("size", "tile", "max_tiles", "scale"),
    [
        ((851, 641), 56, 4, 8),
        ((640, 480), 112, 2, 4),
        ((640, 480), 224, 2, 2),
        ((640, 480), 336, 8, 1),
        ((900, 100), 28, 4, 2),
        ((640, 480), 224, 1, 2),
    ],
)
def test_tiles_are_those_of_the_whole_picture(size, tile, max_tiles, scale):
    data = jpeg(photo(*size))
    scaled = decode_scaled(data, least(tile, max_tiles))
    assert scaled.size == size
    assert scaled.image.size == tuple(-(-side // scale) for side in size)
    whole = catty_tiles(decode(data), tile, max_tiles)
    found = catty_tiles(scaled.image, tile, max_tiles, scaled.size)
    assert found.shape == whole.shape
    difference = np.abs(found.astype(int) - whole)
    assert (difference.max() == 0) if scale == 1 else (difference.mean() < 4.0 and difference.max() < 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_upright_and_measured_upright(orientation):
    data = jpeg(photo(400, 240), orientation)
    scaled = decode_scaled(data, lambda width, height: (width // 2, height // 2))
    whole = decode(data)
    assert scaled.size == whole.size == ((400, 240) if orientation < 5 else (240, 400))
    assert scaled.image.size == (whole.width // 2, whole.height // 2)
    small = np.asarray(whole.resize(scaled.image.size, Image.Resampling.BOX), dtype=int)
    assert np.abs(np.asarray(scaled.image, dtype=int) - small).mean() < 2.0


def test_a_picture_is_never_smaller_than_asked_for():
    data = jpeg(photo(333, 250))
    for wanted in ((333, 250), (200, 10), (167, 125), (166, 125), (84, 63), (83, 62), (42, 31), (41, 31), (1, 1)):
        found = decode_scaled(data, lambda *_, wanted=wanted: wanted).image.size
        assert found[0] >= wanted[0] and found[1] >= wanted[1]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_formats_are_decoded_whole(kind):
    buffer = io.BytesIO()
    photo(100, 80).save(buffer, kind)
    scaled = decode_scaled(buffer.getvalue(), lambda *_: (1, 1))
    assert scaled.size == scaled.image.size == (100, 80)
    assert np.array_equal(np.asarray(scaled.image), np.asarray(decode(buffer.getvalue())))


def test_limits_and_damage_are_found_as_in_whole_decoding():
    data = jpeg(photo(400, 240))
    with pytest.raises(DataError, match="400x240 = 96000 pixels, over the limit of 95999"):
        decode_scaled(data, lambda *_: (1, 1), 95_999)
    with pytest.raises(DataError, match="truncated"):
        decode_scaled(data[: len(data) // 2], lambda *_: (1, 1))
    with pytest.raises(DataError, match="empty"):
        decode_scaled(b"", lambda *_: (1, 1))


def test_the_family_says_what_its_tiles_are_cut_from():
    tiling = {"tile": 336, "max_tiles": 8}
    assert POINTS.pixels_for(4000, 3000, tiling) == (896, 672)
    assert POINTS.pixels_for(5000, 300, tiling) == (2688, 336), "also where an extreme ratio is mended"
    image = photo(500, 375)
    assert POINTS.tile(image, tiling, (4000, 3000)).shape[0] == POINTS.tiles_for(4000, 3000, tiling)


@pytest.mark.parametrize(("how", "side"), [("whole", (800, 600)), ("scaled", (200, 150))])
def test_training_decodes_as_its_stage_says(monkeypatch, how, side):
    from types import SimpleNamespace

    from vlmflow.training.trainer import Trainer

    seen = []
    family = SimpleNamespace(
        pixels_for=POINTS.pixels_for,
        tile=lambda image, tiling, size: (seen.append((image.size, size)), POINTS.tile(image, tiling, size))[1],
    )
    trainer = SimpleNamespace(family=family, side=112, stage=SimpleNamespace(decode=how))
    tiles = Trainer.tile(trainer, jpeg(photo(800, 600)), 1)
    assert seen == [(side, (800, 600))]
    assert len(tiles) == POINTS.tiles_for(800, 600, {"tile": 112, "max_tiles": 1})
