"""POINTS as a family: CATTY tiling, plain RoPE, and how its parts are put together from sources or at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmflow.models.chat import IMAGE, Segment
from vlmflow.models.family import Family, expand_runs, limits, masked_labels, sequential_positions, special_id
from vlmflow.vision.catty import catty_count, catty_pixels, catty_tiles


def tile(image: Image.Image, tiling: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """CATTY tiles, uint8 [t, S, S, 3], thumbnail last."""
    return catty_tiles(image, *limits(tiling), size)


def pixels_for(width: int, height: int, tiling: Any) -> tuple[int, int]:
    """Size that tiles of an image of this size are cut from."""
    return catty_pixels(width, height, *limits(tiling))


def tiles_for(width: int, height: int, tiling: Any) -> int:
    """Number of tiles of an image of this size, thumbnail included."""
    return catty_count(width, height, *limits(tiling))


def tokens_per_tile(config: Any) -> int:
    """Visual tokens of one tile of this PointsConfig."""
    return config.tokens_per_tile


def expand(
    segments: Sequence[Segment], tokenizer: Any, tile_counts: Sequence[int], config: Any
) -> tuple[list[int], list[bool]]:
    """Segments to (ids, target mask); `tile_counts[i]` tiles stand for image i."""
    image_id = config.image_token_id
    return expand_runs(segments, tokenizer, tile_counts, image_id, config.tokens_per_tile)


def build(model: Any, tokenizer: Any, seed: int = 0, dtype: Any = None) -> Any:
    """A PointsForConditionalGeneration from a recipe's `model` section: each part from its source or at random.

    Same seed, same weights. Raises ModelError when parts do not fit (config) or the sources cannot be read.
    """
    from vlmflow.models.points.compose import compose

    return compose(model, tokenizer, special_id(tokenizer, IMAGE), seed, dtype)


POINTS = Family(
    name="points",
    tile=tile,
    tiles_for=tiles_for,
    pixels_for=pixels_for,
    tokens_per_tile=tokens_per_tile,
    expand=expand,
    positions=sequential_positions,
    labels=masked_labels,
    build=build,
    roles={
        "vision": [r"model\.vision_tower\."],
        "vision.ocr": [r"model\.vision_tower_ocr\."],
        "projector": [r"model\.multi_modal_projector\."],
        "language": [r"model\.language_model\.", r"lm_head\."],
    },
    unused=[],  # the layers that POINTS never reads are left out of the model (modeling_points._tower)
    numbered={
        "vision": r"model\.vision_tower\.encoder\.layers\.(\d+)\.",
        "vision.ocr": r"model\.vision_tower_ocr\.encoder\.layers\.(\d+)\.",
        "language": r"model\.language_model\.(?:layers|h|blocks)\.(\d+)\.",
    },
    language="model.language_model",
)
