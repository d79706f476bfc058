"""A tiny POINTS model and packed batches, for the tests of the model family."""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image

from vlmflow.models import FAMILIES, register
from vlmflow.models import tokenizer as tokenizers
from vlmflow.models.chat import render_caption
from vlmflow.recipe.model import ModelSpec

FAMILY = FAMILIES["points"]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
}
LANGUAGE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
TEXTS = ["a red digit seven on grey paper", "naïve café 12345, déjà vu!", "你好 world\n\tand tabs", "the lazy dog"]


def spec(model_type: str = "qwen2", tie: bool = True, **changes) -> ModelSpec:
    """A recipe's model section with tiny random parts."""
    fields = {
        "vision": {"config": VISION},
        "vision_ocr": {"config": VISION},
        "language": {"config": {"model_type": model_type, "tie_word_embeddings": tie, **LANGUAGE}},
        "tokenizer": {"train_vocab": 320, "train_on": ["seed"]},
        "tiling": {"tile": 56, "max_tiles": 3},
    }
    return ModelSpec(**{**fields, **changes})


@functools.cache
def tokenizer():
    return tokenizers.train(TEXTS * 3, 320)


def build(model_type: str = "qwen2", tie: bool = True, seed: int = 3, attention: str = "vlmflow_varlen"):
    register()
    model = FAMILY.build(spec(model_type, tie), tokenizer(), seed)
    model.set_attn_implementation(attention)
    return model


def picture(seed: int, width: int = 70, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def samples(config, count: int = 5) -> list[dict]:
    """Samples of different lengths: ids, labels and tiles; the third has no image."""
    made = []
    for i in range(count):
        images = [] if i == 2 else [picture(i, 40 + 30 * i, 60)]
        tiles = [FAMILY.tile(image, config) for image in images]
        segments = render_caption(" ".join(TEXTS[: 1 + i % 4]), len(images), "chat", "describe " * (1 + i))
        ids, mask = FAMILY.expand(segments, tokenizer(), [len(t) for t in tiles], config)
        made.append({"ids": ids, "labels": FAMILY.labels(ids, mask), "tiles": tiles})
    return made


def pack(parts: list[dict]) -> dict:
    """The packed forward's arguments for these samples."""
    lengths = [len(part["ids"]) for part in parts]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    tiles = [tile for part in parts for tile in part["tiles"]]
    return {
        "input_ids": torch.tensor([[token for part in parts for token in part["ids"]]]),
        "position_ids": torch.from_numpy(np.concatenate([FAMILY.positions(part["ids"]) for part in parts]))[None],
        "labels": torch.from_numpy(np.concatenate([part["labels"] for part in parts]))[None],
        "pixel_values": torch.from_numpy(np.concatenate(tiles)) if tiles else None,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }
