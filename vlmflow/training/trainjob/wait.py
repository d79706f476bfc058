"""Waiting for a TrainJob: until it is Complete or Failed, however long it queues.

The conditions of the TrainJob decide. Pods and the log only tell a person how it goes; what they do not tell is lost to
nobody. No time limit starts before the job runs (``activeDeadlineSeconds`` is the cluster's business).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any

from vlmflow.errors import ServiceError, StepFailed
from vlmflow.training.job import EVENT
from vlmflow.training.trainjob import pods as podlib
from vlmflow.training.trainjob.client import Api, Refused, Stopped
from vlmflow.training.trainjob.clock import Clock
from vlmflow.training.trainjob.log import LogCursor
from vlmflow.training.trainjob.spec import GROUP, NODE, PLURAL, QUEUE_LABEL, VERSION

POLL_RUNNING, POLL_QUEUED = 5.0, 20.0  # seconds
REMIND = (60.0, 300.0, 900.0, 1800.0, 3600.0)  # seconds in the queue after which a person is told; then every hour
LAST_LINES = 25


def path_of(namespace: str, name: str = "") -> str:
    """Path of TrainJobs in the API."""
    return f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}" + (f"/{name}" if name else "")


def condition(job: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The condition of that type if it is true."""
    for found in (job.get("status") or {}).get("conditions") or []:
        if found.get("type") == kind and found.get("status") == "True":
            return found
    return None


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Wait:
    """One wait for one TrainJob.

    Args:
        on_event: gets the events of rank 0 and notes of our own.

    Attributes:
        tail: last lines of the first node's log that were no events.
        reported: error events that the log showed, for when the store has no record.
    """

    def __init__(
        self, api: Api, clock: Clock, namespace: str, name: str, on_event: Callable[[dict[str, Any]], None]
    ) -> None:
        self.api, self.clock, self.namespace, self.name, self.on_event = api, clock, namespace, name, on_event
        self.tail: deque[str] = deque(maxlen=LAST_LINES)
        self.reported: list[dict[str, Any]] = []
        self.pods: list[dict[str, Any]] = []
        self._cursor = LogCursor()
        self._said: set[str] = set()
        self._queued_since: float | None = None
        self._reminded = 0
        self._ran = False

    def note(self, text: str) -> None:
        """Tell a person."""
        self.on_event({"event": "note", "text": text})

    def until_end(self, uid: str) -> dict[str, Any]:
        """Wait; returns the TrainJob, Complete or Failed.

        Raises:
            StepFailed: somebody deleted it.
            ServiceError: the API refuses or stays silent too long.
            Stopped: the launcher was told to stop.
        """
        while True:
            job = self._get(uid)
            suspended = bool((job.get("spec") or {}).get("suspend")) or condition(job, "Suspended") is not None
            ended = condition(job, "Complete") or condition(job, "Failed")
            self._tell_queue(job, suspended and not ended)
            if not suspended or ended:
                self._look_at_pods()
                self._read_log()
            if ended:
                return job
            self.clock.pause(POLL_QUEUED if suspended else POLL_RUNNING)
            if self.clock.stop.is_set():
                raise Stopped

    def _get(self, uid: str) -> dict[str, Any]:
        try:
            job = self.api.json("GET", path_of(self.namespace, self.name))
        except Refused as refused:
            if refused.status != 404:
                raise
            job = {}
        if job.get("metadata", {}).get("uid") != uid:
            what = "another one has taken its place" if job else "it is gone"
            raise StepFailed(
                f"TrainJob {self.namespace}/{self.name} was deleted while it was waited for ({what}): somebody cancelled the "
                "training, or a clean-up took it. Its last checkpoint is in the store; run the same command again to go on."
            )
        return job

    def _tell_queue(self, job: dict[str, Any], suspended: bool) -> None:
        now = self.clock.now()
        if not suspended:
            if self._queued_since is not None:
                self.note(f"TrainJob {self.name} was admitted after {duration(now - self._queued_since)} in the queue")
                self._queued_since = None
            self._ran = True
            return
        queue = (job["metadata"].get("labels") or {}).get(QUEUE_LABEL)
        where = f"in queue '{queue}'" if queue else "suspended; nothing but `suspend: false` on it will start it"
        if self._queued_since is None:
            self._queued_since, self._reminded = now, 0
            how = "was stopped by the queue and waits again" if self._ran else "waits"
            self.note(f"TrainJob {self.name} {how} {where}")
        elif now - self._queued_since >= self._next_reminder():
            self._reminded += 1
            self.note(f"TrainJob {self.name} waits {where} for {duration(now - self._queued_since)} now")

    def _next_reminder(self) -> float:
        beyond = self._reminded - len(REMIND) + 1
        return REMIND[self._reminded] if beyond <= 0 else REMIND[-1] * (beyond + 1)

    def _look_at_pods(self) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        try:
            answer = self.api.json("GET", path, {"labelSelector": podlib.selector(self.name)})
        except Refused as refused:
            self._say_once("pods", f"pods cannot be seen, so progress is not shown; training goes on ({refused})")
            return
        self.pods = answer.get("items") or []
        for key, text in podlib.remarks(self.pods):
            self._say_once(key, text)

    def _read_log(self) -> None:
        pod = podlib.first_node(self.pods)
        if pod is None:
            return
        name, uid = pod["metadata"]["name"], pod["metadata"].get("uid", "")
        if uid != self._cursor.pod:
            if self._cursor.pod:
                self.note(f"training was restarted; pod {name} goes on from the newest checkpoint")
            self._cursor = LogCursor(uid)
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}/log"
        try:
            text = self.api.text(path, {"container": NODE, **self._cursor.query()})
        except Refused as refused:
            if refused.status == 403:
                self._say_once("log", f"logs cannot be read, so progress is not shown; training goes on ({refused})")
            return
        except ServiceError:
            return  # asked for again in a moment, from the same line
        for line in self._cursor.take(text):
            self._line(line)

    def _line(self, line: str) -> None:
        if not line.startswith(EVENT):
            if line.strip():
                self.tail.append(line)
            return
        try:
            event = json.loads(line[len(EVENT) :])
            kind = event["event"]
        except (ValueError, KeyError, TypeError):
            return  # cut by the log's own limits
        if kind == "error":
            self.reported.append(event)
        else:
            self.on_event(event)

    def _say_once(self, key: str, text: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self.note(text)
