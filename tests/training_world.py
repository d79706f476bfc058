"""A tiny world for training tests: a byte tokenizer, a POINTS model of a few thousand parameters, one small dataset."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmflow import recipe as recipes
from vlmflow.dataset.manifest import Manifest, ShardRef
from vlmflow.dataset.sample import Sample
from vlmflow.dataset.shard import describe_shard, write_shard
from vlmflow.models.store import ModelLineage, ModelRef, publish
from vlmflow.recipe.mixture import DataUse
from vlmflow.step import Context
from vlmflow.training.flops import CostModel
from vlmflow.training.plan import Plan
from vlmflow.training.planner import make_plan
from vlmflow.training.pool import Examples, ShardUse, Visual

STAGE: dict[str, Any] = {
    "prompt": "chat",
    "instructions": ["describe", "what is it?"],
    "data": [{"dataset": "seed", "text": "alt"}],
    "train": [{"modules": "projector", "lr": 0.01}, {"modules": "language", "lr": 0.01}],
    "optimizer": {"weight_decay": 0.01},
    "epochs": 1,
    "budget": {"tokens": 128, "tiles": 8},
    "packs": 2,
    "dtype": "fp32",
    "checkpoint": {"every": 3, "keep": 2},
}


def recipe(**stage: Any) -> recipes.Recipe:
    """A recipe with one stage ``sft``; keywords replace fields of the stage."""
    vision = {
        "config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "patch_size": 14,
        }
    }
    language = {
        "model_type": "qwen2",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return recipes.parse(
        {
            "version": 1,
            "name": "tiny",
            "seed": 5,
            "model": {
                "family": "points",
                "vision": vision,
                "vision_ocr": vision,
                "language": {"config": language},
                "tokenizer": {"train_vocab": 300, "train_on": ["seed"]},
                "tiling": {"tile": 28, "max_tiles": 2},
            },
            "data": {"seed": {"sources": {"a": {"table": "file:///none.csv"}, "b": {"table": "file:///none.csv"}}}},
            "stages": {"sft": {**STAGE, **stage}},
            "registry": {"model": "tiny", "experiment": "tiny"},
        }
    )


def tokenizer() -> Any:
    """A byte-level tokenizer with the template's special tokens; trained on nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|image_pad|>"]})
    return made


def context(root: Path, made: recipes.Recipe) -> Context:
    return Context(made, root=str(root), scratch=root / "scratch", run_id="test")


def initial(ctx: Context) -> ModelRef:
    """A random model, published."""
    from vlmflow import models

    tokens = tokenizer()
    folder = Path(ctx.scratch) / "initial"
    model = models.family("points").build(ctx.recipe.model, tokens, 3)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return publish(ctx, folder, "initial", ModelLineage(step="initial"), "initial")


def picture(number: int, width: int = 28, height: int = 28) -> bytes:
    """A noisy picture that depends on its number."""
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sample(number: int, images: int = 1, text: str | None = None, **meta: Any) -> Sample:
    """A sample with ``images`` pictures of alternating shape and a caption whose length varies."""
    width = 28 if number % 3 else 56
    about = {"sha256": "", "width": width, "height": 28, "format": "png"}
    caption = "abcdefghij "[: 3 + number % 7] * (1 + number % 3) if text is None else text
    return Sample(
        f"k{number:03d}",
        {"id": str(number), "source": "a", "text": caption, "images": [about] * images, **meta},
        tuple(picture(number, width) for _ in range(images)),
    )


def dataset(root: Path, samples: list[Sample], shard_size: int = 12, name: str = "seed") -> Manifest:
    """Samples as shards under ``root`` and their manifest."""
    folder = root / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for start in range(0, len(samples), shard_size):
        part = samples[start : start + shard_size]
        path = folder / f"{name}-{start:05d}.tar"
        write_shard(path, part)
        shards.append(describe_shard(path, f"file://{path}", len(part), part[0].meta["source"]))
    return Manifest(name=name, shards=shards)


TILE_TOKENS = 10


def examples(
    drawn: list[tuple[int, int]], shards: int = 3, texts: str = "alt", uses: list[DataUse] | None = None
) -> Examples:
    """Examples for plans without data: (text tokens, images of two tiles) each, in shards of equal size and two sources."""
    n = len(drawn)
    uses = uses or [DataUse(dataset="seed", text=texts)]  # type: ignore[arg-type]
    images = np.array([i for _, i in drawn], dtype=np.int64)
    end = np.array([t for t, _ in drawn], dtype=np.int64)
    arrays = {
        "use": np.arange(n) % len(uses),
        "shard": np.arange(n, dtype=np.int64) * shards // max(1, n),
        "row": np.arange(n),
        "unit_start": np.arange(n + 1),
        "begin": np.zeros(n, dtype=np.int64),
        "end": end,
        "targets": np.maximum(1, end // 3),
        "images": images,
        "image_start": np.concatenate([[0], np.cumsum(images)]),
        "size": np.zeros(int(images.sum()), dtype=np.int64),
        "sizes": np.array([[28, 28]]),
    }
    entries = [
        ShardUse(
            use=0,
            dataset="seed",
            shard=ShardRef(uri=f"file:///{i}", sha256=f"{i:064d}", bytes=1, samples=n, source="ab"[i % 2]),
        )
        for i in range(shards)
    ]
    report = {"examples": n, "seen": n, "filtered": 0, "failed": 0, "reasons": []}
    return Examples(uses, entries, arrays, report)


def talks(drawn: list[list[tuple[int, int]]]) -> Examples:
    """Conversations: for each round its (text tokens, new images of two tiles); every round has one target token."""
    made = examples([(1, sum(images for _, images in talk)) for talk in drawn], texts="conversations")
    lengths = [np.cumsum([tokens for tokens, _ in talk]) for talk in drawn]
    made.arrays |= {
        "unit_start": np.concatenate([[0], np.cumsum([len(talk) for talk in drawn])]),
        "begin": np.concatenate(
            [end - [tokens for tokens, _ in talk] for end, talk in zip(lengths, drawn, strict=True)]
        ),
        "end": np.concatenate(lengths),
        "targets": np.concatenate([np.arange(1, len(talk) + 1) for talk in drawn]),
        "images": np.concatenate([np.cumsum([images for _, images in talk]) for talk in drawn]),
    }
    return made


VISUAL = Visual(TILE_TOKENS, 2, lambda width, height, most: most)
COST = CostModel(per_token=1.0, per_tile=5.0)


def plan_of(made: Examples, seed: int = 0, **stage: Any) -> Plan:
    """Plan of the tiny recipe's stage with some fields replaced."""
    return make_plan(made, recipe(**stage).stages["sft"], seed, VISUAL, COST)
