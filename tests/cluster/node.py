"""A node for one namespace: what scheduler, kubelet, volume provisioner and cluster DNS would do for the chart's pods.

Every pod is bound, its ConfigMaps, Secrets and claims are looked up as the kubelet does (a missing key keeps it waiting),
and its status is reported. With `real` the pods of our own services run as processes of this machine: init containers
first, commands and environment as the API gives them, readiness by their own probe. What differs from a cluster is only
the image (this checkout), the ports (free ones) and the name service (addresses in the environment are replaced).
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from control_plane import ControlPlane, free_ports

ROOT = str(Path(__file__).resolve().parents[2])
OURS = "vlmflow-services"  # the image whose commands this checkout can run
LOOK = 0.3  # seconds between two looks at the namespace
Json = dict[str, Any]


class Missing(Exception):
    """What a container needs and the API does not have."""


class Node:
    """Started by `with`.

    Args:
        real: run our services' commands; otherwise their pods are only reported as running or done.
        addresses: `NAME.NAMESPACE:PORT` of services that something else provides -> where it really is.

    Attributes:
        outputs: what each pod's container wrote, by pod.
        failures: (pod, exit code) of every container that failed.
    """

    def __init__(
        self,
        plane: ControlPlane,
        namespace: str,
        folder: Path,
        real: bool = False,
        addresses: dict[str, str] | None = None,
    ) -> None:
        from kubernetes import client

        self.plane, self.namespace, self.folder, self.real = plane, namespace, folder, real
        self.addresses = dict(addresses or {})
        self.core = client.CoreV1Api(plane.client())
        self.name = f"node-{namespace}"
        self.outputs: dict[str, Path] = {}
        self.failures: list[tuple[str, int]] = []
        self.problems: list[BaseException] = []
        self.processes: dict[str, subprocess.Popen] = {}
        self.threads: dict[str, threading.Thread] = {}
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.addressed = 0

    def __enter__(self) -> Node:
        self.core.create_node({"metadata": {"name": self.name}})
        self.looker = threading.Thread(target=self._look, daemon=True)
        self.looker.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        self.looker.join(60)
        for process in self.processes.values():
            _end(process)
        for thread in self.threads.values():
            thread.join(60)
        assert not self.problems, self.problems

    def _look(self) -> None:
        while not self.stop.wait(LOOK):
            try:
                self._provide_claims()
                for pod in self._get(f"/api/v1/namespaces/{self.namespace}/pods")["items"]:
                    uid = pod["metadata"]["uid"]
                    if pod["metadata"].get("deletionTimestamp"):
                        self._finish(pod)
                    elif uid not in self.threads and not pod["spec"].get("nodeName"):
                        self._bind(pod)
                        self.threads[uid] = threading.Thread(target=self._play, args=(pod,), daemon=True)
                        self.threads[uid].start()
            except Exception as problem:
                if not self.stop.is_set():
                    self.problems.append(problem)

    # what scheduler and provisioner do

    def _bind(self, pod: Json) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": self.name}
        body = {"metadata": {"name": pod["metadata"]["name"]}, "target": target}
        self.core.create_namespaced_pod_binding(pod["metadata"]["name"], self.namespace, body, _preload_content=False)

    def _provide_claims(self) -> None:
        for claim in self._get(f"/api/v1/namespaces/{self.namespace}/persistentvolumeclaims")["items"]:
            if claim["status"].get("phase") != "Pending" or claim["spec"].get("volumeName"):
                continue
            name = f"{self.namespace}-{claim['metadata']['name']}"
            if any(volume["metadata"]["name"] == name for volume in self._get("/api/v1/persistentvolumes")["items"]):
                continue
            wanted = claim["spec"]
            spec = {
                "capacity": {"storage": wanted["resources"]["requests"]["storage"]},
                "accessModes": wanted["accessModes"],
                "storageClassName": wanted.get("storageClassName", ""),
                "hostPath": {"path": str(self._volume(name))},
                "claimRef": {"namespace": self.namespace, "name": claim["metadata"]["name"]},
            }
            self.core.create_persistent_volume({"metadata": {"name": name}, "spec": spec})

    # what the kubelet does

    def _play(self, pod: Json) -> None:
        name, spec = pod["metadata"]["name"], pod["spec"]
        try:
            if not self._prepare(pod):
                return
            for container in spec.get("initContainers", []):
                while self._real(container) and (code := self._run(pod, container)):
                    if self._failed(pod, code) or spec["restartPolicy"] == "Never":
                        return
            while True:
                code = self._main(pod, spec["containers"][0])
                if code is None or self.stop.is_set():
                    return
                if code and self._failed(pod, code):
                    return
                if code == 0 and spec["restartPolicy"] != "Always":
                    return self._report(pod, "Succeeded", False)
                if spec["restartPolicy"] == "Never":
                    return self._report(pod, "Failed", False)
        except Exception as problem:
            if not self.stop.is_set() and not self._gone(name):
                self.problems.append(problem)

    def _prepare(self, pod: Json) -> bool:
        """Wait until everything that the pod refers to exists; False when the test ended first."""
        spec = pod["spec"]
        while not self.stop.is_set():
            try:
                for container in [*spec.get("initContainers", []), *spec["containers"]]:
                    self._environment(container)
                self._mount(pod)
                return True
            except Missing as missing:
                waiting = {"reason": "CreateContainerConfigError", "message": str(missing)}
                self._status(pod, {"phase": "Pending", "containerStatuses": [_container(pod, {"waiting": waiting})]})
                if self.stop.wait(1) or self._gone(pod["metadata"]["name"]):
                    return False
        return False

    def _main(self, pod: Json, container: Json) -> int | None:
        """Run the container to its end; None where it runs on and nobody waits for it."""
        if not self._real(container):
            once = pod["spec"]["restartPolicy"] != "Always"
            self._report(pod, "Succeeded" if once else "Running", not once)
            return None
        self._report(pod, "Running", not container.get("readinessProbe"))
        return self._run(pod, container, probed=True)

    def _real(self, container: Json) -> bool:
        return self.real and OURS in container["image"]

    def _run(self, pod: Json, container: Json, probed: bool = False) -> int:
        name = pod["metadata"]["name"]
        output = self.folder / f"{name}.{container['name']}.log"
        self.outputs[name] = output
        ports = {port["containerPort"]: self._port(pod, port) for port in container.get("ports", [])}
        folders = {mount["mountPath"]: self._volume_of(pod, mount["name"]) for mount in container["volumeMounts"]}
        temporary = folders.pop("/tmp")
        values = {"PATH": os.environ["PATH"], "PYTHONPATH": ROOT, "HOME": str(temporary), "TMPDIR": str(temporary)}
        # threads are this machine's business, not the chart's
        values |= {"OMP_NUM_THREADS": "1", "MLFLOW_WORKERS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        values |= {name: self._local(value, folders) for name, value in self._environment(container).items()}
        command = _command([*container["command"], *container.get("args", [])], ports)
        command = [self._local(part, folders) for part in command]
        with output.open("ab") as log:
            process = subprocess.Popen(
                command, env=values, cwd=temporary, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )  # fmt: skip
        self.processes[pod["metadata"]["uid"]] = process
        if probed and (probe := container.get("readinessProbe")):
            self._until_ready(pod, container, probe["httpGet"], ports, process)
        return process.wait()

    def _until_ready(self, pod: Json, container: Json, probe: Json, ports: dict[int, int], process: Any) -> None:
        number = {port["name"]: ports[port["containerPort"]] for port in container["ports"]}[probe["port"]]
        headers = {header["name"]: header["value"] for header in probe.get("httpHeaders", [])}
        asked = urllib.request.Request(f"http://127.0.0.1:{number}{probe['path']}", headers=headers)
        while process.poll() is None and not self.stop.wait(0.5):
            try:
                urllib.request.urlopen(asked, timeout=10).close()
                return self._report(pod, "Running", True)
            except OSError:
                continue

    def _failed(self, pod: Json, code: int) -> bool:
        """Note a container's failure; True when the pod is gone or the test at its end."""
        if self.stop.is_set() or self._gone(pod["metadata"]["name"]):
            return True
        self.failures.append((pod["metadata"]["name"], code))
        self._report(pod, "Running", False)
        return self.stop.wait(2)

    def _finish(self, pod: Json) -> None:
        """End a deleted pod's process and let go of its name."""
        from kubernetes.client.exceptions import ApiException

        if process := self.processes.pop(pod["metadata"]["uid"], None):
            _end(process)
        try:
            self.core.delete_namespaced_pod(pod["metadata"]["name"], self.namespace, grace_period_seconds=0, _preload_content=False)  # fmt: skip
        except ApiException as error:
            if error.status != 404:
                raise

    # volumes, environment, addresses

    def _volume(self, name: str) -> Path:
        folder = self.folder / "volumes" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _volume_of(self, pod: Json, name: str) -> Path:
        volume = next(volume for volume in pod["spec"]["volumes"] if volume["name"] == name)
        if claim := volume.get("persistentVolumeClaim"):
            return self._volume(f"{self.namespace}-{claim['claimName']}")
        return self._volume(f"{pod['metadata']['uid']}-{name}")

    def _mount(self, pod: Json) -> None:
        for volume in pod["spec"].get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                found = self._object("persistentvolumeclaims", claim["claimName"])
                if found["status"]["phase"] != "Bound":
                    raise Missing(f"claim {claim['claimName']} is {found['status']['phase']}")
            elif secret := volume.get("secret"):
                for key, value in self._object("secrets", secret["secretName"])["data"].items():
                    (self._volume_of(pod, volume["name"]) / key).write_bytes(base64.b64decode(value))
            elif config := volume.get("configMap"):
                for key, value in self._object("configmaps", config["name"])["data"].items():
                    (self._volume_of(pod, volume["name"]) / key).write_text(value)

    def _environment(self, container: Json) -> dict[str, str]:
        found = {}
        for entry in container.get("env", []):
            source = entry.get("valueFrom", {})
            if not source:
                found[entry["name"]] = entry.get("value", "")
                continue
            ((kind, reference),) = source.items()
            plural = {"secretKeyRef": "secrets", "configMapKeyRef": "configmaps"}[kind]
            try:
                data = self._object(plural, reference["name"]).get("data") or {}
                if reference["key"] not in data:
                    raise Missing(f"{plural} {reference['name']} has no key {reference['key']}")
            except Missing:
                if reference.get("optional"):
                    continue
                raise
            value = data[reference["key"]]
            found[entry["name"]] = base64.b64decode(value).decode() if plural == "secrets" else value
        return found

    def _local(self, text: str, folders: dict[str, Path]) -> str:
        """A value with this machine's addresses and folders in place of the cluster's."""
        self._services()
        for address, here in self.addresses.items():
            text = text.replace(address, here)
        for path, folder in folders.items():
            text = text.replace(path, str(folder))
        return text

    def _services(self) -> list[Json]:
        """Services of the namespace, each with an address of this machine."""
        found = self._get(f"/api/v1/namespaces/{self.namespace}/services")["items"]
        with self.lock:
            for service in found:
                for port in service["spec"]["ports"]:
                    name = f"{service['metadata']['name']}.{self.namespace}:{port['port']}"
                    if name not in self.addresses:
                        self.addresses[name] = f"127.0.0.1:{free_ports(1)[0]}"
        return found

    def _port(self, pod: Json, port: Json) -> int:
        """Where a container's port is on this machine: where its service is."""
        for service in self._services():
            if service["spec"].get("selector", {}).items() <= pod["metadata"]["labels"].items():
                for served in service["spec"]["ports"]:
                    if served["targetPort"] in (port["name"], port["containerPort"]):
                        name = f"{service['metadata']['name']}.{self.namespace}:{served['port']}"
                        return int(self.addresses[name].rpartition(":")[2])
        raise AssertionError(f"no service leads to port {port} of {pod['metadata']['name']}")

    # the API

    def _get(self, path: str) -> Json:
        return self.core.api_client.call_api(
            path, "GET", response_type="object", auth_settings=["BearerToken"], _return_http_data_only=True, _request_timeout=30
        )  # fmt: skip

    def _object(self, plural: str, name: str) -> Json:
        from kubernetes.client.exceptions import ApiException

        try:
            return self._get(f"/api/v1/namespaces/{self.namespace}/{plural}/{name}")
        except ApiException as error:
            if error.status == 404:
                raise Missing(f"{plural} {name} does not exist") from error
            raise

    def _gone(self, pod: str) -> bool:
        try:
            return bool(self._object("pods", pod)["metadata"].get("deletionTimestamp"))
        except Missing:
            return True

    def _report(self, pod: Json, phase: str, ready: bool) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if phase == "Running":
            state: Json = {"running": {"startedAt": now}}
        else:
            state = {"terminated": {"exitCode": 0 if phase == "Succeeded" else 1, "finishedAt": now, "startedAt": now}}
        conditions = [
            {"type": kind, "status": str(ready or kind == "PodScheduled"), "lastTransitionTime": now}
            for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
        ]
        self._status(
            pod,
            {
                "phase": phase,
                "startTime": now,
                "conditions": conditions,
                "containerStatuses": [_container(pod, state, ready)],
            },
        )

    def _status(self, pod: Json, status: Json) -> None:
        with self.lock:
            self.addressed += 1
            status.setdefault("podIP", f"10.1.{self.addressed // 250}.{self.addressed % 250 + 1}")
        self.core.patch_namespaced_pod_status(
            pod["metadata"]["name"], self.namespace, {"status": status}, _preload_content=False
        )


def _container(pod: Json, state: Json, ready: bool = False) -> Json:
    container = pod["spec"]["containers"][0]
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": container["image"],
        "ready": ready,
        "started": ready,
        "restartCount": 0,
        "state": state,
    }


def _command(parts: list[str], ports: dict[int, int]) -> list[str]:
    """The container's command with this checkout's interpreter and with ports of this machine."""
    programs = {"python": [sys.executable], "vlmflow": [sys.executable, "-m", "vlmflow.cli"]}
    made = [*programs[parts[0]], *parts[1:]]
    for asked, here in ports.items():
        made = [part.replace(f"--port={asked}", f"--port={here}").replace("0.0.0.0", "127.0.0.1") for part in made]
    if made[2:4] == ["services.mlflow_server", "serve"]:
        made += ["127.0.0.1", str(ports[5000])]
    return made


def _end(process: subprocess.Popen) -> None:
    """SIGTERM, and SIGKILL to what is left of the session."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
