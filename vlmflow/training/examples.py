"""From a stored sample to the token sequences a model reads.

``KINDS`` says for each kind of text how a sample is rendered, whole or a stretch of it; nothing else knows them apart.
The length layer measures these renderings before training without decoding an image, the loader's `Encoder` repeats
them for one sample at a time, and both must agree: a pack is as long as the plan says, or an error names the sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlmflow.dataset.sample import Sample
from vlmflow.errors import DataError
from vlmflow.recipe.mixture import CURATED_TEXTS

if TYPE_CHECKING:
    from vlmflow.models.chat import Segment
    from vlmflow.models.family import Family
    from vlmflow.recipe.mixture import DataUse
    from vlmflow.recipe.stage import StageSpec
    from vlmflow.training.plan import Item

Row = dict[str, Any]
LAYER_TEXTS = CURATED_TEXTS


class Unusable(Exception):
    """A sample that cannot be trained on; the message is the reason it is counted under."""


class NoText(Unusable):
    """The layer ended without a text for this sample: an image without words, a caption its own step dropped.

    That is the layer's result, judged there by its own limit; here the sample is filtered out, and counted.
    """


class Part(NamedTuple):
    """One segment of a pack: ids int32 [n], target flags bool [n], tiles of each of its images.

    Its images are the first ``len(tiles)`` of the sample.
    """

    ids: NDArray[np.int32]
    target: NDArray[np.bool_]
    tiles: list[int]


@dataclass(frozen=True)
class Wording:
    """How samples of one ingredient are worded.

    Attributes:
        text: which text is learned (`DataUse.text`).
        style: ``continuation`` or ``chat``.
        instructions: of which one is drawn by (seed, key) for a caption in chat style.
    """

    text: str
    style: str
    instructions: tuple[str, ...]
    seed: int

    @classmethod
    def of(cls, use: DataUse, stage: StageSpec, seed: int) -> Wording:
        """The wording of an ingredient of a stage."""
        return cls(use.text, use.prompt or stage.prompt, tuple(stage.instructions), seed)

    def instruction(self, key: str) -> str:
        """The user's words before the caption of this sample."""
        if not self.instructions or self.style != "chat":
            return ""
        drawn = hashlib.sha256(f"{self.seed}:{key}".encode()).digest()[:8]
        return self.instructions[int.from_bytes(drawn, "big") % len(self.instructions)]


class Kind(NamedTuple):
    """One kind of text.

    Attributes:
        units: sample -> images that have been shown at the end of each unit (a caption, a round of a conversation, a
            pair of answers). A plan's item is a stretch of units.
        render: (sample, layer row, wording, first, last) -> segments of each part; -1, -1 = the whole sample.
        parts: segments of a pack that an item gives, each with the item's images, which are encoded once for all.
        joined: units follow each other in one sequence; else each unit is an item of its own.
        turns: units are the rounds of the conversation in ``sample.meta``.
        of: (sample, layer row) -> the sample that `units` and `render` see.
    """

    units: Callable[[Sample], list[int]]
    render: Callable[[Sample, Row | None, Wording, int, int], list[list[Segment]]]
    parts: int = 1
    joined: bool = True
    turns: bool = False
    of: Callable[[Sample, Row | None], Sample] = lambda sample, _: sample


def _images(sample: Sample) -> int:
    return len(sample.meta.get("images", []))


def _caption(sample: Sample, row: Row | None, wording: Wording, first: int, last: int) -> list[list[Segment]]:
    from vlmflow.models.chat import render_caption

    if row is not None and row.get("error"):
        raise NoText(f"{wording.text} failed: {row['error']}")
    text = (sample.meta.get("text") if wording.text == "alt" else (row or {}).get("text")) or ""
    if not text.strip():
        raise (Unusable if wording.text == "alt" else NoText)(f"no {wording.text} text")
    instruction = wording.instruction(sample.key)
    return [render_caption(text, _images(sample), wording.style, instruction, sample.key)]


def _turns(sample: Sample) -> list[dict[str, str]]:
    if not (turns := sample.meta.get("conversations")):
        raise DataError(
            f"sample '{sample.key}' has no conversations; give it a text field or choose another `text` in the stage"
        )
    return turns


def _rounds(sample: Sample) -> list[int]:
    from vlmflow.models.chat import count_markers, rounds

    turns = _turns(sample)
    shown = [count_markers(turns[a : b + 1], sample.key) for a, b in rounds(turns)]
    return np.cumsum(shown).tolist()


