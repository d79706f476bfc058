"""A Kubernetes control plane on loopback: etcd, API server and controller manager, with RBAC and admission as in a cluster.

The binaries come from the folder that KUBEBUILDER_ASSETS names, as for controller-runtime's envtest. There is no
scheduler, no kubelet and no network: `node.py` stands in for them.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

BINARIES = ("etcd", "kube-apiserver", "kube-controller-manager")
HELP = """KUBEBUILDER_ASSETS must name a folder with the programs etcd, kube-apiserver and kube-controller-manager ({found}).
`setup-envtest use 1.36` (sigs.k8s.io/controller-runtime/tools/setup-envtest) brings the first two and prints the folder;
put kube-controller-manager of the same Kubernetes release beside them (dl.k8s.io/release/VERSION/bin/linux/amd64/)."""
# Controllers that need a cloud or live nodes: without heartbeats the node would be called lost and its pods deleted.
WITHOUT = ("node-lifecycle-controller", "node-ipam-controller", "cloud-node-lifecycle-controller", "node-route-controller", "service-lb-controller")  # fmt: skip
START = 300.0  # seconds until the API server is ready; it takes 10 on a free machine
ADMIN = "admin"


def assets() -> Path:
    """The folder of the binaries. Raises RuntimeError that says how to get them."""
    folder = os.environ.get("KUBEBUILDER_ASSETS", "")
    if not folder:
        raise RuntimeError(HELP.format(found="it is not set"))
    if missing := [name for name in BINARIES if not os.access(Path(folder) / name, os.X_OK)]:
        raise RuntimeError(HELP.format(found=f"{folder} lacks {', '.join(missing)}"))
    return Path(folder)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


class ControlPlane:
    """Started by `with`; ended with all its processes.

    Attributes:
        url: the API server's address.
        kubeconfig: file with the administrator's access.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs = folder, assets()
        self.token = secrets.token_hex(16)
        self.client_port, self.peer_port, self.port, self.manager_port = free_ports(4)
        self.url = f"https://127.0.0.1:{self.port}"
        self.authority = folder / "certificates" / "apiserver.crt"
        self.kubeconfig = folder / "kubeconfig"
        self.running: list[tuple[str, subprocess.Popen]] = []

    def __enter__(self) -> ControlPlane:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for _, process in reversed(self.running):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self) -> None:
        etcd = f"http://127.0.0.1:{self.client_port}"
        peer = f"http://127.0.0.1:{self.peer_port}"
        self._run(
            "etcd", data_dir=self.folder / "etcd", listen_client_urls=etcd, advertise_client_urls=etcd,
            listen_peer_urls=peer, unsafe_no_fsync="true",
        )  # fmt: skip
        key = self.folder / "accounts.key"
        key.write_bytes(_private_key())
        tokens = self.folder / "tokens.csv"
        tokens.touch(mode=0o600)
        tokens.write_text(f'{self.token},{ADMIN},{ADMIN},"system:masters"\n')
        issuer = "https://kubernetes.default.svc"
        self._run(
            "kube-apiserver", etcd_servers=etcd, bind_address="127.0.0.1", secure_port=self.port,
            cert_dir=self.folder / "certificates", authorization_mode="RBAC", token_auth_file=tokens,
            service_account_key_file=key, service_account_signing_key_file=key, service_account_issuer=issuer,
            service_cluster_ip_range="10.0.0.0/16", endpoint_reconciler_type="none", profiling="false",
        )  # fmt: skip
        self._wait_ready()
        user = {"name": ADMIN, "user": {"token": self.token}}
        cluster = {"server": self.url, "certificate-authority": str(self.authority)}
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_text(yaml.safe_dump(self.access(user, cluster)))
        self._run(
            "kube-controller-manager", kubeconfig=self.kubeconfig, leader_elect="false", bind_address="127.0.0.1",
            secure_port=self.manager_port, cert_dir=self.folder / "manager", service_account_private_key_file=key,
            root_ca_file=self.authority, use_service_account_credentials="true",
            controllers=",".join(["*", *(f"-{name}" for name in WITHOUT)]),
        )  # fmt: skip

    @staticmethod
    def access(user: dict[str, Any], cluster: dict[str, Any]) -> dict[str, Any]:
        """A kubeconfig for one user of one cluster."""
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user["name"]}}],
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [user],
        }

    def _run(self, program: str, **flags: Any) -> None:
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        with (self.folder / f"{program}.log").open("wb") as log:
            process = subprocess.Popen([str(self.programs / program), *arguments], stdout=log, stderr=log)
        self.running.append((program, process))

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START
        while True:
            for program, process in self.running:
                if process.poll() is not None:
                    raise RuntimeError(f"{program} ended with {process.returncode}:\n{self.log(program)}")
            try:
                self.client().call_api("/readyz", "GET", auth_settings=["BearerToken"], _request_timeout=5)
                return
            except Exception as problem:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no API server in {START:.0f} s ({problem}):\n{self.log('kube-apiserver')}") from problem  # fmt: skip
            time.sleep(0.2)

    def log(self, program: str) -> str:
        """The end of a program's log."""
        return (self.folder / f"{program}.log").read_text(errors="replace")[-4000:]

    def client(self, token: str = "") -> Any:
        """A kubernetes ApiClient of the administrator, or of whom a token belongs to."""
        from kubernetes import client

        made = client.Configuration(host=self.url)
        made.api_key = {"authorization": f"Bearer {token or self.token}"}
        made.ssl_ca_cert = str(self.authority)
        made.retries = False
        return client.ApiClient(made)

    def account_token(self, namespace: str, account: str) -> str:
        """A token of a service account, as the kubelet asks one for a pod."""
        from kubernetes import client

        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
        core = client.CoreV1Api(self.client())
        return core.create_namespaced_service_account_token(account, namespace, body).status.token


def _private_key() -> bytes:
    """An RSA key in PEM: what service accounts' tokens are signed with."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
