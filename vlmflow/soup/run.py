"""The soup step: maximum, average and greedy soup of the candidates, chosen on the selection split.

Every soup is the mean of the original candidates in a fixed order, never an update of an earlier soup (data-eval-soup
6.2). What is expensive is remembered by its set of ingredients: a published soup by its key in the model store, the
score of a tried soup in `{root}/scores/sets`. So a killed search continues where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vlmflow import storage
from vlmflow.digest import digest
from vlmflow.errors import ModelError, RecipeError
from vlmflow.evaluation import run as evaluation
from vlmflow.evaluation.scores import Scores
from vlmflow.models import store
from vlmflow.models.store import ModelLineage, ModelRef
from vlmflow.soup.average import Parent, average
from vlmflow.soup.choose import greedy, maximum
from vlmflow.soup.result import SoupEntry, SoupResult

if TYPE_CHECKING:
    from vlmflow.step import Context

VERSION = 1  # of the averaging; part of the keys of soups
SOUPS = ("greedy", "average", "maximum")  # also the order in which equal scores are preferred


def run(ctx: Context, candidates: dict[str, ModelRef]) -> SoupResult:
    """Make, score and publish the three soups of `candidates` (name -> model) and choose by `recipe.soup.choose`.

    Acc = mean of all benchmarks on the selection split. "best" = the highest of all soups and candidates; equal ones:
    greedy, average, maximum, then candidates by name. A soup of one ingredient is that candidate, its weights included.

    Raises RecipeError: no soup section, no candidates, a candidate with a soup's name; ModelError: candidates that
    cannot be averaged (different start, tensors, config, NaN), before anything is evaluated.
    """
    spec = ctx.recipe.soup
    if spec is None:
        raise RecipeError(
            "the recipe has no soup section, so there is nothing to choose by; add soup.stage and candidates"
        )
    if not candidates:
        raise RecipeError("soup.candidates is empty; a soup needs at least one trained candidate")
    clash = sorted(set(candidates) & set(SOUPS))
    if clash:
        raise RecipeError(f"soup.candidates.{clash[0]}: this name is taken by a soup ({', '.join(SOUPS)}); rename it")
    _check_start(candidates)
    kitchen = _Kitchen(ctx, spec.stage, candidates)
    everything = kitchen.published(candidates)  # first: refuses what cannot be averaged before time goes into scores

    entries = {
        name: SoupEntry(ref=ref, ingredients=[name], selection=kitchen.scores([name]))
        for name, ref in sorted(candidates.items())
    }
    accuracy = {name: entry.selection.mean for name, entry in entries.items()}
    pool, trace = greedy(accuracy, lambda names: kitchen.scores(names).mean)
    sets = {"greedy": pool, "average": sorted(candidates), "maximum": maximum(accuracy, spec.maximum)}
    soups = {}
    for name in SOUPS:
        ref = everything if name == "average" else kitchen.published(sets[name])
        soups[name] = SoupEntry(ref=ref, ingredients=sets[name], selection=kitchen.scores(sets[name]))
    return SoupResult(soups=soups, candidates=entries, chosen=_choose(spec.choose, soups, entries), trace=trace)


def _choose(by: str, soups: Mapping[str, SoupEntry], candidates: Mapping[str, SoupEntry]) -> str:
    if by != "best":
        return by
    everyone = [*((name, soups[name]) for name in SOUPS), *sorted(candidates.items())]
    return max(everyone, key=lambda item: item[1].selection.mean)[0]  # max keeps the first of equals


def _check_start(candidates: Mapping[str, ModelRef]) -> None:
    (first, start), *others = [(name, ref.lineage.ancestor) for name, ref in sorted(candidates.items())]
    for name, ancestor in others:
        if not start or ancestor != start:
            raise ModelError(
                f"candidate {first} was tuned from {start[:12] or 'an unknown start'}, candidate {name} from "
                f"{ancestor[:12] or 'an unknown start'}: the mean of models with different starts is noise. Train all "
                "candidates from one checkpoint."
            )


class _Kitchen:
    """Means of sets of candidates, by name. A set's order does not matter: ingredients are sorted by identity."""

    def __init__(self, ctx: Context, stage: str, candidates: Mapping[str, ModelRef]) -> None:
        self.ctx, self.stage, self.candidates = ctx, stage, candidates
        self.identity = {name: store.behaviour_digest(c.files) for name, c in candidates.items()}
        self.settings = evaluation.settings_digest(ctx, "selection")
        self._folders: dict[str, Path] = {}

    def key(self, names: Iterable[str]) -> str:
        return digest(["soup", VERSION, sorted(self.identity[n] for n in names)])[:32]

    def published(self, names: Iterable[str]) -> ModelRef:
        """The mean of these candidates as a model of the store."""
        names = sorted(names, key=lambda n: (self.identity[n], n))
        if len(names) == 1:
            return self.candidates[names[0]]
        key = f"soup-{self.key(names)}"
        ref = store.find(self.ctx, key)
        if ref is None:
            parents = [self.candidates[n] for n in names]
            lineage = ModelLineage(
                step="soup",
                stage=self.stage,
                params={"weights": "equal", "accumulation": "float64", "version": VERSION},
                parents=[p.weights_sha256 for p in parents],
                ancestor=parents[0].lineage.ancestor,
                data=sorted({d for p in parents for d in p.lineage.data}),
            )
            folder = self._mean(names)
            ref = store.publish(self.ctx, folder, f"{self.ctx.recipe.name}-soup", lineage, key)
            shutil.rmtree(folder)
        return ref

    def scores(self, names: Iterable[str]) -> Scores:
        """Selection scores of the mean of these candidates; a set that was scored before is not even averaged."""
        names = sorted(names, key=lambda n: (self.identity[n], n))
        uri = storage.join(self.ctx.root, "scores", "sets", f"{digest([self.key(names), self.settings])[:32]}.json")
        if (known := storage.read_finished(uri, Scores)) is not None:
            return known
        ref = self.candidates[names[0]] if len(names) == 1 else store.find(self.ctx, f"soup-{self.key(names)}")
        if ref is not None:
            scores = evaluation.run(self.ctx, ref, "selection")
        else:
            folder = self._mean(names)
            files = store.describe_files(folder)
            weights = store.weights_digest(files)
            scores = evaluation.evaluate(self.ctx, files, weights, lambda: folder, "selection")
            shutil.rmtree(folder)
        scores.save(uri)
        return scores

    def _mean(self, names: list[str]) -> Path:
        parents = [Parent(n, self._folder(n), self.candidates[n].lineage.ancestor) for n in names]
        total = sum(f.bytes for n in names for f in self.candidates[n].files if f.path.endswith(".safetensors"))
        target = Path(self.ctx.scratch) / "soups" / self.key(names)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.ctx.progress(f"average {len(names)} models", total, "bytes") as progress:
            return average(parents, target, advance=progress.advance)

    def _folder(self, name: str) -> Path:
        if name not in self._folders:
            self._folders[name] = store.fetch(self.candidates[name], self.ctx.scratch)
        return self._folders[name]
