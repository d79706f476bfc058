"""The benchmark's model, samples and recipe: one set for every contender, made from a seed.

Lengths follow training.md C.1: mean about 162 tokens with a long tail (log-normal), three samples in four with images.
The tokenizer has one token a character, so lengths are exact and the head stays small beside the layers.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmflow import models
from vlmflow import recipe as recipes
from vlmflow.dataset.manifest import Manifest
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import ShardReader, describe_shard, write_shard
from vlmflow.models import tokenizer as tokenizers
from vlmflow.models.chat import render
from vlmflow.models.store import ModelLineage, ModelRef, publish
from vlmflow.step import Context
from vlmflow.vision.image import decode


@dataclass(frozen=True)
class Size:
    """A size of the whole comparison.

    Attributes:
        vision, language: transformers config fields; two equal vision towers are built (POINTS).
        tokens, tiles, packs: our pack budget and packs a step; ``tokens * packs`` is about ``batch`` mean samples.
        batch: samples of an optimizer step of every padded contender, so that all take steps of equal token counts.
        mean, spread, longest: of the log-normal token lengths.
        pictures: longest side of an image in pixels.
    """

    name: str
    vision: dict[str, Any]
    language: dict[str, Any]
    tile: int
    max_tiles: int
    tokens: int
    tiles: int
    packs: int
    batch: int
    rows: tuple[int, ...]
    mean: float
    spread: float
    longest: int
    pictures: int
    dtype: str = "fp32"
    samples: int = 64
    seed: int = 17
    extra: dict[str, Any] = field(default_factory=dict)


TINY = Size(
    name="tiny",
    vision={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2},
    language={"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 4096},
    tile=112, max_tiles=3, tokens=2592, tiles=160, packs=1, batch=16, rows=(4, 8, 16),
    mean=162, spread=0.67, longest=1024, pictures=336,
)  # fmt: skip
QUICK = replace(
    TINY, name="quick", samples=16, tokens=648, batch=4, rows=(4,), longest=400,
    language={**TINY.language, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
)  # fmt: skip
# Qwen2-1.5B's language model with two CLIP ViT-L/14-336: 2.1 billion parameters, random.
TWO_B = Size(
    name="2b",
    vision={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    language={"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
              "num_key_value_heads": 2, "max_position_embeddings": 32768, "vocab_size": 151936,
              "tie_word_embeddings": True, "rope_theta": 1e6},
    tile=336, max_tiles=4, tokens=8192, tiles=64, packs=1, batch=10, rows=(2, 5, 10),
    mean=820, spread=0.67, longest=4096, pictures=900, dtype="bf16", samples=256,
)  # fmt: skip
SIZES = {size.name: size for size in (TINY, QUICK, TWO_B)}
INSTRUCTION = "Describe it."


def tokenizer() -> Any:
    """One token a byte; the template's special tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(kinds.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|image_pad|>"]})
    return tokenizers.prepare(made)


def recipe(size: Size, **stage: Any) -> recipes.Recipe:
    """A recipe whose stage ``sft`` trains projector and language model on these samples; keywords change the stage."""
    vision = {"config": {**size.vision, "patch_size": 14}}
    return recipes.parse(
        {
            "version": 1,
            "name": "benchmark",
            "seed": size.seed,
            "model": {
                "family": "points",
                "vision": vision,
                "vision_ocr": vision,
                "language": {"config": {"model_type": "qwen2", "tie_word_embeddings": True, **size.language}},
                "tokenizer": {"train_vocab": 300, "train_on": ["mixed"]},
                "tiling": {"tile": size.tile, "max_tiles": size.max_tiles},
            },
            "data": {"mixed": {"sources": {"a": {"table": "file:///none.csv"}}}},
            "stages": {
                "sft": {
                    "prompt": "chat",
                    "instructions": [INSTRUCTION],
                    "data": [{"dataset": "mixed", "text": "alt"}],
                    "train": [{"modules": "projector", "lr": 1e-4}, {"modules": "language", "lr": 1e-4}],
                    "schedule": {"name": "constant", "warmup": 0.0},
                    "epochs": 1000,
                    "budget": {"tokens": size.tokens, "tiles": size.tiles},
                    "packs": size.packs,
                    "dtype": size.dtype,
                    "checkpoint": {"every": 1_000_000},
                    **stage,
                }
            },
            "registry": {"model": "benchmark", "experiment": "benchmark"},
        }
    )


