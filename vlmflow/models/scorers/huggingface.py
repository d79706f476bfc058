"""Any vision-language model of transformers as captioner and scorer, through its own processor and forward.

POINTS' filter did best with Qwen2-VL and InternVL2 as scorers (points.md 5, table 2). Their position ids (M-RoPE), image
layouts and attention are theirs, so nothing is packed: samples go in batches of one padded length, padded on the right by
less than STEP tokens, with the model's own attention mask. A sample's shape depends on itself alone, and so does its
score, whatever stands beside it in the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmflow.errors import DataError, ModelError
from vlmflow.models.inference import Generation, Request, ScoreRequest, on_device, prepared
from vlmflow.models.scorers.chat_parts import Frame, answer_length, check_words, frame
from vlmflow.models.scorers.processor import load_processor
from vlmflow.models.scoring import ROWS, Score, halving, only_rows

if TYPE_CHECKING:
    import torch

STEP = 32  # lengths are padded to a multiple of this
PIXELS = 1 << 25  # numbers of pixel tensors in a batch, at most (if more than one sample): 128 MiB in fp32
CPU_LOGITS, GPU_LOGITS = 1 << 25, 1 << 28  # logits of a batch's counted tokens, at most (if more than one sample)


@dataclass(frozen=True)
class Prepared:
    """A request through the processor.

    Attributes:
        tokens: name -> [L]: input_ids and what else runs along them.
        others: name -> tensors of the pictures, samples joined along the first dimension.
        counted: how many of the last tokens are scored; 0 for something to write.
    """

    tokens: dict[str, torch.Tensor]
    others: dict[str, torch.Tensor]
    counted: int

    @property
    def length(self) -> int:
        """Tokens, after padding to STEP."""
        return -(-len(self.tokens["input_ids"]) // STEP) * STEP

    @property
    def shape(self) -> tuple[Any, ...]:
        """What samples of one batch must share."""
        return (self.length, *((name, *value.shape[1:]) for name, value in sorted(self.others.items())))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        return sum(value.nbytes for value in (*self.tokens.values(), *self.others.values()))

    @property
    def pixels(self) -> int:
        """Numbers of its picture tensors."""
        return sum(value.numel() for value in self.others.values())


class HuggingFaceScorer:
    """A model and its processor in eval mode; see `vlmflow.models.inference.Scorer`."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._lock = Lock()
        self._frame = functools.cache(lambda prompt, images: frame(processor, prompt, images))
        self._vocabulary = int(model.get_output_embeddings().weight.shape[0])

    @classmethod
    def load(cls, folder: Path) -> HuggingFaceScorer:
        """From a folder with safetensors weights, on the GPU where there is one; code of the folder is never run.

        Raises ModelError when it is not complete or its weights do not fit.
        """
        from transformers import AutoModelForImageTextToText

        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                str(folder), dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"cannot load a scorer from {folder}: {error}") from error
        model, info = loaded
        wrong = sorted(str(key) for name in ("missing_keys", "mismatched_keys") for key in info[name])
        if wrong:
            raise ModelError(
                f"the weights in {folder} do not fit its config.json: {len(wrong)} tensors missing or of another shape, e.g. "
                f"{wrong[0]}; perplexities would be those of random weights"
            )
        return cls(on_device(model), load_processor(folder))

    def prepare(self, request: Request | ScoreRequest, name: str = "") -> Prepared:
        """See `Scorer.prepare`."""
        around: Frame = self._frame(request.prompt, len(request.images))
        check_words(request.prompt, self.tokenizer, name)
        if isinstance(request, Request):
            return self._process(around.prompt, request.images, name, lambda ids: 0)
        target = request.target.strip()
        if not target:
            raise DataError(f"sample '{name}': its text is empty; there is nothing to score")
        check_words(target, self.tokenizer, name)
        text = around.before + target + around.end
        return self._process(text, request.images, name, lambda ids: answer_length(self.tokenizer, ids, around, target))

    def _process(self, text: str, images: Sequence[Any], name: str, counted: Callable[[list[int]], int]) -> Prepared:
        start = self.tokenizer.bos_token
        specials = not (start and text.startswith(start))  # as apply_chat_template does: not two of them
        pictures = {"images": list(images)} if images else {}
        try:
            with self._lock:
                out = self.processor(text=[text], return_tensors="pt", add_special_tokens=specials, **pictures)
                count = counted(out["input_ids"][0].tolist())
        except (ValueError, IndexError, OSError) as error:
            raise DataError(
                f"sample '{name}': the scorer's processor does not take it ({type(error).__name__}: {error})"
            ) from error
        shape = out["input_ids"].shape
        along = {key: value[0] for key, value in out.items() if value.shape == shape}
        return Prepared(along, {key: value for key, value in out.items() if key not in along}, count)

    def score(
        self,
        requests: Sequence[ScoreRequest | Prepared],
        batch_tokens: int = 4096,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Score]:
        """Negative log-likelihood of each target, in the order of the requests, up to `batch_tokens` slots a forward."""
        items = prepared(self, requests)
        logits = (GPU_LOGITS if self.model.device.type == "cuda" else CPU_LOGITS) // self._vocabulary
        scores: dict[int, Score] = {}
        for batch in _batches(items, batch_tokens, logits):
            scores |= halving(lambda some: dict(zip(some, self._score([items[i] for i in some]), strict=True)), batch)
            if progress:
                progress(len(batch))
        return [scores[i] for i in range(len(items))]

    def _score(self, items: Sequence[Prepared]) -> list[Score]:
        import torch

        device, width = self.model.device, items[0].length
        inputs = self._batch(items, left=False)
        ends = [r * width + len(item.tokens["input_ids"]) for r, item in enumerate(items)]
        at = torch.cat([torch.arange(end - item.counted, end) for end, item in zip(ends, items, strict=True)])
        values = inputs["input_ids"].flatten()[at.to(device)]
        rows = torch.from_numpy(np.resize((at - 1).numpy(), max(len(at), ROWS))).to(device)
        with torch.inference_mode(), only_rows(self.model, rows), _head_on(self.model, rows):
            logits = self.model(**inputs, use_cache=False).logits[0, : len(values)]
            nats = torch.nn.functional.cross_entropy(logits.float(), values, reduction="none").double().cpu()
        counts = [item.counted for item in items]
        return [Score(float(part.sum()), n) for part, n in zip(nats.split(counts), counts, strict=True)]

    def _batch(self, items: Sequence[Prepared], left: bool) -> dict[str, torch.Tensor]:
        """The forward's arguments: tokens padded to the common length, pictures one after the other."""
        import torch
        from torch.nn.functional import pad

        filler = {"input_ids": self.tokenizer.pad_token_id or 0}
        made = {}
        for name in items[0].tokens:
            rows = []
            for item in items:
                lacking = item.length - len(item.tokens[name])
                rows.append(pad(item.tokens[name], (lacking, 0) if left else (0, lacking), value=filler.get(name, 0)))
            made[name] = torch.stack(rows)
        if "attention_mask" not in made:
            raise ModelError("the scorer's processor gives no attention mask; padded samples would be read as text")
        for name in items[0].others:
            joined = torch.cat([item.others[name] for item in items])
            made[name] = joined.to(self.model.dtype) if joined.is_floating_point() else joined
        return {name: value.to(self.model.device) for name, value in made.items()}

    def generate(
        self,
        requests: Sequence[Request | Prepared],
        max_new_tokens: int,
        batch: int = 64,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Generation]:
        """Greedy answers in the order of the requests."""
        import torch

        items = prepared(self, requests)
        settings = self.model.generation_config
        listed = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        ends = {*listed, self.tokenizer.eos_token_id, *self._ends(requests)} - {None}
        image = getattr(self.model.config, "image_token_id", None)
        answers: dict[int, Generation] = {}
        for some in _batches(items, 1 << 62, 1 << 62, most=batch):
            inputs = self._batch([items[i] for i in some], left=True)
            with torch.inference_mode():
                out = self.model.generate(
                    **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(ends),
                    pad_token_id=self.tokenizer.pad_token_id or 0, suppress_tokens=None if image is None else [image],
                )  # fmt: skip
            for i, new in zip(some, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                stop = next((at for at, token in enumerate(new) if token in ends), -1)
                text = self.tokenizer.decode(new if stop < 0 else new[:stop], skip_special_tokens=True)
                answers[i] = Generation(text, "length" if stop < 0 else "stop")
            if progress:
                progress(len(some))
        return [answers[i] for i in range(len(items))]

    def _ends(self, requests: Sequence[Any]) -> set[int]:
        """End tokens of the template, beside those of the model's generation config."""
        frames = [self._frame(r.prompt, len(r.images)) for r in requests if isinstance(r, Request)]
        return {self.tokenizer.convert_tokens_to_ids(each.end) for each in frames}


def _batches(items: Sequence[Prepared], tokens: int, logits: int, most: int = 1 << 30) -> Iterator[list[int]]:
    """Numbers of items of one shape, shortest first, up to so many token slots, counted tokens and pixels a batch."""
    order = sorted(range(len(items)), key=lambda i: (items[i].length, str(items[i].shape), i))
    batch: list[int] = []
    for i in order:
        item, count = items[i], len(batch) + 1
        if batch and (
            item.shape != items[batch[0]].shape
            or count > most
            or item.length * count > tokens
            or sum(items[j].counted for j in batch) + item.counted > logits
            or sum(items[j].pixels for j in batch) + item.pixels > PIXELS
        ):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@contextmanager
def _head_on(model: Any, rows: torch.Tensor) -> Iterator[None]:
    """While it lasts, the head gives the logits of these rows [n] of the flattened batch alone, as [1, n, V].

    What a model does behind its head (softcap, scaling) happens to them as to any logits.
    """
    head = model.get_output_embeddings()
    forward = head.forward
    head.forward = lambda hidden: forward(hidden.flatten(0, -2)[rows][None])
    try:
        yield
    finally:
        del head.forward
