"""Use a trained model: write text about images, and say how likely a given text is.

Curation captions and scores with it, evaluation answers benchmarks with it. Both calls give the same result whatever
the batch size: generation pads on the left and masks, scoring packs with isolated segments (`models.scoring`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from vlmflow.errors import DataError
from vlmflow.models import FAMILIES, load_model
from vlmflow.models.chat import END, Segment, render_caption, render_prompt
from vlmflow.models.family import special_id
from vlmflow.models.scoring import Encoded, Features, Score, score_packed, tile_digests

if TYPE_CHECKING:
    from PIL import Image

    from vlmflow.models.store import ModelRef

__all__ = ["VLM", "Generation", "Request", "Score", "ScoreRequest", "Scorer", "load", "prepared"]
WINDOW = 16  # batches whose requests are sorted by length together while writing
T = TypeVar("T")
R = TypeVar("R")


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


class Scorer(Protocol):
    """What captions and scores: a model of our families (`VLM`) or one of transformers' own (`models.scorers`)."""

    def prepare(self, request: Request | ScoreRequest, name: str = "") -> Any:
        """Tokens and tiles of a request, on the CPU, from any thread; ``nbytes`` tells its memory. Both calls below take
        it in place of the request. Raises DataError naming a request that the model cannot take."""

    def score(
        self, requests: Sequence[Any], batch_tokens: int = 4096, progress: Callable[[int], Any] | None = None
    ) -> list[Score]:
        """Negative log-likelihood of each target, in the order of the requests."""

    def generate(
        self,
        requests: Sequence[Any],
        max_new_tokens: int,
        batch: int = 64,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Generation]:
        """Greedy answers in the order of the requests."""


def load(ref_or_dir: ModelRef | str | Path, threads: int | None = None) -> Scorer:
    """Load a model from a store reference or a folder. `threads` sets torch's CPU threads for this process.

    A folder of one of our families gives a `VLM`, any other a scorer of `vlmflow.models.scorers`. With a GPU the model
    runs there in bf16, where results may differ between batch sizes in near ties.
    Raises ModelError when the folder is not a complete model.
    """
    import torch

    from vlmflow.models import scorers, store

    if threads:
        torch.set_num_threads(threads)
    folder = store.fetch(ref_or_dir) if isinstance(ref_or_dir, store.ModelRef) else Path(ref_or_dir)
    return scorers.load(folder)


def on_device(model: Any) -> Any:
    """The model on the GPU in 16 bits where there is one; as it is elsewhere."""
    import torch

    if torch.cuda.is_available():
        return model.to("cuda", torch.bfloat16 if model.dtype == torch.float32 else model.dtype)
    return model


class VLM:
    """A model of our families and its tokenizer in eval mode."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.family = FAMILIES[model.config.model_type]
        self.end = special_id(tokenizer, END)
        self._lock = Lock()

    @classmethod
    def load(cls, folder: Path) -> VLM:
        """From a model folder, on the GPU where there is one."""
        model, tokenizer = load_model(folder)
        return cls(on_device(model), tokenizer)

    def prepare(self, request: Request | ScoreRequest, name: str = "") -> Encoded:
        """See `Scorer.prepare`. `name` stands for the request in messages."""
        images = request.images
        if isinstance(request, Request):
            return self._encode(render_prompt(request.prompt, len(images), name), images)
        if not request.target.strip():
            raise DataError(f"sample '{name}': its text is empty; there is nothing to score")
        return self._encode(render_caption(request.target, len(images), "chat", request.prompt, name), images)

    def generate(
        self,
        requests: Sequence[Request | Encoded],
        max_new_tokens: int,
        batch: int = 64,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Generation]:
        """Greedy answers in the order of the requests. `progress(n)` is called after each batch of n.

        Raises DataError naming the request whose prompt spells an image token.
        """
        answers: dict[int, Generation] = {}
        for start in range(0, len(requests), WINDOW * batch):
            encoded = prepared(self, requests[start : start + WINDOW * batch], start)
            order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].ids), i))
            features = Features(self.model, encoded)
            for first in range(0, len(order), batch):
                some = order[first : first + batch]
                written = self._write([encoded[i] for i in some], features, max_new_tokens)
                answers |= dict(zip((start + i for i in some), written, strict=True))
                if progress:
                    progress(len(some))
        return [answers[i] for i in range(len(requests))]

    def _write(self, rows: list[Encoded], features: Features, max_new_tokens: int) -> Iterator[Generation]:
        import torch

        width = max(len(row.ids) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        attended = torch.zeros((len(rows), width), dtype=torch.long)
        for r, row in enumerate(rows):
            ids[r, width - len(row.ids) :] = torch.tensor(row.ids)
            attended[r, width - len(row.ids) :] = 1
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=attended.to(self.model.device),
                image_features=features.of(rows),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                suppress_tokens=[self.model.config.image_token_id],
                eos_token_id=self.end,
                pad_token_id=pad,
            )
        features.done(rows)
        for new in out[:, width:].tolist():
            stop = new.index(self.end) if self.end in new else -1
            kept = new if stop < 0 else new[:stop]
            text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            yield Generation(text, "length" if stop < 0 else "stop")

    def score(
        self,
        requests: Sequence[ScoreRequest | Encoded],
        batch_tokens: int = 4096,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Score]:
        """Negative log-likelihood of each target, in the order of the requests.

        Requests are packed up to `batch_tokens` tokens (a longer one goes alone). Raises DataError naming the request
        whose target is empty or spells an image token.
        """
        return score_packed(self.model, self.family, prepared(self, requests), batch_tokens, progress)

    def _encode(self, segments: list[Segment], images: Sequence[Image.Image]) -> Encoded:
        tiles = [self.family.tile(image, self.model.config) for image in images]
        with self._lock:  # to tokenise changes a setting of the tokenizer for a moment
            ids, mask = self.family.expand(segments, self.tokenizer, [len(t) for t in tiles], self.model.config)
        return Encoded(ids, mask, tiles, tile_digests(tiles))


def prepared(scorer: Scorer, requests: Sequence[Any], first: int = 0) -> list[Any]:
    """The requests as their scorer prepares them, in threads; those that are prepared already stay as they are.

    Raises DataError naming the number of the request, counted from `first`.
    """
    kinds = (Request, ScoreRequest)

    def one(pair: tuple[int, Any]) -> Any:
        return scorer.prepare(pair[1], f"request {pair[0]}") if isinstance(pair[1], kinds) else pair[1]

    return list(in_threads(one, enumerate(requests, first)))


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work` of each item, in order, by a thread a core and a few items ahead: Pillow, hashing and tokenising let others run."""
    threads = len(os.sched_getaffinity(0))
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
