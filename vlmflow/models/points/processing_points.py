"""Processor of POINTS: pictures to CATTY tiles, text with one placeholder per picture to ids. No torchvision.

The tile limits are saved with it (processor_config.json), so inference cuts pictures as training did.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from vlmflow.vision.catty import catty_tiles
from vlmflow.vision.rgb import to_rgb


class PointsProcessor(ProcessorMixin):
    """`processor(images=..., text=...)` -> input_ids, attention_mask, pixel_values (uint8 [T, tile, tile, 3]).

    Args:
        tokenizer: a fast tokenizer that knows `image_token`.
        tile, max_tiles: CATTY limits in pixels and tiles (thumbnail not counted).
        patch_size, shuffle: fix the visual tokens of a tile: (tile / patch_size / shuffle)^2.
    """

    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        tile: int = 336,
        max_tiles: int = 8,
        patch_size: int = 14,
        shuffle: int = 2,
        image_token: str = "<|image_pad|>",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.tile = tile
        self.max_tiles = max_tiles
        self.patch_size = patch_size
        self.shuffle = shuffle
        self.image_token = image_token
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {image_token}; POINTS marks the places of images with it")

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile."""
        return (self.tile // self.patch_size // self.shuffle) ** 2

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def tile_images(self, images: list[Image.Image]) -> list[np.ndarray]:
        """CATTY tiles of each picture, uint8 [t, tile, tile, 3]."""
        return [catty_tiles(image, self.tile, self.max_tiles) for image in images]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        add_special_tokens: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode prompts; pictures are taken in reading order over the whole batch, nested lists are flattened.

        Rows are padded on the left, ready for `generate`. Raises ValueError when the number of image tokens in the
        texts differs from the number of pictures.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = [_open(image) for image in _flatten(images)]
        places = sum(item.count(self.image_token) for item in texts)
        if texts and places != len(pictures):
            raise ValueError(
                f"the text holds {places} {self.image_token} placeholders but {len(pictures)} images were given; "
                "write one placeholder per image (apply_chat_template does)"
            )
        tiles = self.tile_images(pictures)
        data: dict[str, Any] = {}
        if texts:
            counts = iter([len(t) * self.tokens_per_tile for t in tiles])
            rows = []
            for item in texts:
                parts = item.split(self.image_token)
                pieces = [parts[0]]
                for part in parts[1:]:
                    pieces += [self.image_token * next(counts), part]
                rows.append("".join(pieces))
            kwargs = {k: v for k, v in kwargs.items() if k in ("max_length", "truncation", "pad_to_multiple_of")}
            if kwargs.get("truncation"):
                raise ValueError("truncation could cut inside an image; shorten the text instead")
            data |= self.tokenizer(
                rows, add_special_tokens=add_special_tokens, padding=padding, padding_side="left", **kwargs
            )
        if tiles:
            data["pixel_values"] = np.concatenate(tiles)
        if return_tensors == "pt":
            data = {name: torch.as_tensor(value) for name, value in data.items() if name != "token_type_ids"}
            return BatchFeature(data)
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As usual, but text that spells a special token is refused instead of becoming one (prompt injection).

        Raises ValueError naming the token.
        """
        specials = list(self.tokenizer.get_added_vocab())
        for value in _texts(conversation):
            for token in specials:
                if token in value:
                    raise ValueError(f"a message contains the special token {token}; remove it from the text")
        return super().apply_chat_template(conversation, *args, **kwargs)


def _flatten(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in _flatten(item)]
    return [images]


def _open(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, str):
        with Image.open(image) as opened:
            return to_rgb(opened)
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    return Image.fromarray(array.astype(np.uint8)).convert("RGB")


def _texts(node: Any) -> list[str]:
    """Texts of a conversation: values under `content` and `text`."""
    if isinstance(node, (list, tuple)):
        return [value for item in node for value in _texts(item)]
    if isinstance(node, dict):
        found = []
        for name in ("content", "text"):
            value = node.get(name)
            found += [value] if isinstance(value, str) else _texts(value)
        return found
    return []


__all__ = ["PointsProcessor"]
