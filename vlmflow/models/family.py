"""What the rest of vlmflow knows about a model family: a handful of pure functions and a table of names.

Nothing outside `vlmflow.models` knows a family by name; training, curation and evaluation call these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmflow.errors import DataError, ModelError
from vlmflow.models.chat import Segment

IGNORED = -100


@dataclass(frozen=True)
class Family:
    """Functions and names of one family.

    Attributes:
        tile: (image, tiling, size=None) -> uint8 [t, S, S, 3]; `size` is the whole picture's (width, height) when the
            image was decoded at a smaller scale. `tiling` is anything with `.tile` and `.max_tiles` (a recipe's
            `model.tiling` or a model's config) or a dict of them.
        tiles_for: (width, height, tiling) -> t, from the size alone; equals len(tile(image)).
        pixels_for: (width, height, tiling) -> (width, height) that tiles are cut from; no image need be larger.
        tokens_per_tile: config -> visual tokens of a tile.
        expand: (segments, tokenizer, tile_counts, config) -> (ids, target mask).
        positions: ids -> position ids; 1-D [N] for ordinary RoPE.
        labels: (ids, mask) -> labels, -100 outside targets, not shifted; the first token is never a target.
        build: (recipe.model, tokenizer, seed) -> PreTrainedModel on the CPU.
        roles: role -> regexes of parameter names (re.match).
        unused: regexes of parameters that never get a gradient.
        numbered: role -> regex whose first group is the layer number.
        language: module that reads `inputs_embeds`, text and image features together.
    """

    name: str
    tile: Callable[..., np.ndarray]
    tiles_for: Callable[..., int]
    pixels_for: Callable[..., tuple[int, int]]
    tokens_per_tile: Callable[[Any], int]
    expand: Callable[..., tuple[list[int], list[bool]]]
    positions: Callable[[Sequence[int]], np.ndarray]
    labels: Callable[[Sequence[int], Sequence[bool]], np.ndarray]
    build: Callable[..., Any]
    roles: dict[str, list[str]]
    unused: list[str] = field(default_factory=list)
    numbered: dict[str, str] = field(default_factory=dict)
    language: str = ""

    def layers(self, role: str) -> str:
        """Regex with the layer number as its first group, for `last: n`. Raises ModelError for a role without layers."""
        if role not in self.numbered:
            raise ModelError(
                f"role '{role}' of family '{self.name}' has no numbered layers, so `last` means nothing there; "
                f"roles with layers: {', '.join(sorted(self.numbered))}"
            )
        return self.numbered[role]


def limits(tiling: Any) -> tuple[int, int]:
    """(tile side in pixels, most tiles) of a recipe's tiling, a config or a dict."""
    if isinstance(tiling, dict):
        return int(tiling["tile"]), int(tiling["max_tiles"])
    return int(tiling.tile), int(tiling.max_tiles)


def tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of plain texts: special tokens that a text spells out stay ordinary characters."""
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def special_id(tokenizer: Any, token: str) -> int:
    """Id of a special token. Raises ModelError when the tokenizer does not know it."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == getattr(tokenizer, "unk_token_id", None):
        raise ModelError(f"the tokenizer has no token {token}; prepare it with vlmflow.models.tokenizer.prepare")
    return int(found)


def expand_runs(
    segments: Sequence[Segment], tokenizer: Any, tile_counts: Sequence[int], image_id: int, tokens_per_tile: int
) -> tuple[list[int], list[bool]]:
    """Segments to (ids, target mask); an image becomes tokens_per_tile * tiles placeholders.

    Neighbouring plain texts with the same target flag are tokenised as one, as a chat template would.
    Raises DataError when a segment names an image that has no tile count, or an image goes unused.
    """
    pieces: list[tuple[str, Any, bool]] = []  # (kind, value, target)
    used = 0
    for segment in segments:
        if segment.image is not None:
            if not 0 <= segment.image < len(tile_counts):
                raise DataError(
                    f"a segment names image {segment.image} but tile counts were given for {len(tile_counts)} images"
                )
            used += 1
            pieces.append(("image", tile_counts[segment.image] * tokens_per_tile, segment.target))
        elif segment.special:
            pieces.append(("special", segment.text, segment.target))
        elif segment.text:
            if pieces and pieces[-1][0] == "text" and pieces[-1][2] == segment.target:
                pieces[-1] = ("text", pieces[-1][1] + segment.text, segment.target)
            else:
                pieces.append(("text", segment.text, segment.target))
    if used != len(tile_counts):
        raise DataError(f"{len(tile_counts)} images were tiled but the segments show {used} of them")
    texts = iter(tokenize(tokenizer, [value for kind, value, _ in pieces if kind == "text"]))
    ids: list[int] = []
    mask: list[bool] = []
    for kind, value, target in pieces:
        if kind == "image":
            new = [image_id] * value
        else:
            new = next(texts) if kind == "text" else [special_id(tokenizer, value)]
        ids += new
        mask += [target] * len(new)
    return ids, mask


def sequential_positions(ids: Sequence[int]) -> np.ndarray:
    """0, 1, 2, ... int64 [N]."""
    return np.arange(len(ids), dtype=np.int64)


def masked_labels(ids: Sequence[int] | np.ndarray, mask: Sequence[bool] | np.ndarray) -> np.ndarray:
    """ids where the mask holds, else -100; int64 [N], not shifted. The first token follows nothing: never a target."""
    labels = np.where(np.asarray(mask, dtype=bool), np.asarray(ids, dtype=np.int64), IGNORED)
    labels[:1] = IGNORED
    return labels
