"""etcd, kube-apiserver and kube-controller-manager for tests, in the cluster's network (`network.py`).

The binaries come from the folder that KUBEBUILDER_ASSETS names (envtest's convention; here with kube-controller-manager
too), else from PATH: of Kubernetes 1.20 or any later release, both of the same. They die with the test process, and are
stopped by their process id.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kube.audit import POLICY
from kube.certificates import Authority, signing_pair
from kube.network import HOST, KUBERNETES, SERVICES
from tandem.fleet import bound

BINARIES = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
READY_S = 300.0
_STOP_S = 10.0

CONTROLLERS = (
    "cronjob,daemonset,deployment,disruption,endpoint,garbagecollector,horizontalpodautoscaling,job,namespace,"
    "pvc-protection,pv-protection,replicaset,resourcequota,root-ca-cert-publisher,serviceaccount,"
    "serviceaccount-token,statefulset"
)
"""Those whose work tests look at. Nodes' life and volumes are the process kubelet's (`kubelet/`)."""

_TOKENS_AS_LATER = "--feature-gates=BoundServiceAccountTokenVolume=true"
"""Before 1.21: pods get their token as on later servers, a projected volume, not a Secret."""


def find_binary(name: str) -> Path | None:
    """Where a program of the control plane is, or None."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets and os.access(inside := Path(assets) / name, os.X_OK):
        return inside
    found = shutil.which(name)
    return None if found is None else Path(found)


@functools.cache
def release() -> tuple[int, int]:
    """Major and minor number of the API server's release, as its binary says them. Raises RuntimeError."""
    binary = find_binary("kube-apiserver")
    if binary is None:
        raise RuntimeError(why_not())
    done = subprocess.run([str(binary), "--version"], capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"v(\d+)\.(\d+)", done.stdout)
    if found is None:
        raise RuntimeError(f"{binary} --version says no release: {done.stdout or done.stderr}")
    return int(found[1]), int(found[2])


def has_cel() -> bool:
    """Whether the server holds objects to rules in CEL. Before 1.25 it drops those rules, or refuses to apply them."""
    return release() >= (1, 25)


def budget_api() -> str:
    """Group and version of PodDisruptionBudgets."""
    return "policy/v1" if release() >= (1, 21) else "policy/v1beta1"


