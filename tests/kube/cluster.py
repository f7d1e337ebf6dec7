"""A Kubernetes cluster on this machine: a real control plane, and nodes whose pods are processes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kubernetes import client
from kubernetes.client.exceptions import ApiException

from kube.control_plane import ControlPlane, find_binary
from kube.kubelet import Kubelet, remove_leftovers
from kube.kubelet.rest import Object, Rest, path
from kube.network import ClusterNetwork

_PREFIX = "tandem-kube"
SOON = 240.0
"""Seconds that the slowest machine needs for what is not a matter of time."""
_LOOK_S = 0.5
"""How often `wait` looks again when nothing that the kubelet watches has changed."""

T = TypeVar("T")


class Cluster:
    """Start and stop it on one thread, which is in the cluster's network meanwhile. For the rest, see `conftest.py`."""

    def __init__(self) -> None:
        base = Path(tempfile.gettempdir())
        remove_leftovers(base, _PREFIX)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{os.getpid()}-", dir=base))
        self._network = ClusterNetwork()
        self._numbers = itertools.count(1)
        self._up = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        self._up.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._up.callback(self._network.leave)
        self._network.enter()
        (self.folder / "control-plane").mkdir()
        self.control_plane = ControlPlane(self.folder / "control-plane")
        self._up.callback(self.control_plane.stop)
        self.control_plane.start()
        self.kubeconfig = self.control_plane.kubeconfig()
        self.api = self._client("admin")
        self.kubelet = Kubelet(self.api, self.folder / "kubelet")
        self._up.callback(self.kubelet.stop)
        self.kubelet.start()
        self.rest: Rest = self.kubelet.rest

    def stop(self) -> None:
        """End everything, and leave the cluster's network."""
        self._up.close()

    def _client(self, user: str) -> client.ApiClient:
        folder = self.control_plane.folder
        configuration = client.Configuration()
        configuration.host = self.control_plane.url
        configuration.ssl_ca_cert = str(folder / "ca.crt")
        configuration.cert_file = str(folder / f"{user}.crt")
        configuration.key_file = str(folder / f"{user}.key")
        configuration.connection_pool_maxsize = 64
        return client.ApiClient(configuration)

    def kubectl(
        self, *arguments: str, input: str | None = None, check: bool = True, kubeconfig: Path | None = None
    ) -> str:
        """Standard output of kubectl as the administrator, or as the holder of a kubeconfig.

        With `check`, an error is an AssertionError with what kubectl said; without, that is returned too.
        """
        command = [str(find_binary("kubectl")), "--kubeconfig", str(kubeconfig or self.kubeconfig), *arguments]
        env = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=120, check=False, env=env)
        if not check:
            return done.stdout + done.stderr
        assert done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr.strip()}"
        return done.stdout

    def apply(self, *objects: Object, namespace: str) -> None:
        """`kubectl apply` of objects as dictionaries."""
        items = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "--namespace", namespace, "-f", "-", input=json.dumps(items))

    def get(self, kind: str, name: str, namespace: str | None = None, *, group: str = "v1") -> Object | None:
        """One object, by the plural of its kind and its group (as `apps/v1`), or None."""
        try:
            found: Object = self.rest.persist("GET", path(kind, namespace, name, group=group))
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        return found

    def pod(self, name: str, namespace: str) -> Object | None:
        """A pod as the kubelet's watch knows it, or None."""
        found = self.kubelet.objects("pods", namespace)
        return next((one for one in found if one["metadata"]["name"] == name), None)

    def ready(self, name: str, namespace: str) -> bool:
        """Whether a pod is ready, and stays."""
        pod = self.pod(name, namespace)
        if pod is None or "deletionTimestamp" in pod["metadata"]:
            return False
        conditions = pod.get("status", {}).get("conditions", [])
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    def address(self, service: str, namespace: str) -> str:
        """ClusterIP of a Service."""
        found = self.get("services", service, namespace)
        assert found is not None, f"there is no Service {service} in {namespace}"
        return str(found["spec"]["clusterIP"])

    def events(self, name: str, namespace: str) -> list[str]:
        """`reason: message` of the Events of an object, the oldest first."""
        query = {"fieldSelector": f"involvedObject.name={name}"}
        found = self.rest.persist("GET", path("events", namespace), **query)["items"]
        found.sort(key=lambda one: one.get("firstTimestamp") or one.get("eventTime") or "")
        return [f"{one['reason']}: {one.get('message', '')}" for one in found]

    def wait(self, true: Callable[[], T], within: float, what: str = "") -> T:
        """Wait until `true()` is, and return it; asked again on every change that the kubelet sees, and every 0.5 s.

        An AssertionError in it counts as not yet. After `within` seconds: AssertionError.
        """
        deadline = time.monotonic() + within
        while True:
            why = ""
            try:
                if found := true():
                    return found
            except AssertionError as error:
                why = f" ({error})"
            left = deadline - time.monotonic()
            assert left > 0, f"not within {within:g} s: {what or getattr(true, '__name__', 'it')}{why}"
            with self.kubelet.changes:
                self.kubelet.changes.wait(min(left, _LOOK_S))

    @contextlib.contextmanager
    def namespace(self, prefix: str = "test") -> Iterator[str]:
        """A fresh namespace; at the end its pods are killed and it is deleted, which goes on in the background."""
        name = f"{prefix}-{next(self._numbers)}"
        self.rest.persist("POST", path("namespaces"), {"metadata": {"name": name}})
        self.wait(lambda: self.get("serviceaccounts", "default", name), 120, "the default service account")
        self.wait(lambda: self.get("configmaps", "kube-root-ca.crt", name), 120, "the certificate of the API server")
        try:
            yield name
        finally:
            self.rest.persist("DELETE", path("namespaces", None, name))
            self.kubectl(
                "delete",
                "pods",
                "--all",
                "--namespace",
                name,
                "--force",
                "--grace-period=0",
                "--wait=false",
                check=False,
            )

    def service_account(self, name: str, namespace: str) -> Path:
        """A kubeconfig that acts as a service account, which must be there."""
        where = path("serviceaccounts/token", namespace, name)
        body: dict[str, Any] = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        token = self.rest.persist("POST", where, body)["status"]["token"]
        return self.control_plane.kubeconfig_of_token(f"{namespace}-{name}", token, namespace)

    def restart_api_server(self, away_s: float = 0.0, how: signal.Signals = signal.SIGKILL) -> None:
        """End the API server, leave it away for a while, start it again, and return when it is ready."""
        self.control_plane.restart_api_server(away_s, how)

    def slow_etcd(self, stopped_s: float = 0.4, running_s: float = 0.1) -> contextlib.AbstractContextManager[None]:
        """Meanwhile etcd runs in short bursts only."""
        return self.control_plane.slow_etcd(stopped_s, running_s)
