"""The training loop of one rank.

It knows no stage by name: what trains, on what and at which rate is data. The loss of a step is the sum over its target
tokens divided by their number over all ranks and micro-batches, known from the pack plan before the step begins.
"""

from __future__ import annotations

import gc
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmflow.training.job import Job, emit

if TYPE_CHECKING:
    from vlmflow.training.loader import Loader, Micro
    from vlmflow.training.plan import Plan
    from vlmflow.training.reference import Reference

REPORT_EVERY = 0.3  # seconds between step events


class Preempted(Exception):
    """SIGTERM arrived and what was done is in the store: a checkpoint, or parts of the reference."""


class StepResult(NamedTuple):
    """What a step gave, over all ranks: loss per weight, gradient norm, images, whether a rank was told to stop.

    ``trouble`` is empty, or says why the step was skipped and which samples it had.
    """

    loss: float
    norm: float
    images: int
    stop: bool
    metrics: dict[str, float]
    trouble: dict[str, Any]


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
        from vlmflow.training.health import Health
        from vlmflow.training.objective import OBJECTIVES
        from vlmflow.training.saver import Saver

        self.job, self.stage, self.rank, self.world = job, job.stage, rank, world
        self.stop = stop or threading.Event()
        torch.set_num_threads(self.stage.threads)
        self.device = ds.join(rendezvous, rank, world)
        made = setup.prepare(job, self.device)
        self.family, self.tokenizer, self.config = made.family, made.tokenizer, made.config
        self.engine, self.group_labels, self.adapters = made.engine, made.labels, made.table.adapters
        self.noise = made.noise
        self.objective = OBJECTIVES[job.stage.objective.kind]
        self.reference: Reference | None = None
        self.health = Health(job.stage.health)
        self.saving = 0.0  # seconds that the last save held the loop
        self.summary: dict[str, Any] = made.table.as_json()
        if rank == 0:
            emit(event="table", text=made.table.as_text())
            for note in made.notes:
                emit(event="note", text=note)
        self._prepare()
        self.saver = Saver(job, self.engine, self.plan.digest(), rank, world, self.device)

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

    def tile(self, data: bytes, max_tiles: int) -> Any:
        """Tiles of a stored image under the tile limit of its phase, uint8 [t, S, S, 3]."""
        from vlmflow.vision.image import decode_scaled

        tiling = {"tile": self.side, "max_tiles": max_tiles}
        least = (lambda *size: self.family.pixels_for(*size, tiling)) if self.stage.decode == "scaled" else None
        image, size = decode_scaled(data, least)
        return self.family.tile(image, tiling, size)

    def run(self) -> None:
        """Train from the newest checkpoint to the last step.

        Raises:
            Preempted: SIGTERM; a checkpoint was written.
            StepFailed: a step is not healthy and the recipe says stop (names the samples).
            StorageError: no checkpoint can be written, and there is none to fall back to.
        """
        from vlmflow.training import compiled
        from vlmflow.training import engine as ds
        from vlmflow.training.checkpoint_writer import PATIENCE
        from vlmflow.training.health import Health
        from vlmflow.training.output import write_model
        from vlmflow.training.record import step_record
        from vlmflow.training.schedule import named_rates, rate

        self._measure_reference()
        schedule, steps = self.stage.schedule, self.plan.steps
        found = self.saver.resume(steps)
        first = found.step if found else 0
        self.health = Health(self.stage.health, found.state.get("health") if found else None)
        loader = self._loader(self.plan)
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
                self.saver.poll()
                now = time.perf_counter()
                if self.rank == 0 and step == first and self.stage.memory.compile:
                    emit(event="note", text=compiled.cost())
                if self.saver.log is not None:
                    record = step_record(
                        self.plan,
                        step,
                        result.loss,
                        result.norm,
                        named_rates(self.group_labels, rates),
                        result.images,
                        now - started,
                        loader.waited,
                        self.device,
                        result.metrics,
                    )
                    record |= {"checkpoint_wait": round(self.saving / (now - started), 4), **result.trouble}
                    self.saver.log.step(step, record)
                    if now - shown > REPORT_EVERY or step + 1 == steps:
                        shown = now
                        emit(
                            event="step",
                            step=step + 1,
                            loss=record["loss"],
                            tokens_per_second=record["tokens_per_second"],
                        )
                started, loader.waited, self.saving = now, 0.0, 0.0
                done = step + 1
                if done < steps and (result.stop or done % self.stage.checkpoint.every == 0):
                    self.saver.save(done, self.health.state(), self.saver.grace if result.stop else PATIENCE)
                    self.saving = time.perf_counter() - now
                if result.stop and done < steps:
                    self.saver.stopped(now)
                    status = "KILLED"
                    raise Preempted
            write_model(self.job, self.engine, self.adapters, self.rank)
            if self.rank == 0:
                emit(event="done", step=steps)
            status = "FINISHED"
        finally:
            loader.close()
            self.saver.close(status)

    def _loader(self, plan: Plan) -> Loader:
        """This rank's micro-batches of a plan."""
        from vlmflow.training.loader import Loader

        return Loader(
            plan,
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

    def _measure_reference(self) -> None:
        """What pairs are measured against, under the initial weights: before any checkpoint is put back."""
        from vlmflow.training import reference

        if not self.objective.paired:
            return

        def say(text: str) -> None:
            if self.rank == 0:
                emit(event="note", text=text)

        uri = reference.address(self.job, self.plan)
        self.reference = reference.prepare(
            uri, self.plan, self._loader, self.engine, self.device, self.rank, self.world, say, self.stop.is_set
        )
        if self.reference is None:
            raise Preempted

    def _batch(self, pack: int | None, micro: Micro) -> dict[str, Any]:
        """A micro-batch as tensors, with the reference values of its pairs."""
        from vlmflow.training.batch import to_torch

        known = {} if self.reference is None else {"reference": self.reference.of(pack)}
        return to_torch(micro.batch | known, self.device)

    def _step(self, step: int, micros: list[Any]) -> StepResult:
        """One optimizer step: backward over its micro-batches, then the update."""
        import torch

        from vlmflow.training import engine as ds
        from vlmflow.training.collective import gather

        torch.manual_seed((self.job.seed * 1_000_003 + step) * 4096 + self.rank)
        weight = max(1, self.objective.weight(self.plan, step))
        sums: dict[str, torch.Tensor] = {}
        for pack, micro in zip(self.plan.deal(step, self.world)[self.rank], micros, strict=True):
            outcome = self.objective.outcome(self.engine, self._batch(pack, micro), self.stage.objective)
            ds.backward(self.engine, outcome.loss_sum / weight)
            for name, value in {"loss": outcome.loss_sum, **outcome.sums}.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=self.device)) + value.detach()
        told = torch.stack(
            [
                *sums.values(),
                torch.tensor(sum(m.images for m in micros), dtype=torch.float64, device=self.device),
                torch.tensor(self.stop.is_set(), dtype=torch.float64, device=self.device),
            ]
        )
        arrived = self.noise.norms() if self.noise else None
        everyone = gather(torch.cat([told, told.new_zeros(2) if arrived is None else arrived]), self.world)
        *totals, images, stop, noise, samples = everyone.sum(0).tolist()
        loss, *further = [total / weight for total in totals]
        problem = self.health.of_loss(loss)
        norm = ds.step(self.engine, held=bool(problem))
        problem = problem or self.health.of_norm(norm)
        trouble: dict[str, Any] = {}
        if problem:
            keys = [key for micro in micros for key in micro.keys]
            trouble = self.health.unhealthy(step, problem, loss, norm, everyone[:, 0], keys)
            if self.rank == 0:
                emit(event="note", text=trouble["skipped"])
        else:
            self.health.healthy(loss)
        metrics = dict(zip(list(sums)[1:], further, strict=True))
        if self.noise:
            metrics["noise_norm"] = noise / max(1.0, samples)
        return StepResult(loss, norm, int(images), stop > 0, metrics, trouble)
