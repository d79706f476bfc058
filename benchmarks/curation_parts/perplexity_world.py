"""The scorers and samples of `curation.py perplexity`, made from a seed: one set for every contender."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "please generate a caption for this image."


@dataclass(frozen=True)
class World:
    """A scorer's shape and what it scores.

    Attributes:
        vision, language: transformers config fields (POINTS: two such encoders, one such language model).
        samples, caption: how many, and mean length of a caption in tokens (log-normal, one token a character).
        pictures: longest side of an image in pixels; 0 = texts without images.
        padded: whether padded batches with full logits are tried; under a large vocabulary they take more memory than a
            laptop has (16 x 450 x 151,936 logits are 4.4 GB, several times).
    """

    name: str
    vision: dict[str, Any]
    language: dict[str, Any]
    tile: int
    max_tiles: int
    samples: int
    caption: int
    pictures: int
    padded: bool = True
    spread: float = 0.6
    dtype: str = "fp32"
    device: str = "cpu"
    seed: int = 17


_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
_LANGUAGE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 4096}  # fmt: skip
# The vocabulary of Qwen2, which POINTS' released models and the official script's scorer have.
TINY = World(
    name="tiny scorer, Qwen2's vocabulary (151,936)", vision=_VISION, language={**_LANGUAGE, "vocab_size": 151936},
    tile=112, max_tiles=16, samples=64, caption=46, pictures=640, padded=False,
)  # fmt: skip
TINY_32K = World(
    name="tiny scorer, vocabulary of 32,000", vision=_VISION, language={**_LANGUAGE, "vocab_size": 32000},
    tile=112, max_tiles=16, samples=128, caption=46, pictures=640,
)  # fmt: skip
# Spec 5.2's model and captions: about 29.6 M parameters, vocabulary of 32k, no image.
TEXT = World(
    name="29.6 M language model, texts only",
    vision=_VISION,
    language={"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 5, "num_attention_heads": 8,
              "num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": 32000},
    tile=112, max_tiles=6, samples=200, caption=46, pictures=0,
)  # fmt: skip
# Qwen2-1.5B's language model with two CLIP ViT-L/14-336: 2.1 billion parameters.
TWO_B = World(
    name="2.1 B vision-language scorer",
    vision={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    language={"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
              "num_key_value_heads": 2, "max_position_embeddings": 32768, "vocab_size": 151936, "rope_theta": 1e6},
    tile=336, max_tiles=6, samples=256, caption=46, pictures=1300, dtype="bf16", device="cuda",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a contender is given: a loaded model in eval mode, its tokenizer and family, and the requests."""

    model: Any
    tokenizer: Any
    family: Any
    requests: list[Any]
    device: str


def build(folder: Path, world: World) -> dict[str, Any]:
    """Write model and world; returns what the table says of them."""
    import torch
    from training_peers.world import SIZES, recipe, tokenizer

    from vlmflow import models

    size = SIZES["tiny"].__class__(
        name=world.name, vision=world.vision, language=world.language, tile=world.tile, max_tiles=world.max_tiles,
        tokens=4096, tiles=64, packs=1, batch=1, rows=(1,), mean=1, spread=0, longest=1, pictures=1, dtype=world.dtype,
    )  # fmt: skip
    dtype = torch.bfloat16 if world.dtype == "bf16" else torch.float32
    tokens = tokenizer()
    model = models.family("points").build(recipe(size).model, tokens, world.seed, dtype)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    (folder / "world.json").write_text(json.dumps(asdict(world)))
    language = sum(p.numel() for p in model.model.language_model.parameters())
    return {"parameters": sum(p.numel() for p in model.parameters()), "language_parameters": language}


def load(folder: Path, attention: str = "sdpa") -> Work:
    """Model, tokenizer and requests, decoded; only scoring is compared."""
    from vlmflow.models import FAMILIES, load_model

    world = World(**json.loads((folder / "world.json").read_text()))
    model, tokens = load_model(folder, attention=attention)
    if world.device == "cuda":
        model = model.to("cuda")
    return Work(model, tokens, FAMILIES["points"], requests(world), world.device)


def requests(world: World) -> list[Any]:
    """Captions of drawn lengths, most under an image of several tiles."""
    from PIL import Image

    from vlmflow.models.inference import ScoreRequest

    random = np.random.default_rng(world.seed)
    made: list[Any] = []
    for _ in range(world.samples):
        images = []
        if world.pictures:
            width, height = (int(random.integers(world.pictures // 4, world.pictures)) for _ in range(2))
            noise = random.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(noise).resize((width, height)).save(buffer, "JPEG", quality=85)
            images = [Image.open(buffer).convert("RGB")]
        length = int(
            np.clip(world.caption * np.exp(world.spread * random.standard_normal() - world.spread**2 / 2), 4, 2000)
        )
        letters = "".join(random.choice(list("etaoin shrdlu "), size=length))
        made.append(ScoreRequest(images, PROMPT, f"x{letters[1:-1]}x"))
    return made
