"""One rank of trainings whose loss or gradient is made bad at chosen steps: ``health_rank.py RANK WORLD MEETING JOBS``.

JOBS is JSON: [[job file, {step: [what, rank]}], ...], with what = "loss" (NaN), "gradient" (NaN, with a finite loss) or a
factor of the loss. One after another; the first error ends them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmflow.errors import VlmflowError
from vlmflow.training import objective
from vlmflow.training.job import Job


def poison(trainer: Any, bad: dict[int, tuple[Any, int]]) -> None:
    """Make steps of a trainer bad."""
    import torch

    whole, step_of = trainer._step, [0]
    plain = trainer.objective

    def outcome(model: Any, batch: Any, spec: Any) -> objective.Outcome:
        result = plain.outcome(model, batch, spec)
        what, rank = bad.get(step_of[0], (None, -1))
        if what is None or rank != trainer.rank:
            return result
        loss = result.loss_sum
        factor = {"loss": float("nan"), "gradient": 1.0}.get(what, what)
        loss = _Poisoned.apply(loss) if what == "gradient" else loss * factor
        return objective.Outcome(loss, result.sums)

    class _Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Any) -> Any:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients[0] * float("nan")

    def step(number: int, micros: list[Any]) -> Any:
        step_of[0] = number
        return whole(number, micros)

    trainer._step = step
    trainer.objective = replace(plain, outcome=outcome)


def main() -> int:
    from vlmflow.training.trainer import Trainer

    rank, world, meeting, jobs = sys.argv[1:]
    try:
        for path, bad in json.loads(jobs):
            job = Job.model_validate_json(Path(path).read_text())
            trainer = Trainer(job, int(rank), int(world), f"file://{meeting}")
            poison(trainer, {int(step): tuple(what) for step, what in bad.items()})
            trainer.run()
    except VlmflowError as error:
        print(f"{type(error).__name__}: {error}")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
