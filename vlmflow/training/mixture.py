"""Which sample comes next: weights, caps, the share of text-only samples, and the image-size ramp.

Pure functions of (examples, recipe, seed). A pass over the data shuffles shards, and samples inside windows of shards
(a window's shards are what a loader holds in cache).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmflow.errors import DataError

if TYPE_CHECKING:
    from vlmflow.recipe.mixture import DataUse, TextShareSpec
    from vlmflow.recipe.stage import StageSpec
    from vlmflow.training.pool import Examples

Ints = NDArray[np.int64]
EMPTY = 1000  # passes without a sample after which a stream is given up
WINDOW = 64  # shards whose samples are shuffled together


def shown(uses: list[DataUse], use: Ints, seed: int, epoch: int) -> Ints:
    """How often each example is shown in an epoch [n], from the weight of its ingredient.

    Weight 0.5 shows each example in every second epoch, another half each time: after e epochs every example was shown
    e * weight times, rounded down or up, and so was the ingredient as a whole.

    Args:
        use: number of each example's ingredient [n].
    """
    copies = np.zeros(len(use), dtype=np.int64)
    for number, ingredient in enumerate(uses):
        mine = np.flatnonzero(use == number)
        place = np.argsort(_random(seed, 1, number).random(len(mine)), kind="stable")
        offset = (place + 0.5) / max(1, len(mine))
        copies[mine] = np.floor((epoch + 1) * ingredient.weight + offset) - np.floor(epoch * ingredient.weight + offset)
    return copies


def one_pass(examples: Examples, usable: NDArray[np.bool_], seed: int, epoch: int, window: int = WINDOW) -> Ints:
    """Example numbers of one epoch in order, weights and caps applied.

    A second copy of an example lies in a shuffle of its own, so that copies are not shown in a row.
    """
    chosen = np.flatnonzero(usable)
    use, shard = examples.arrays["use"][chosen], examples.arrays["shard"][chosen]
    copies = shown(examples.uses, use, seed, epoch)
    at = np.repeat(np.arange(len(chosen)), copies)
    copy = np.arange(len(at)) - np.repeat(np.cumsum(copies) - copies, copies)
    at, copy = _capped(examples, use[at], shard[at], at, copy, seed, epoch)
    random = _random(seed, 0, epoch)
    visits, visit = np.unique(np.stack([shard[at], copy]), axis=1, return_inverse=True)
    place = np.empty(visits.shape[1], dtype=np.int64)
    place[np.argsort(random.random(len(place)), kind="stable")] = np.arange(len(place))
    return chosen[at[np.lexsort((random.random(len(at)), place[visit.reshape(-1)] // window))]]


def _capped(
    examples: Examples, use: Ints, shard: Ints, at: Ints, copy: Ints, seed: int, epoch: int
) -> tuple[Ints, Ints]:
    """At most ``cap`` of each source of an ingredient (Cambrian-1's threshold t), drawn anew every epoch."""
    keep = np.ones(len(at), dtype=bool)
    names = sorted(set(examples.sources))
    source = np.array([names.index(name) for name in examples.sources], dtype=np.int64)[shard]
    for number, ingredient in enumerate(examples.uses):
        if ingredient.cap is None:
            continue
        random = _random(seed, 2, epoch * len(examples.uses) + number)
        for name in range(len(names)):
            mine = np.flatnonzero((use == number) & (source == name))
            drawn = np.argsort(random.random(len(mine)), kind="stable")
            keep[mine[drawn[ingredient.cap :]]] = False
    return at[keep], copy[keep]


def text_share(spec: TextShareSpec, progress: NDArray[np.float64]) -> NDArray[np.float64]:
    """Target share of text-only samples at points of the training (0 to 1): linear from start to end, then constant."""
    along = np.minimum(progress, spec.warmup) / spec.warmup if spec.warmup else np.ones_like(progress)
    return spec.start + (spec.end - spec.start) * along


class Stream:
    """Passes over some of the examples, one after another, as often as asked.

    Attributes:
        passes: epochs begun; a stream that is asked for more than it has goes on with a reshuffled one.
        taken: examples given so far.
    """

    def __init__(self, examples: Examples, usable: NDArray[np.bool_], seed: int, epochs: float = np.inf) -> None:
        self.examples, self.usable, self.seed, self.epochs = examples, usable, seed, epochs
        self.passes = self.taken = 0
        self.first_pass = 0
        self._left: Ints = np.zeros(0, dtype=np.int64)

    def take(self, n: int) -> Ints:
        """The next ``n`` examples; fewer only when ``epochs`` are over. Raises DataError when endless passes show none."""
        parts = []
        empty = 0
        while n > 0:
            if not len(self._left):
                share = min(1.0, self.epochs - self.passes)
                if share <= 0:
                    break
                if empty > EMPTY and np.isinf(self.epochs):
                    raise DataError(
                        f"{EMPTY} passes over {int(self.usable.sum())} samples that mixture.text_share asks for showed none of them: "
                        "raise their `weight` in the stage's data"
                    )
                order = one_pass(self.examples, self.usable, self.seed, self.passes)
                self._left = order if share >= 1 else order[: max(1, round(len(order) * share))]
                self.first_pass = self.first_pass or len(self._left)
                self.passes += 1
                empty = 0 if len(self._left) else empty + 1
                continue
            part, self._left = self._left[:n], self._left[n:]
            parts.append(part)
            n -= len(part)
        made = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        self.taken += len(made)
        return made


class Mixer:
    """Draws examples until the epochs are over.

    With a text share, text-only samples and those with images are two streams. Every draw takes from the one that
    brings the running share next to the sum of its targets so far, so the share is kept at every point of the training.
    A stream that has shown everything goes on with a further, reshuffled pass, and `report` says so.

    Args:
        usable: which examples can be packed [n].
        limit: tile limit of the model, in force after the last phase of the ramp.

    Attributes:
        total: examples that all epochs show (up to the rounding of fractional weights).
        drawn: examples drawn so far.

    Raises:
        DataError: a share of samples is asked for that do not exist.
    """

    def __init__(self, examples: Examples, usable: NDArray[np.bool_], stage: StageSpec, seed: int, limit: int) -> None:
        self.share = stage.mixture.text_share
        self.total = max(1, round(expected(examples, usable) * stage.epochs))
        self.drawn = self.texts = 0
        self.until = np.array([phase.until for phase in stage.mixture.tiles])
        self.limits = np.array([*(phase.max_tiles for phase in stage.mixture.tiles), limit], dtype=np.int64)
        self._target = 0.0
        if self.share is None:
            self.streams = [Stream(examples, usable, seed, stage.epochs)]
            return
        text = examples.text_only
        self.streams = [Stream(examples, usable & text, seed), Stream(examples, usable & ~text, seed)]
        wanted = (max(self.share.start, self.share.end) > 0, min(self.share.start, self.share.end) < 1)
        for stream, asked, what in zip(self.streams, wanted, ("text-only samples", "samples with images"), strict=True):
            if asked and not expected(examples, stream.usable):
                raise DataError(
                    f"mixture.text_share asks for {what} (share of text {self.share.start:g} to {self.share.end:g}), but none of the "
                    f"{int(usable.sum())} usable samples is one; add such an ingredient to the stage's data, or leave text_share out"
                )

    def take(self, n: int, done: float = 0.0) -> tuple[Ints, Ints]:
        """(the next examples [k], tile limit of each [k]); k < n only at the end.

        Args:
            done: share of the steps that are full, where the recipe says how many there are; the training is as far as
                that or as its share of the examples, whichever is further.
        """
        progress = np.clip(np.maximum(done, (self.drawn + np.arange(n)) / self.total), 0.0, 1.0)
        if self.share is None:
            chosen = self.streams[0].take(n)
        else:
            progress = progress[: max(0, self.total - self.drawn)]
            target = self._target + np.cumsum(text_share(self.share, progress))
            level = np.floor(target + 0.5).astype(np.int64)
            text = np.diff(level, prepend=self.texts) > 0
            chosen = np.empty(len(text), dtype=np.int64)
            chosen[text] = self.streams[0].take(int(text.sum()))
            chosen[~text] = self.streams[1].take(int((~text).sum()))
            if len(text):
                self._target, self.texts = float(target[-1]), int(level[-1])
        self.drawn += len(chosen)
        return chosen, self.limits[np.searchsorted(self.until, progress[: len(chosen)], side="right")]

    def report(self) -> dict[str, Any]:
        """Passes over each stream and the text share reached, where one was asked for."""
        if self.share is None:
            return {}
        passes = [round(stream.taken / max(1, stream.first_pass), 3) for stream in self.streams]
        return {
            "text_share": round(self.texts / max(1, self.drawn), 4),
            "text_passes": passes[0],
            "image_passes": passes[1],
        }


def expected(examples: Examples, usable: NDArray[np.bool_]) -> float:
    """Examples that an epoch shows on average, by weights and caps."""
    use, shard = examples.arrays["use"][usable], examples.arrays["shard"][usable]
    names = sorted(set(examples.sources))
    source = np.array([names.index(name) for name in examples.sources], dtype=np.int64)[shard]
    counts = np.bincount(use * len(names) + source, minlength=len(examples.uses) * len(names)).reshape(-1, len(names))
    total = 0.0
    for ingredient, row in zip(examples.uses, counts, strict=True):
        total += float(np.minimum(row * ingredient.weight, ingredient.cap or np.inf).sum())
    return total


def _random(seed: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, purpose, number]))
