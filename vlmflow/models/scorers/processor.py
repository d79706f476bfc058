"""A transformers processor for pictures and text, of any model's own class, the same on every machine.

transformers picks torchvision's image processors where torchvision is there, whose pixels differ a little from Pillow's, and
some processors cannot be made without it because of the videos that they would take as well. Here pictures always go
through Pillow and videos are left out.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from vlmflow.errors import ModelError


def load_processor(folder: Path) -> Any:
    """The processor of a model folder. Raises ModelError when a file is missing or the model takes no pictures."""
    import transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        pictures = AutoImageProcessor.from_pretrained(str(folder), backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{folder}: no tokenizer and image processor of transformers' own can be loaded: {error}"
        ) from error
    name = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise ModelError(
            f"{folder}: model type '{config.model_type}' has no processor in transformers, so it cannot be given pictures and a chat; "
            "name a vision-language model that AutoProcessor knows"
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder}: its tokenizer has no fast version (tokenizer.json), which tells where an answer begins"
        )
    kind = getattr(transformers, name)
    written, _ = kind.get_processor_dict(str(folder))
    known = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in written.items() if key in known and key not in kind.get_attributes()}
    settings["chat_template"] = settings.get("chat_template") or tokenizer.chat_template
    parts = {**dict.fromkeys(kind.get_attributes()), "tokenizer": tokenizer, "image_processor": pictures}

    class PicturesOnly(kind):  # type: ignore[misc, valid-type]
        """The model's processor without its video processor."""

        get_attributes = kind.get_attributes  # they are read from the signature of __init__, which is not repeated here

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return super().check_argument_for_proper_class(argument_name, argument) if argument is not None else None

    return PicturesOnly(**parts, **settings)
