"""Use a trained model: write text about images, and say how likely a given text is.

Curation captions and scores with it, evaluation answers benchmarks with it. Both calls give the same result whatever
the batch size: generation pads on the left and masks, scoring packs with isolated segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmflow.errors import DataError
from vlmflow.models import FAMILIES, load_model
from vlmflow.models.chat import END, Segment, render_caption, render_prompt
from vlmflow.models.family import special_id

if TYPE_CHECKING:
    from PIL import Image

    from vlmflow.models.store import ModelRef

TILES_PER_PASS = 64  # encoder tiles per forward of a scoring pack; bounds memory beside batch_tokens


@dataclass(frozen=True)
class Request:
    """Something to write: images (RGB, any size) and the user's words."""

    images: list[Image.Image]
    prompt: str


@dataclass(frozen=True)
class Generation:
    """What was written; `finish` is "stop" (end token) or "length" (max_new_tokens reached)."""

    text: str
    finish: str


@dataclass(frozen=True)
class ScoreRequest:
    """A text to score as the assistant's answer to images and prompt."""

    images: list[Image.Image]
    prompt: str
    target: str


@dataclass(frozen=True)
class Score:
    """`nll`: nats summed over `tokens` = the target's tokens and the end token (points.md 5). ppl = exp(nll/tokens)."""

    nll: float
    tokens: int


@dataclass(frozen=True)
class _Encoded:
    index: int
    ids: list[int]
    mask: list[bool]
    tiles: list[np.ndarray]

    @property
    def tile_count(self) -> int:
        return sum(len(tiles) for tiles in self.tiles)


def load(ref_or_dir: ModelRef | str | Path, threads: int | None = None) -> VLM:
    """Load a model from a store reference or a folder. `threads` sets torch's CPU threads for this process.

    With a GPU the model runs there in bf16, where results may differ between batch sizes in near ties.
    Raises ModelError when the folder is not a complete model.
    """
    import torch

    from vlmflow.models import store

    if threads:
        torch.set_num_threads(threads)
    folder = store.fetch(ref_or_dir) if isinstance(ref_or_dir, store.ModelRef) else Path(ref_or_dir)
    model, tokenizer = load_model(folder)
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16 if model.dtype == torch.float32 else model.dtype)
    return VLM(model, tokenizer)


class VLM:
    """A model and its tokenizer in eval mode."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.family = FAMILIES[model.config.model_type]
        self.end = special_id(tokenizer, END)

    def generate(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        batch: int = 64,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Generation]:
        """Greedy answers in the order of the requests. `progress(n)` is called after each batch of n.

        Raises DataError naming the request whose prompt spells an image token.
        """
        import torch

        encoded = [
            self._encode(i, render_prompt(request.prompt, len(request.images), f"request {i}"), request.images)
            for i, request in enumerate(requests)
        ]
        encoded.sort(key=lambda item: (len(item.ids), item.index))
        answers: dict[int, Generation] = {}
        device = self.model.device
        for start in range(0, len(encoded), batch):
            rows = encoded[start : start + batch]
            width = max(len(row.ids) for row in rows)
            pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end
            ids = torch.full((len(rows), width), pad, dtype=torch.long)
            attended = torch.zeros((len(rows), width), dtype=torch.long)
            for r, row in enumerate(rows):
                ids[r, width - len(row.ids) :] = torch.tensor(row.ids)
                attended[r, width - len(row.ids) :] = 1
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids.to(device),
                    attention_mask=attended.to(device),
                    pixel_values=self._pixels(rows),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    suppress_tokens=[self.model.config.image_token_id],
                    eos_token_id=self.end,
                    pad_token_id=pad,
                )
            for row, new in zip(rows, out[:, width:].tolist(), strict=True):
                stop = new.index(self.end) if self.end in new else -1
                kept = new if stop < 0 else new[:stop]
                text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                answers[row.index] = Generation(text, "length" if stop < 0 else "stop")
            if progress:
                progress(len(rows))
        return [answers[i] for i in range(len(requests))]

    def score(
        self,
        requests: Sequence[ScoreRequest],
        batch_tokens: int = 2048,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Score]:
        """Negative log-likelihood of each target, in the order of the requests.

        Requests are packed up to `batch_tokens` tokens (a longer one goes alone). Raises DataError naming the request
        whose target is empty or spells an image token.
        """
        encoded = []
        for i, request in enumerate(requests):
            name = f"request {i}"
            if not request.target.strip():
                raise DataError(f"{name} has an empty target; there is nothing to score")
            segments = render_caption(request.target, len(request.images), "chat", request.prompt, name)
            encoded.append(self._encode(i, segments, request.images))
        scores: dict[int, Score] = {}
        for pack in _packs(encoded, batch_tokens):
            scores |= self._score_pack(pack)
            if progress:
                progress(len(pack))
        return [scores[i] for i in range(len(requests))]

    def _score_pack(self, pack: list[_Encoded]) -> dict[int, Score]:
        import torch

        device = self.model.device
        lengths = [len(item.ids) for item in pack]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        ids = torch.tensor([token for item in pack for token in item.ids])
        positions = torch.from_numpy(np.concatenate([self.family.positions(item.ids) for item in pack]))
        labels = np.concatenate([self.family.labels(item.ids, item.mask) for item in pack])
        rows = np.flatnonzero(labels[1:] != -100)
        cu_seq_lens = torch.from_numpy(bounds.astype(np.int32)).to(device)
        with torch.inference_mode():
            logits = self.model(
                input_ids=ids[None].to(device),
                position_ids=positions[None].to(device),
                pixel_values=self._pixels(pack),
                cu_seq_lens_q=cu_seq_lens,
                cu_seq_lens_k=cu_seq_lens,
                max_length_q=max(lengths),
                max_length_k=max(lengths),
                use_cache=False,
                logits_to_keep=torch.from_numpy(rows).to(device),
            ).logits[0]
            values = torch.from_numpy(labels[1:][rows]).to(device)
            nll = torch.nn.functional.cross_entropy(logits.float(), values, reduction="none").double().cpu().numpy()
        owner = np.searchsorted(bounds, rows, side="right") - 1
        sums = np.bincount(owner, weights=nll, minlength=len(pack))
        counts = np.bincount(owner, minlength=len(pack))
        return {item.index: Score(float(sums[i]), int(counts[i])) for i, item in enumerate(pack)}

    def _encode(self, index: int, segments: list[Segment], images: Sequence[Image.Image]) -> _Encoded:
        tiles = [self.family.tile(image, self.model.config) for image in images]
        ids, mask = self.family.expand(segments, self.tokenizer, [len(t) for t in tiles], self.model.config)
        return _Encoded(index, ids, mask, tiles)

    def _pixels(self, rows: Sequence[_Encoded]) -> Any:
        import torch

        tiles = [array for row in rows for array in row.tiles]
        return torch.from_numpy(np.concatenate(tiles)).to(self.model.device) if tiles else None


def _packs(encoded: Sequence[_Encoded], batch_tokens: int) -> Iterator[list[_Encoded]]:
    """Consecutive requests, cut where a pack would pass the token or tile budget."""
    pack: list[_Encoded] = []
    tokens = tiles = 0
    for item in encoded:
        over = tokens + len(item.ids) > batch_tokens or tiles + item.tile_count > TILES_PER_PASS
        if pack and over:
            yield pack
            pack, tokens, tiles = [], 0, 0
        pack.append(item)
        tokens += len(item.ids)
        tiles += item.tile_count
    if pack:
        yield pack
