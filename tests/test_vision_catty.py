"""CATTY against the test vectors and edge cases of points.md 1.2."""

import numpy as np
import pytest
from PIL import Image

from vlmflow.vision.catty import catty_count, catty_plan, catty_tiles

# input, grid, resized, stride (None: a single window), tokens at 144 a tile
VECTORS = [
    ((336, 336), (1, 1), (336, 336), (None, None), 288),
    ((672, 672), (2, 2), (672, 672), (336, 336), 720),
    ((1000, 1000), (2, 2), (672, 672), (336, 336), 720),
    ((1000, 1001), (2, 3), (672, 672), (336, 168), 1008),
    ((640, 480), (3, 2), (896, 672), (280, 336), 1008),
    ((768, 1024), (2, 3), (672, 896), (336, 280), 1008),
    ((1920, 1080), (4, 2), (1194, 672), (286, 336), 1296),
    ((2480, 3508), (2, 3), (672, 950), (336, 307), 1008),
    ((500, 333), (2, 1), (504, 336), (168, None), 432),
    ((336, 672), (1, 2), (336, 672), (None, 336), 432),
    ((2000, 251), (8, 1), (2677, 336), (334, None), 1296),
    ((5000, 300), (8, 1), (2688, 336), (336, None), 1296),
    ((300, 5000), (1, 8), (336, 2688), (None, 336), 1296),
]


@pytest.mark.parametrize(("size", "grid", "resized", "stride", "tokens"), VECTORS)
def test_vectors(size, grid, resized, stride, tokens):
    plan = catty_plan(*size)
    assert (plan.columns, plan.rows) == grid
    assert plan.resized == resized
    assert plan.stride == tuple(336 if value is None else value for value in stride)
    assert plan.tiles * 144 == tokens
    assert catty_count(*size) == plan.tiles


@pytest.mark.parametrize(
    ("size", "grid", "resized"),
    [((100, 101), (2, 3), (672, 678)), ((50, 50), (1, 1), (336, 336)), ((28, 224), (1, 8), (336, 2688))],
)
def test_small_images(size, grid, resized):
    plan = catty_plan(*size)
    assert (plan.columns, plan.rows) == grid
    assert plan.resized == resized


def test_square_switches_to_four_windows_above_531_pixels():
    assert catty_plan(531, 531).tiles == 2
    assert catty_plan(532, 532).tiles == 5


def test_extreme_ratio_shrinks_only_the_long_side():
    assert catty_plan(5000, 300).shrunk == (2400, 300)
    assert catty_plan(300, 5000).shrunk == (300, 2400)
    assert catty_plan(2400, 300).shrunk == (2400, 300)


@pytest.mark.parametrize(("tile", "limit"), [(336, 8), (336, 12), (56, 4), (28, 1)])
def test_windows_cover_the_picture(tile, limit):
    """No gaps: strides never pass the tile, every window lies inside, at most a few pixels stay uncovered."""
    random = np.random.default_rng(0)
    for width, height in random.integers(1, 3000, size=(1500, 2)).tolist():
        plan = catty_plan(width, height, tile, limit)
        for side, count, stride in zip(plan.resized, (plan.columns, plan.rows), plan.stride, strict=True):
            assert side <= count * tile
            end = (count - 1) * stride + tile
            assert end <= side and side - end < max(count, 1)
            assert count == 1 or stride <= tile
            assert len(range(0, side - tile + 1, stride)) == count or count == 1
        assert plan.columns * plan.rows <= limit


def test_pixels_agree_with_the_plan():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (75, 120, 3), dtype=np.uint8))
    plan = catty_plan(120, 75, 56, 6)
    tiles = catty_tiles(image, 56, 6)
    assert tiles.shape == (plan.tiles, 56, 56, 3) and tiles.dtype == np.uint8
    resized = np.asarray(image.resize(plan.resized, Image.Resampling.BILINEAR))
    for index in range(plan.columns * plan.rows):
        top, left = index // plan.columns * plan.stride[1], index % plan.columns * plan.stride[0]
        assert np.array_equal(tiles[index], resized[top : top + 56, left : left + 56])
    thumbnail = Image.fromarray(resized).resize((56, 56), Image.Resampling.BILINEAR)
    assert np.array_equal(tiles[-1], np.asarray(thumbnail))


def test_nearly_square_with_few_tiles_keeps_one_window():
    """The reference grid is 1x2, but the picture is not one pixel taller than a tile: the loop makes one window."""
    plan = catty_plan(1000, 1001, 336, 4)
    assert (plan.columns, plan.rows, plan.resized) == (1, 1, (336, 336))
    assert len(catty_tiles(Image.new("RGB", (1000, 1001)), 336, 4)) == plan.tiles == 2


def test_single_window_gives_two_equal_tiles():
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    tiles = catty_tiles(image, 56, 1)
    assert len(tiles) == 2 and np.array_equal(tiles[0], tiles[1])


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (3, 2)])
def test_degenerate_sizes(size):
    assert len(catty_tiles(Image.new("RGB", size), 28, 4)) == catty_count(*size, 28, 4)


def test_wrong_arguments_name_the_numbers():
    with pytest.raises(ValueError, match="0x5"):
        catty_plan(0, 5)
    with pytest.raises(ValueError, match="max_tiles=0"):
        catty_plan(5, 5, 336, 0)
