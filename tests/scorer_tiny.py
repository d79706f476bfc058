"""Tiny random models of transformers' own families with tokenizer, processor and chat template, saved as plain folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from vlmflow.models import tokenizer as tokenizers

TEXTS = ["a red digit seven on grey paper", "naïve café 12345, déjà vu!", "the lazy dog", "lot 12, model XJ-900"]
TEXT = {
    "vocab_size": 400, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2, "rms_norm_eps": 1e-6,
}  # fmt: skip
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
# Idefics3's: a begin token in the template, roles in capitals, its own end token. LLaVA's: no end token at all.
IDEFICS = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %} {{ c['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _tokenizer(extra: list[str], **named: str) -> PreTrainedTokenizerFast:
    made = tokenizers.train(TEXTS * 3, 320)
    made.add_special_tokens({"additional_special_tokens": extra})
    for name, value in named.items():
        made.init_kwargs[name] = value
    return made


def qwen2_vl(folder: Path) -> Path:
    """Qwen2-VL: M-RoPE, patches of any number, a system prompt that the template adds."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokens = _tokenizer(["<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
    tokens.chat_template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    ids = {f"{name}_token_id": tokens.convert_tokens_to_ids(f"<|{word}|>") for name, word in
           (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end"))}  # fmt: skip
    config = Qwen2VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8},
        **ids,
    )
    pictures = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=64 * 64)
    return _save(folder, Qwen2VLForConditionalGeneration, config, tokens, pictures)


def internvl(folder: Path) -> Path:
    """InternVL: tiles and a thumbnail, context tokens."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
             "video_token": "<video>"}  # fmt: skip
    tokens = _tokenizer(list(names.values()))
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=tokens.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=names,
    )
    tokens.chat_template = CHATML.replace("IMAGE", "<IMG_CONTEXT>\n")
    config = InternVLConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": [32, 32], "patch_size": [8, 8]},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4, downsample_ratio=0.5,
    )  # fmt: skip
    pictures = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    return _save(folder, InternVLForConditionalGeneration, config, tokens, pictures, {"image_seq_length": 4})


def idefics3(folder: Path) -> Path:
    """Idefics3: rows and columns of tiles with a global picture, tensors padded per sample."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokens = _tokenizer([*marks, *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))])
    tokens.chat_template = IDEFICS
    config = Idefics3Config(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **TEXT, "pad_token_id": 0}, scale_factor=2,
        image_token_id=tokens.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    return _save(folder, Idefics3ForConditionalGeneration, config, tokens, pictures, {"image_seq_len": 4})


def llava(folder: Path) -> Path:
    """LLaVA: CLIP and Llama, a template without an end token."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokens = _tokenizer(["<image>"])
    tokens.chat_template = LLAVA
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
                       "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        text_config={"model_type": "llama", **TEXT}, image_seq_length=16,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    pictures = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return _save(folder, LlavaForConditionalGeneration, config, tokens, pictures, settings)


def _save(folder: Path, kind, config, tokens, pictures, settings: dict | None = None) -> Path:
    import json

    torch.manual_seed(5)
    kind(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    pictures.save_pretrained(folder)
    if settings:
        (folder / "processor_config.json").write_text(json.dumps(settings))
    return folder


MODELS = {made.__name__: made for made in (qwen2_vl, internvl, idefics3, llava)}
