"""Sizes that a recipe gives to a random encoder or language model: every field must be one that the configuration has.

transformers keeps a field that it does not know and builds the model without it, so a misspelt `num_hidden_layers` would
train a model of another size without a word.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from vlmflow.errors import ModelError

if TYPE_CHECKING:
    from vlmflow.recipe.model import ModelSpec

# Read by transformers, or by the models themselves, although not every configuration class declares them.
EVERYWHERE = frozenset(
    [
        "model_type",
        "head_dim",
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
        "torch_dtype",
        "tie_word_embeddings",
        "use_cache",
        "auto_map",
        "attn_implementation",
        "_name_or_path",
    ]
)


def check(spec: ModelSpec) -> None:
    """Refuse sizes of random parts that transformers would pass over or cannot build a model from.

    Raises:
        ModelError: an unknown `model_type` or field, naming what is alike; sizes that do not divide.
    """
    from transformers import CLIPVisionConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in ("vision", "vision_ocr"):
        part = getattr(spec, name)
        if part.source is None:
            _check(CLIPVisionConfig, part.config or {}, f"model.{name}.config")
    fields = spec.language.config or {}
    if spec.language.source is None and "model_type" in fields:
        kind, known = str(fields["model_type"]), list(CONFIG_MAPPING.keys())
        if kind not in known:
            raise ModelError(
                f"model.language.config.model_type: transformers knows no '{kind}'{_alike(kind, known)} Causal language models are, "
                "for instance, qwen2, qwen3, llama and mistral"
            )
        _check(CONFIG_MAPPING[kind], fields, "model.language.config")


def _check(configuration: Any, fields: dict[str, Any], where: str) -> None:
    from dataclasses import fields as declared
    from dataclasses import is_dataclass

    from huggingface_hub.errors import StrictDataclassError

    if is_dataclass(configuration):
        names: Any = configuration
        known = {f.name for f in declared(names)} | set(names.attribute_map) | EVERYWHERE
        if strangers := sorted(set(fields) - known):
            raise ModelError(
                f"{where}.{strangers[0]}: {names.__name__} has no such field{_alike(strangers[0], sorted(known))} It would "
                "be passed over, and the model would get another size than you wrote. Correct or remove it"
            )
    try:
        built = configuration(**{name: value for name, value in fields.items() if name != "model_type"})
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise ModelError(f"{where}: {configuration.__name__} refuses these sizes: {cause}") from error
    heads, shared = getattr(built, "num_attention_heads", None), getattr(built, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise ModelError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {shared}, so query heads cannot share "
            "them evenly; change one of the two"
        )


def _alike(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{found[0]}'?" if found else "."