def _conversation(sample: Sample, row: Row | None, wording: Wording, first: int, last: int) -> list[list[Segment]]:
    """Rounds ``first`` to ``last``, the images of earlier rounds in front of them."""
    from vlmflow.models.chat import render_conversation, rounds

    turns = _turns(sample)
    if first < 0:
        return [render_conversation(turns, _images(sample), sample.key)]
    borders, shown = rounds(turns), _rounds(sample)
    before = shown[first - 1] if first else 0
    return [render_conversation(turns[borders[first][0] : borders[last][1] + 1], shown[last], sample.key, before)]


def _asked(sample: Sample, row: Row | None) -> Sample:
    """The questions and answers that a layer's row holds, as a conversation that begins with the sample's images."""
    from vlmflow.models.chat import MARKER

    if row is not None and row.get("error"):
        raise NoText(f"docqa failed: {row['error']}")
    if not (pairs := (row or {}).get("pairs")):
        raise NoText("no questions")
    turns = [
        {"from": who, "value": pair[part]} for pair in pairs for who, part in (("human", "question"), ("gpt", "answer"))
    ]
    turns[0] = {"from": "human", "value": f"{MARKER}\n" * _images(sample) + turns[0]["value"]}
    return Sample(sample.key, {**sample.meta, "conversations": turns}, sample.images)


def _pairs(sample: Sample) -> list[int]:
    from vlmflow.training.preference import pairs_in

    return [_images(sample)] * len(pairs_in(sample.meta, sample.key))


def _pair(sample: Sample, row: Row | None, wording: Wording, first: int, last: int) -> list[list[Segment]]:
    from vlmflow.training.preference import pairs_in, render_pair

    return list(render_pair(pairs_in(sample.meta, sample.key)[max(first, 0)], _images(sample), sample.key))


_CAPTION = Kind(lambda sample: [_images(sample)], _caption)
KINDS: dict[str, Kind] = {
    "alt": _CAPTION,
    **dict.fromkeys(LAYER_TEXTS, _CAPTION),
    "docqa": Kind(_rounds, _conversation, turns=True, of=_asked),
    "conversations": Kind(_rounds, _conversation, turns=True),
    "preferences": Kind(_pairs, _pair, parts=2, joined=False),
}


def render(sample: Sample, row: Row | None, wording: Wording, first: int = -1, last: int = -1) -> list[list[Segment]]:
    """Segments of each part of a sample, or of its units ``first`` to ``last``.

    Args:
        sample: key and meta; its image bytes are not needed.
        row: the sample's row in the layer that the text comes from, if it is one.

    Raises:
        NoText: the layer failed on it, or found no text.
        Unusable: alt text was asked for and there is none.
        DataError: from rendering: an empty answer, or image markers that do not match the images.
    """
    kind = KINDS[wording.text]
    return kind.render(kind.of(sample, row), row, wording, first, last)


class Encoder:
    """Renders, tokenises and expands one sample of a plan; ``encoder(item, sample, row) -> parts``.

    Args:
        uses: the stage's ingredients; ``item.use`` counts in them.
        config: the model's configuration; ``item.max_tiles`` replaces its limit of tiles.
    """

    def __init__(
        self, family: Family, tokenizer: Any, config: Any, stage: StageSpec, uses: list[DataUse], seed: int
    ) -> None:
        from vlmflow.models.family import limits

        self.family, self.tokenizer, self.config = family, tokenizer, config
        self.wordings = [Wording.of(use, stage, seed) for use in uses]
        self.side = limits(config)[0]

    def __call__(self, item: Item, sample: Sample, row: Row | None) -> list[Part]:
        """Raises DataError when the sample is not what the plan measured (names the sample and both counts)."""
        wording = self.wordings[item.use]
        try:
            rendered = render(sample, row, wording, item.first, item.last)
        except Unusable as problem:
            raise DataError(f"sample {sample.key}: {problem}, but the plan shows it; run the stage again") from problem
        about, kind = sample.meta.get("images", []), KINDS[wording.text]
        shown = kind.units(kind.of(sample, row))[item.last] if item.first >= 0 else len(about)
        tiling = {"tile": self.side, "max_tiles": item.max_tiles}
        tiles = [self.family.tiles_for(i["width"], i["height"], tiling) for i in about[:shown]]
        parts = []
        for segments in rendered:
            ids, target = self.family.expand(segments, self.tokenizer, tiles, self.config)
            parts.append(Part(np.asarray(ids, dtype=np.int32), np.asarray(target, dtype=bool), tiles))
        found = (sum(len(p.ids) for p in parts), sum(tiles))
        if found != (item.tokens, item.tiles):
            raise DataError(
                f"sample {sample.key} has {found[0]} tokens and {found[1]} tiles, but the plan was made for {item.tokens} tokens and "
                f"{item.tiles} tiles: its shard, its text layer or the tokenizer is not the one that was measured. Run the "
                "stage again; it measures what changed."
            )
        return parts
