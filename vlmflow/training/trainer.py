"""The training loop of one rank.

It knows no stage by name: what trains, on what and at which rate is data. The loss of a step is the sum over its target
tokens divided by their number over all ranks and micro-batches, known from the pack plan before the step begins.
"""

from __future__ import annotations

import gc
import math
import shutil
import threading
import time
from typing import Any, NamedTuple

from vlmflow.errors import StepFailed
from vlmflow.training.job import Job, emit

NOT_COPIED = {"model.json", "model.safetensors.index.json"}
REPORT_EVERY = 0.3  # seconds between step events


class Preempted(Exception):
    """SIGTERM arrived and a checkpoint was written."""


class StepResult(NamedTuple):
    """What a step gave, over all ranks: loss per weight, gradient norm, images, whether a rank was told to stop."""

    loss: float
    norm: float
    images: int
    stop: bool
    metrics: dict[str, float]


class Trainer:
    """State of one rank. ``Trainer(job, rank, world).run()`` trains and, on rank 0, writes ``job.out``.

    `summary` holds the table of what trains and, after the run, the plan's report.

    Args:
        rendezvous: where ranks meet, ``env://`` or ``file://``; used once a process.
        stop: set from outside (SIGTERM) to save and stop after the current step.
    """

    def __init__(
        self, job: Job, rank: int = 0, world: int = 1, rendezvous: str = "env://", stop: threading.Event | None = None
    ) -> None:
        import torch

        from vlmflow.training import engine as ds
        from vlmflow.training import setup
        from vlmflow.training.objective import OBJECTIVES

        self.job, self.stage, self.rank, self.world = job, job.stage, rank, world
        self.stop = stop or threading.Event()
        torch.set_num_threads(self.stage.threads)
        self.device = ds.join(rendezvous, rank, world)
        made = setup.prepare(job, self.device)
        self.family, self.tokenizer, self.config = made.family, made.tokenizer, made.config
        self.engine, self.group_labels = made.engine, made.labels
        self.objective = OBJECTIVES[job.stage.objective.kind]
        self.summary: dict[str, Any] = made.table.as_json()
        if rank == 0:
            emit(event="table", text=made.table.as_text())
        self._prepare()

    def _prepare(self) -> None:
        """The plan that the launcher made, and what turns its items into batches."""
        import numpy as np
        from PIL import Image

        from vlmflow.models.chat import Segment
        from vlmflow.training import plan_file
        from vlmflow.training.examples import Encoder

        job, family, config = self.job, self.family, self.config
        self.plan = plan_file.load(job.plan, job.cache)
        uses = [use for use, _ in job.uses]
        self.encoder = Encoder(family, self.tokenizer, config, job.stage, uses, job.seed)
        blank = family.tile(Image.new("RGB", (8, 8)), config)
        self.side = int(np.shape(blank)[1])
        self.dummy, _ = family.expand([Segment(image=0)], self.tokenizer, [1], config)

    def tile(self, image: Any, max_tiles: int) -> Any:
        """Tiles of an image under the tile limit of its phase, uint8 [t, S, S, 3]."""
        return self.family.tile(image, {"tile": self.side, "max_tiles": max_tiles})

    def run(self) -> None:
        """Train from the newest checkpoint to the last step.

        Raises:
            Preempted: SIGTERM; a checkpoint was written.
            StepFailed: the loss or the gradient is not finite (names the samples).
        """
        from vlmflow.training import engine as ds
        from vlmflow.training.loader import Loader
        from vlmflow.training.optimizer import rate
        from vlmflow.training.record import step_record

        first, log = self._resume()
        schedule, steps = self.stage.schedule, self.plan.steps
        loader = Loader(
            self.plan,
            self.encoder,
            self.tile,
            self.family.positions,
            self.dummy,
            self.side,
            self.job.cache,
            self.rank,
            self.world,
            workers=1 if self.device.type == "cpu" else max(2, self.stage.threads),
        )
        if self.rank == 0:
            report = self.plan.report | {"imbalance": round(self.plan.imbalance(self.world), 4)}
            self.summary |= {"plan": report, "examples": self.plan.examples}
            emit(event="plan", steps=steps, first=first, report=report, examples=self.plan.examples)
        gc.freeze()  # the imports and the model are not garbage; the collector need not look at them again
        shown = 0.0
        status = "FAILED"
        try:
            started = time.perf_counter()
            for step, micros in loader.steps(first):
                rates = ds.set_rates(self.engine, rate(step, steps, schedule.name, schedule.warmup, schedule.final))
                result = self._step(step, micros)
                now = time.perf_counter()
                if self.rank == 0:
                    record = step_record(
                        self.plan,
                        step,
                        result.loss,
                        result.norm,
                        dict(zip(self.group_labels, rates, strict=True)),
                        result.images,
                        now - started,
                        loader.waited,
                        self.device,
                        result.metrics,
                    )
                    log.step(step, record)
                    if now - shown > REPORT_EVERY or step + 1 == steps:
                        shown = now
                        emit(
                            event="step",
                            step=step + 1,
                            loss=record["loss"],
                            tokens_per_second=record["tokens_per_second"],
                        )
                started, loader.waited = now, 0.0
                done = step + 1
                if done < steps and (result.stop or done % self.stage.checkpoint.every == 0):
                    self._save(done, log)
                if result.stop and done < steps:
                    status = "KILLED"
                    raise Preempted
            self._finish()
            status = "FINISHED"
        finally:
            loader.close()
            if log is not None:
                log.close(status)
                if log.tracker is not None and log.tracker.problem:
                    emit(event="note", text=log.tracker.problem + "; training went on without it")

    def _step(self, step: int, micros: list[Any]) -> StepResult:
        """One optimizer step: backward over its micro-batches, then the update."""
        import torch
        import torch.distributed as dist

        from vlmflow.training.batch import to_torch

        torch.manual_seed((self.job.seed * 1_000_003 + step) * 4096 + self.rank)
        weight = max(1, self.objective.weight(self.plan, step))
        sums: dict[str, torch.Tensor] = {}
        for micro in micros:
            outcome = self.objective.outcome(self.engine, to_torch(micro.batch, self.device), self.stage.objective)
            self.engine.backward(outcome.loss_sum / weight, scale_wrt_gas=False)
            for name, value in {"loss": outcome.loss_sum, **outcome.sums}.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=self.device)) + value.detach()
        told = torch.stack(
            [
                *sums.values(),
                torch.tensor(sum(m.images for m in micros), dtype=torch.float64, device=self.device),
                torch.tensor(self.stop.is_set(), dtype=torch.float64, device=self.device),
            ]
        )
        mine = float(sums["loss"])
        if self.world > 1:
            dist.all_reduce(told)
        *totals, images, stop = told.tolist()
        loss, *metrics = [total / weight for total in totals]
        if not math.isfinite(loss):
            raise StepFailed(self._not_finite(step, f"the loss is {loss}", micros, mine))
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            raise StepFailed(self._not_finite(step, f"the gradient norm is {norm}", micros, mine))
        return StepResult(loss, norm, int(images), stop > 0, dict(zip(list(sums)[1:], metrics, strict=True)))

    def _not_finite(self, step: int, what: str, micros: list[Any], mine: float) -> str:
        keys = [key for micro in micros for key in micro.keys]
        where = (
            "its samples are"
            if not math.isfinite(mine) or self.world == 1
            else "another rank's samples caused it; here were"
        )
        return (
            f"step {step}: {what}; training stopped before anything of this step was saved. On rank {self.rank} {where} {keys}. Look at "
            "these samples, lower the learning rate or lengthen the warm-up; the last checkpoint is untouched."
        )

    def _resume(self) -> tuple[int, Any]:
        """(first step, log or None): state of the newest complete checkpoint is put back on every rank."""
        from vlmflow.training import checkpoint
        from vlmflow.training import engine as ds
        from vlmflow.training.log import TrainLog, steps_before, tracker_from_environment

        job = self.job
        plan = self.plan.digest()
        copy = job.work / f"resume-{self.rank}"
        found, ignored = checkpoint.newest(job.checkpoints, plan, copy)
        first, earlier = 0, ""
        if found is not None:
            ds.restore(self.engine, *found.tensors(), found.step)
            first, earlier = found.step, steps_before(found.log, found.step)
        shutil.rmtree(copy, ignore_errors=True)
        if self.rank:
            return first, None
        for text in ignored:
            emit(event="note", text=f"checkpoint passed over: {text}")
        if found is not None:
            emit(
                event="note",
                text=f"resumed at step {first} of {self.plan.steps} (written by {found.state['world']} processes)",
            )
        tracker, problem = None, ""
        if job.tracking:
            tracker, problem = tracker_from_environment(
                **job.tracking, earlier=found.state.get("mlflow_run") if found else None
            )
        if problem:
            emit(event="note", text=problem)
        return first, TrainLog(job.log, earlier, tracker)

    def _save(self, done: int, log: Any) -> None:
        from vlmflow.training import checkpoint
        from vlmflow.training import engine as ds

        weights, moments = ds.capture(self.engine)
        if self.rank == 0:
            state = {"plan": self.plan.digest(), "world": self.world, "seed": self.job.seed, "key": self.job.key}
            if log.tracker is not None and log.tracker.run_id:
                state["mlflow_run"] = log.tracker.run_id
            work = self.job.work / "saving"
            checkpoint.save(
                self.job.checkpoints, done, weights, moments, state, log.text(), work, self.stage.checkpoint.keep
            )
            emit(event="checkpoint", step=done)

    def _finish(self) -> None:
        """Rank 0 writes the model folder: weights and config of the trained model, the rest as it was."""
        if self.rank:
            return
        out = self.job.out
        shutil.rmtree(out, ignore_errors=True)
        initial = self.job.model_folder()
        for path in sorted(initial.rglob("*")):
            if path.is_file() and path.suffix != ".safetensors" and path.name not in NOT_COPIED:
                target = out / path.relative_to(initial)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        self.engine.module.save_pretrained(out)
        emit(event="done", step=self.plan.steps)
