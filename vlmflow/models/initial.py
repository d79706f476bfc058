"""The first model of a run: parts from their sources or at random, and a tokenizer that fits them.

Everything that decides the weights is in the key: the recipe's model section, the seed and, when a tokenizer is
trained, the digests of the datasets it reads. So the same recipe finds its initial model instead of making it again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmflow.digest import digest
from vlmflow.models import family, store

if TYPE_CHECKING:
    from vlmflow.dataset.manifest import Manifest
    from vlmflow.step import Context

STEP = "initial"
HEADERS = ("user\n", "assistant\n")
VERSION = 2  # raise when the same recipe would give other weights or another tokenizer


def run(ctx: Context, datasets: dict[str, Manifest]) -> store.ModelRef:
    """Build and publish the initial model; returns its reference (found again when it is already there).

    `datasets` must hold those of `model.tokenizer.train_on`. Raises ModelError when parts do not fit, DataError when
    a dataset is missing or has no text.
    """
    spec = ctx.recipe.model
    used = {name: _dataset(datasets, name).digest for name in spec.tokenizer.train_on} if _trains(spec) else {}
    params = {"model": spec.model_dump(mode="json"), "seed": ctx.recipe.seed, "tokenizer_data": used}
    key = f"{ctx.recipe.name}-{STEP}-{digest([STEP, VERSION, params])[:24]}"
    if (found := store.find(ctx, key)) is not None:
        return found
    tokenizer = _tokenizer(ctx, datasets)
    model = family(spec.family).build(spec, tokenizer, ctx.recipe.seed)
    ctx.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ctx.scratch) as folder:
        save(model, tokenizer, folder)
        weights = store.weights_digest(store.describe_files(folder))
        lineage = store.ModelLineage(step=STEP, params=params, ancestor=weights, data=sorted(used.values()))
        return store.publish(ctx, folder, f"{ctx.recipe.name}-{STEP}", lineage, key)


def save(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a complete Hugging Face folder: weights, configs, tokenizer, chat template, processor."""
    from vlmflow.models.points.processing_points import PointsProcessor

    config = model.config
    model.save_pretrained(str(folder))
    processor = PointsProcessor(
        tokenizer,
        tile=config.tile,
        max_tiles=config.max_tiles,
        patch_size=config.vision_config.patch_size,
        shuffle=config.shuffle,
    )
    processor.save_pretrained(str(folder))


def corpus(manifest: Manifest, scratch: Path | None = None) -> Iterator[str]:
    """Alt texts, conversation turns and preferred answers of a dataset, in order."""
    from vlmflow.dataset.shard import ShardReader

    for shard in manifest.shards:
        reader = ShardReader(shard, scratch=scratch)
        for key in reader.keys():
            meta = reader.meta(key)
            if meta.get("text"):
                yield str(meta["text"])
            pairs = meta.get("preferences") or []
            for turn in chain(meta.get("conversations") or [], *(pair["conversations"] for pair in pairs)):
                yield str(turn.get("value", "")).replace("<image>", "").strip()
            for pair in pairs:
                yield str(pair["chosen"])


def _trains(spec: Any) -> bool:
    return not spec.tokenizer.source and spec.tokenizer.train_vocab is not None


def _tokenizer(ctx: Context, datasets: dict[str, Manifest]) -> Any:
    from vlmflow.models import tokenizer as tokenizers

    spec = ctx.recipe.model
    vocab = spec.tokenizer.train_vocab
    if not spec.tokenizer.source and vocab is not None:
        texts = (text for name in spec.tokenizer.train_on for text in corpus(_dataset(datasets, name), ctx.scratch))
        # A chat is headers as much as texts: without them a trained tokenizer would spell out every role.
        return tokenizers.train((piece for text in texts for piece in (*HEADERS, text)), vocab)
    source = spec.tokenizer.source or spec.language.source
    assert source is not None  # the recipe was checked: a random language model names or trains a tokenizer
    revision = None if spec.tokenizer.source else spec.language.revision
    return tokenizers.pretrained(source, revision, spec.trust_remote_code)


def _dataset(datasets: dict[str, Manifest], name: str) -> Manifest:
    from vlmflow.errors import DataError

    if name not in datasets:
        raise DataError(
            f"model.tokenizer.train_on names dataset '{name}', but the step was given {sorted(datasets) or 'none'}"
        )
    return datasets[name]