def why_not() -> str | None:
    """Why no control plane can run here, or None."""
    if os.geteuid() != 0:
        return "tests/kube needs root, to make network namespaces"
    if any(Path(one).resolve().is_relative_to("/tmp") for one in (sys.prefix, __file__)):
        return "tests/kube cannot run from a checkout below /tmp, of which pods have their own: put it elsewhere"
    tools = [name for name in ("ip", "nft", "nsenter") if shutil.which(name) is None]
    missing = [name for name in BINARIES if find_binary(name) is None]
    if not tools and not missing:
        return None
    return (
        f"tests/kube needs {', '.join([*missing, *tools])}: set KUBEBUILDER_ASSETS to a folder with "
        f"{', '.join(BINARIES)} (or have them in PATH), and install iproute2, nftables and util-linux"
    )


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class ControlPlane:
    """A control plane with certificates, ports and data of its own. Start it inside the cluster's network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"https://{HOST}:{_free_port(HOST)}"
        self._etcd = f"http://127.0.0.1:{_free_port('127.0.0.1')}"
        self._peers = f"http://127.0.0.1:{_free_port('127.0.0.1')}"
        self._controller_port = _free_port("127.0.0.1")
        # One thread starts every process: they die with the thread that started them, and a test's threads end.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="control-plane")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._restarts = threading.Lock()

    def start(self) -> None:
        """Start all three; return when the API server is ready. Raises RuntimeError with the log of what failed."""
        authority = Authority(self.folder)
        names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
        authority.server("server", [HOST, "127.0.0.1", KUBERNETES], ["localhost", *names])
        authority.client("admin", "admin", "system:masters")
        authority.client("controller-manager", "system:kube-controller-manager")
        signing_pair(self.folder, "service-accounts")
        try:
            self._start_etcd()
            self.start_api_server()
            self.start_controller_manager()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process."""
        for name in ("kube-controller-manager", "kube-apiserver", "etcd"):
            self._end(name, signal.SIGKILL)
        self._starter.shutdown()

    def pid(self, name: str) -> int:
        """Process id of one of the three."""
        return self._processes[name].pid

    @property
    def audit_log(self) -> Path:
        """What service accounts asked for, as `audit.py` reads it."""
        return self.folder / "audit.log"

    def log(self, name: str) -> str:
        """The last of what one of the three wrote."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def kubeconfig(self, user: str = "admin") -> Path:
        """A kubeconfig for the holder of a certificate."""
        certificate, key = (self._encoded(f"{user}.{kind}") for kind in ("crt", "key"))
        return self._write_kubeconfig(user, {"client-certificate-data": certificate, "client-key-data": key})

    def kubeconfig_of_token(self, name: str, token: str, namespace: str = "default") -> Path:
        """A kubeconfig for the holder of a service account's token."""
        return self._write_kubeconfig(name, {"token": token}, namespace)

    def _encoded(self, name: str) -> str:
        return base64.b64encode((self.folder / name).read_bytes()).decode()

    def _write_kubeconfig(self, name: str, user: dict[str, str], namespace: str = "default") -> Path:
        cluster = {"server": self.url, "certificate-authority-data": self._encoded("ca.crt")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name, "namespace": namespace}}],
        }
        path = self.folder / f"{name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        return path

    def _start_etcd(self) -> None:
        self._start(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={self._etcd}",
            f"--advertise-client-urls={self._etcd}",
            f"--listen-peer-urls={self._peers}",
            f"--initial-advertise-peer-urls={self._peers}",
            f"--initial-cluster=default={self._peers}",
            "--unsafe-no-fsync",
        )

    def start_api_server(self) -> None:
        """Start the API server, on the port and with the data that it had before; return when it is ready."""
        policy = self.folder / "audit-policy.json"
        policy.write_text(json.dumps(POLICY))
        self._start(
            "kube-apiserver",
            f"--etcd-servers={self._etcd}",
            f"--bind-address={HOST}",
            f"--advertise-address={HOST}",
            f"--secure-port={self.url.rpartition(':')[2]}",
            f"--tls-cert-file={self.folder / 'server.crt'}",
            f"--tls-private-key-file={self.folder / 'server.key'}",
            f"--client-ca-file={self.folder / 'ca.crt'}",
            "--authorization-mode=RBAC",
            f"--service-account-key-file={self.folder / 'service-accounts.pub'}",
            f"--service-account-signing-key-file={self.folder / 'service-accounts.key'}",
            f"--service-account-issuer={self.url}",
            f"--api-audiences={self.url}",
            f"--service-cluster-ip-range={SERVICES}",
            # Writes the endpoints of the Service `kubernetes`.
            "--endpoint-reconciler-type=master-count",
            "--apiserver-count=1",
            *([_TOKENS_AS_LATER] if release() < (1, 21) else []),
            "--allow-privileged=true",
            f"--cert-dir={self.folder / 'api-server'}",
            "--profiling=false",
            f"--audit-policy-file={policy}",
            f"--audit-log-path={self.audit_log}",
        )
        self._wait_ready()

    def stop_api_server(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End the API server; SIGTERM lets it finish what it answers."""
        self._end("kube-apiserver", how)

    def restart_api_server(self, away_s: float = 0.0, how: signal.Signals = signal.SIGKILL) -> None:
        """Stop the API server, leave it away for a while, and start it again."""
        with self._restarts:
            self.stop_api_server(how)
            time.sleep(away_s)
            self.start_api_server()

    def start_controller_manager(self) -> None:
        """Start the controller manager; it needs a second or two before it acts."""
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig('controller-manager')}",
            f"--controllers={CONTROLLERS}",
            f"--service-account-private-key-file={self.folder / 'service-accounts.key'}",
            f"--root-ca-file={self.folder / 'ca.crt'}",
            "--use-service-account-credentials=true",
            *([_TOKENS_AS_LATER] if release() < (1, 21) else []),
            "--leader-elect=false",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._controller_port}",
            *(["--port=0"] if release() < (1, 22) else []),  # it listened without TLS, too
            f"--cert-dir={self.folder / 'controller-manager'}",
        )

    def restart_controller_manager(self) -> None:
        """Start it anew, so that it garbage-collects kinds whose definitions came after its start at once."""
        self._end("kube-controller-manager", signal.SIGKILL)
        self.start_controller_manager()

    @contextlib.contextmanager
    def slow_etcd(self, stopped_s: float = 0.4, running_s: float = 0.1, seed: int = 1) -> Iterator[None]:
        """Let etcd run in short bursts only: about `running_s` after each pause of up to twice `stopped_s`."""
        rng = random.Random(seed)
        done = threading.Event()
        process = self._processes["etcd"]

        def hamper() -> None:
            while not done.is_set():
                process.send_signal(signal.SIGSTOP)
                done.wait(rng.uniform(0, 2 * stopped_s))
                process.send_signal(signal.SIGCONT)
                done.wait(rng.uniform(0, 2 * running_s))

        thread = threading.Thread(target=hamper, name="slow-etcd", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _start(self, name: str, *arguments: str) -> None:
        binary = find_binary(name)
        if binary is None:
            raise RuntimeError(why_not())
        command = [sys.executable, "-S", "-E", bound.__file__, str(os.getpid()), str(binary), *arguments]

        def run() -> subprocess.Popen[bytes]:
            with (self.folder / f"{name}.log").open("ab") as log:
                return subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
                )

        self._processes[name] = self._starter.submit(run).result()

    def _end(self, name: str, how: signal.Signals) -> None:
        process = self._processes.get(name)
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _wait_ready(self) -> None:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        context.load_cert_chain(self.folder / "admin.crt", self.folder / "admin.key")
        deadline = time.monotonic() + READY_S
        while True:
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended with code {process.returncode}; its log ends: {self.log(name)}")
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", context=context, timeout=5):
                    return
            except (urllib.error.URLError, OSError) as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the API server was not ready after {READY_S:.0f} s ({error}); "
                        f"its log ends: {self.log('kube-apiserver')}"
                    ) from error
            time.sleep(0.1)