def context(folder: Path, made: recipes.Recipe) -> Context:
    return Context(made, root=f"file://{folder}/store", scratch=folder / "scratch", run_id="benchmark")


def samples(size: Size, spec: Any) -> list[Sample]:
    """Mixed samples: noise pictures of several shapes, and texts that fill each sample up to its drawn length."""
    random = np.random.default_rng(size.seed)
    family = models.family("points")
    per_tile = (size.tile // 14 // 2) ** 2
    scale = size.mean / np.exp(size.spread**2 / 2)
    made = []
    for number in range(size.samples):
        length = int(np.clip(scale * np.exp(size.spread * random.standard_normal()), 48, size.longest))
        count = int(random.choice(3, p=(0.25, 0.6, 0.15)))
        pictures, about, visual = [], [], 0
        for _ in range(count):
            width, height = (int(random.integers(size.pictures // 3, size.pictures)) for _ in range(2))
            tokens = per_tile * family.tiles_for(width, height, spec.tiling)
            if visual + tokens > length - 40:
                continue
            visual += tokens
            pixels = random.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG", quality=85)
            pictures.append(buffer.getvalue())
            about.append({"sha256": "", "width": width, "height": height, "format": "jpeg"})
        letters = random.choice(list("etaoin shrdlu "), size=max(4, length - visual - 36))
        text = "x" + "".join(letters)[1:-1] + "x"
        meta = {"id": str(number), "source": "a", "text": text, "images": about}
        made.append(Sample(f"s{number:05d}", meta, tuple(pictures)))
    return made


def build(folder: Path, size: Size) -> tuple[ModelRef, Manifest]:
    """Model and shards on disk, once for all contenders."""
    made = recipe(size)
    ctx = context(folder, made)
    tokens = tokenizer()
    start = folder / "start"
    import torch

    dtype = torch.bfloat16 if size.dtype == "bf16" else torch.float32
    model = models.family("points").build(made.model, tokens, size.seed, dtype)
    model.save_pretrained(start)
    tokens.save_pretrained(start)
    ref = publish(ctx, start, "start", ModelLineage(step="initial"), "start")
    shards, part = [], 64
    everything = samples(size, made.model)
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    for first in range(0, len(everything), part):
        path = folder / "shards" / f"mixed-{first:05d}.tar"
        write_shard(path, everything[first : first + part])
        shards.append(describe_shard(path, f"file://{path}", len(everything[first : first + part]), "a"))
    manifest = Manifest(name="mixed", shards=shards)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    (folder / "model.json").write_text(ref.model_dump_json())
    return ref, manifest


@dataclass
class Row:
    """One sample ready for a model: ids [n], labels [n] (-100 outside targets, unshifted), tiles uint8 [t, S, S, 3]."""

    ids: np.ndarray
    labels: np.ndarray
    tiles: np.ndarray
    images: int


def rows(folder: Path, size: Size, config: Any) -> list[Row]:
    """All samples decoded and tokenised in memory, for contenders whose data path is not what is compared."""
    family, tokens = models.family("points"), tokenizer()
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    found = []
    for shard in manifest.shards:
        for sample in ShardReader(shard):
            count = len(sample.images)
            tiles = [family.tile(decode(data), config) for data in sample.images]
            segments = render(
                None, "chat", text=sample.meta["text"], instruction=INSTRUCTION, images=count, key=sample.key
            )
            ids, mask = family.expand(segments, tokens, [len(t) for t in tiles], config)
            blank = np.zeros((0, size.tile, size.tile, 3), dtype=np.uint8)
            found.append(
                Row(np.asarray(ids), family.labels(ids, mask), np.concatenate([blank, *tiles]), len(sample.images))
            )
    return found
