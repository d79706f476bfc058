"""Put a POINTS model together: encoders, projector and language model, each from a source or at random.

A source is a model folder or hub id: a CLIP (vision or full) checkpoint for an encoder, any causal language model for
the language part. The parts are assembled on a model made on the meta device, so a large one exists once in memory.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionModel

from vlmflow.errors import ModelError
from vlmflow.models import config_fields
from vlmflow.models.points.configuration_points import PointsConfig, _text, _vision
from vlmflow.models.points.modeling_points import PointsForConditionalGeneration, PointsProjector, trim_tower


def compose(model: Any, tokenizer: Any, image_token_id: int, seed: int, dtype: torch.dtype | None) -> Any:
    """See `vlmflow.models.points.family.build`."""
    config_fields.check(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        side = model.tiling.tile
        remote = bool(getattr(model, "trust_remote_code", False))
        general = _encoder(model.vision, side, dtype, "model.vision")
        ocr = _encoder(model.vision_ocr, side, dtype, "model.vision_ocr")
        language = _language(model.language, tokenizer, dtype, remote)
        head = language.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ModelError("model.language: this language model's head has a bias; POINTS' head has none")
        try:
            config = PointsConfig(
                vision_config=general.config,
                vision_ocr_config=ocr.config,
                text_config=language.config,
                ocr_weight=model.ocr_weight,
                tile=side,
                max_tiles=model.tiling.max_tiles,
                image_token_id=image_token_id,
            )
        except ValueError as error:
            raise ModelError(str(error)) from error
        projector = _projector(config, language.dtype)
        with torch.device("meta"):
            whole = PointsForConditionalGeneration(copy.deepcopy(config))
        whole.model.vision_tower = trim_tower(general).to(language.dtype)
        whole.model.vision_tower_ocr = trim_tower(ocr).to(language.dtype)
        whole.model.multi_modal_projector = projector
        whole.model.language_model = language.base_model
        whole.lm_head = head
        whole.tie_weights()
        _share_configs(whole)
    left = [name for name, tensor in whole.state_dict().items() if tensor.is_meta]
    if left:
        raise ModelError(f"POINTS: {len(left)} tensors have no weights after assembly, e.g. {left[0]}")
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    whole.config.dtype = language.dtype
    whole.generation_config.eos_token_id = eos
    whole.generation_config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    whole.generation_config.do_sample = False
    # A placeholder that the model itself wrote would have no image; an untrained model does write it.
    whole.generation_config.suppress_tokens = [image_token_id]
    return whole.eval()


def _encoder(part: Any, side: int, dtype: torch.dtype | None, where: str) -> Any:
    if part.source:
        try:
            loaded: Any = CLIPVisionModel.from_pretrained(
                part.source, revision=part.revision, dtype=dtype or "auto", output_loading_info=True, **part.config
            )
            tower, info = loaded
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{where}.source: cannot read a CLIP vision model from '{part.source}': {error}"
            ) from error
        if info["missing_keys"]:
            some = sorted(info["missing_keys"])
            raise ModelError(
                f"{where}.source: '{part.source}' lacks {len(some)} weights of a CLIP vision model, e.g. {some[0]}; "
                "they would be random"
            )
        return tower
    try:
        fresh: Any = CLIPVisionModel(_vision(dict(part.config or {}), side))
        return fresh.to(dtype=dtype or torch.float32)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}.config: not a CLIP vision configuration: {error}") from error


def _language(part: Any, tokenizer: Any, dtype: torch.dtype | None, remote: bool) -> Any:
    size = len(tokenizer)
    if part.source:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                part.source,
                revision=part.revision,
                dtype=dtype or "auto",
                trust_remote_code=remote,
                output_loading_info=True,
                **part.config,
            )
            model, info = loaded
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"model.language.source: cannot read a causal language model from '{part.source}': {error}"
            ) from error
        if info["missing_keys"]:
            some = sorted(info["missing_keys"])
            raise ModelError(f"model.language.source: '{part.source}' lacks {len(some)} weights, e.g. {some[0]}")
        if size > model.config.vocab_size:
            model.resize_token_embeddings(size)
        return model
    fields = dict(part.config or {})
    if "model_type" not in fields:
        raise ModelError("model.language: give a source, or a config with model_type (for instance qwen2)")
    fields.setdefault("vocab_size", size)
    if fields["vocab_size"] < size:
        raise ModelError(
            f"model.language.config: vocab_size is {fields['vocab_size']} but the tokenizer has {size} tokens; "
            "leave vocab_size out or raise it"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    try:
        config = _text(fields)
        return AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"model.language.config: not a configuration of a causal language model: {error}") from error


def _projector(config: PointsConfig, dtype: torch.dtype) -> nn.Module:
    """Fresh projector: normal weights at 0.02 (transformers' usual), zero biases."""
    projector = PointsProjector(config)
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return projector.to(dtype)


def _share_configs(whole: PointsForConditionalGeneration) -> None:
    """The parts and the whole must hold the same configuration objects, or settings would reach only one of them."""
    config = whole.config
    config.vision_config = whole.model.vision_tower.config
    config.vision_ocr_config = whole.model.vision_tower_ocr.config
    config.text_config = whole.model.language_model.config
    assert whole.model.config is config
