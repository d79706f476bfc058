"""A Kubernetes API with TrainJobs for tests: kmock's emulator with the manners of an API server, and a clock of its own.

The emulator answers over real HTTP from a thread. `Cluster` adds what kmock leaves out and the launcher relies on: uids,
deletion with preconditions and finalizers, pods' logs with time stamps, and faults. `FakeClock` moves a scenario: each
sleep of the launcher advances the clock and plays the events that are due.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import threading
from collections.abc import Callable
from typing import Any

import kmock
from kmock._internal.rendering import Request

from vlmflow.training.trainjob.clock import Clock
from vlmflow.training.trainjob.pods import INDEX_LABEL, JOBSET_LABEL, REPLICATED_LABEL

NAMESPACE = "team-a"
TRAINJOBS, PODS = "trainjobs.v1alpha1.trainer.kubeflow.org", "pods.v1"
EPOCH = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

Fault = Callable[[Request], Any]


class Emulator(kmock.KubernetesEmulator):
    """kmock with uids, deletion preconditions, label selectors and a hook before every answer."""

    cluster: Cluster

    async def _handle(self, request: Request) -> Any:
        cluster = self.cluster
        for fault in list(cluster.faults):
            if (answer := fault(request)) is not None:
                return answer
        if str(request.url.path).endswith("/log"):
            return cluster.log_answer(request)
        if request.action == kmock.action.LIST and request.resource.plural == "pods":
            return cluster.pods_answer(request)
        if request.action == kmock.action.CREATE and request.resource.plural == "trainjobs":
            meta = request.data["metadata"]
            meta["uid"], meta["creationTimestamp"] = f"uid-{next(cluster.numbers)}", cluster.stamp()
        if request.action == kmock.action.DELETE and (wanted := (request.data or {}).get("preconditions")):
            found = cluster.trainjob(request.name)
            if found and found["metadata"]["uid"] != wanted["uid"]:
                return cluster.refusal(409, "the UID in the precondition does not match")
            cluster.deleted.append(request.name)
            if found and cluster.slow_deletion:
                cluster.patch(request.name, {"metadata": {"finalizers": ["foregroundDeletion"]}})
            if cluster.on_delete:
                cluster.on_delete()
        answer = await super()._handle(request)
        if request.action == kmock.action.CREATE and answer.status < 300:
            cluster.created.append(request.data)
            if cluster.on_create:
                cluster.on_create(request.data)
        return answer


class Cluster:
    """The API server of one test.

    Attributes:
        faults: called with each request before it is served; what one returns is the answer.
        on_create: called with each new TrainJob, as Trainer's controller would be.
        on_delete: called when one is deleted.
        slow_deletion: deletions wait for a finalizer.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.on_create: Callable[[dict[str, Any]], None] | None = None
        self.on_delete: Callable[[], None] | None = None
        self.slow_deletion = False
        self.created: list[dict[str, Any]] = []
        self.deleted: list[str] = []
        self.numbers = itertools.count(1)
        self.clock: FakeClock | None = None
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self._loop = asyncio.new_event_loop()
        self._ready, self._stop = threading.Event(), None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._main())

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self.emulator = Emulator()
        self.emulator.cluster = self
        for resource in (TRAINJOBS, PODS):
            self.emulator.resources[resource] = {}
        async with self.emulator, kmock.Server(self.emulator) as server:
            self.url = str(server.url).rstrip("/")
            self._ready.set()
            await self._stop.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def connect(self) -> Any:
        """A client as `vlmflow.training.trainjob.client.connect` makes it."""
        from kubernetes import client

        made = client.Configuration(host=self.url)
        made.retries = False
        return client.ApiClient(made)

    # what is in the cluster

    def stamp(self, nanos: str = "") -> str:
        seconds = self.clock.now() if self.clock else 0.0
        moment = EPOCH + datetime.timedelta(seconds=int(seconds))
        return moment.strftime("%Y-%m-%dT%H:%M:%S") + nanos + "Z"

    def _object(self, resource: str, name: str) -> Any:
        try:
            found = self.emulator.objects[resource, NAMESPACE, name]
        except KeyError:
            return None
        return None if found.deleted else found

    def trainjob(self, name: str) -> dict[str, Any] | None:
        found = self._object(TRAINJOBS, name)
        return found.raw if found else None

    def only(self) -> dict[str, Any]:
        """The one TrainJob there is."""
        found = [raw for made in self.created if (raw := self.trainjob(made["metadata"]["name"]))]
        assert len({raw["metadata"]["name"] for raw in found}) == 1, found
        return found[-1]

    def put(self, resource: str, obj: dict[str, Any]) -> None:
        self.emulator.objects[resource, NAMESPACE, obj["metadata"]["name"]] = obj

    def patch(self, name: str, change: dict[str, Any]) -> None:
        self._object(TRAINJOBS, name).patch(change)

    def vanish(self, resource: str, name: str) -> None:
        self._object(resource, name).delete()

    # what a controller does

    def condition(self, kind: str, reason: str = "", message: str = "", status: str = "True") -> None:
        """Set a condition of the one TrainJob."""
        job = self.only()
        others = [c for c in (job.get("status") or {}).get("conditions") or [] if c["type"] != kind]
        made = {"type": kind, "status": status, "reason": reason, "message": message}
        self.patch(job["metadata"]["name"], {"status": {"conditions": [*others, made]}})

    def admit(self) -> None:
        """Kueue starts the TrainJob."""
        name = self.only()["metadata"]["name"]
        self.patch(name, {"spec": {"suspend": False}})

    def suspend(self) -> None:
        """Kueue stops it again."""
        self.patch(self.only()["metadata"]["name"], {"spec": {"suspend": True}})

    def pod(self, name: str, phase: str = "Running", index: int = 0, **status: Any) -> None:
        """A pod of the one TrainJob, or its new state."""
        labels = {
            JOBSET_LABEL: self.only()["metadata"]["name"],
            REPLICATED_LABEL: "node",
            INDEX_LABEL: str(index),
        }
        known = self._object(PODS, name)
        meta = {"name": name, "namespace": NAMESPACE, "labels": labels}
        meta |= {"uid": f"uid-{name}", "creationTimestamp": self.stamp()}
        if known:
            meta = known.raw["metadata"]
        self.put(PODS, {"metadata": meta, "status": {"phase": phase, **status}})
        self.logs.setdefault(name, [])

    def write(self, pod: str, *lines: str, nanos: str = ".5") -> None:
        """Lines of a pod's log, written now."""
        self.logs[pod] += [(self.stamp(nanos), line) for line in lines]

    # answers

    def log_answer(self, request: Request) -> Any:
        from aiohttp import web

        name = str(request.url.path).split("/")[-2]
        if name not in self.logs:
            return self.refusal(404, f'pods "{name}" not found')
        since = request.params.get("sinceTime", "")[:19]
        text = "".join(f"{stamp} {line}\n" for stamp, line in self.logs[name] if stamp[:19] >= since)
        return web.Response(text=text)

    def pods_answer(self, request: Request) -> Any:
        from aiohttp import web

        wanted = dict(part.split("=") for part in request.params["labelSelector"].split(","))
        found = [obj.raw for (resource, _, _), obj in self.emulator.objects.items() if resource.plural == "pods"]
        chosen = [pod for pod in found if wanted.items() <= pod["metadata"]["labels"].items()]
        return web.json_response({"items": chosen})

    @staticmethod
    def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Any:
        from aiohttp import web

        body = {"kind": "Status", "status": "Failure", "code": status, "message": message}
        return web.json_response(body, status=status, headers=headers)

    def fail(self, count: int, status: int = 500, match: str = "", headers: dict[str, str] | None = None) -> None:
        """The next `count` requests that match get this status; 0 = the connection is reset."""
        left = itertools.count(count, -1)

        def fault(request: Request) -> Any:
            what = f"{request.method.value} {request.url.path}"
            if match not in what:
                return None
            if next(left) <= 0:
                self.faults.remove(fault)
                return None
            if status:
                return self.refusal(status, "made up", headers)
            request._raw_request.transport.abort()
            raise ConnectionResetError

        self.faults.append(fault)


class FakeClock(Clock):
    """Time that passes only in sleeps; plays the events of a scenario when they are due."""

    def __init__(self, cluster: Cluster | None = None) -> None:
        super().__init__(chance=lambda: 0.5)
        self.time = 0.0
        self.sleeps: list[float] = []
        self._events: list[tuple[float, int, Callable[[], Any]]] = []
        self._count = itertools.count()
        if cluster is not None:
            cluster.clock = self

    def at(self, when: float, *actions: Callable[[], Any]) -> None:
        """Play actions at a time, in seconds since the start."""
        self._events += [(when, next(self._count), action) for action in actions]
        self._events.sort(key=lambda event: event[:2])

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds > 0, "a loop that does not sleep would spin"
        assert self.time < 40 * 86400, "nothing ever ended this wait"
        self.sleeps.append(seconds)
        self.time += seconds
        while self._events and self._events[0][0] <= self.time:
            self._events.pop(0)[2]()
