"""What all pods of the process kubelet share: the API, folders, addresses, images."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path

from kubernetes.client.exceptions import ApiException

from kube import network
from kube.kubelet.claims import Claims
from kube.kubelet.informer import Informer, Key
from kube.kubelet.processes import Sandbox
from kube.kubelet.report import Events, StatusReports
from kube.kubelet.rest import Object, Rest, path
from kube.kubelet.wiring import Wiring

_HIDDEN = ("/tmp", "/var/tmp", "/run")
"""Folders of this machine that containers find empty, unless what runs the tests is inside."""


@dataclass(frozen=True)
class Image:
    """What an image name stands for: there are no images, every container sees this machine's programs."""

    env: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    """Its entry point, for containers without a command."""
    prefix: tuple[str, ...] = ()
    """Put before every command."""


class Addresses:
    """Hands out addresses; none comes back before all were given."""

    def __init__(self) -> None:
        self._pods = self._forever(network.PODS)
        self._nodes = self._forever(network.NODES)
        # The first of the nodes' is the API server's.
        assert next(self._nodes) == network.HOST
        self._links = 0
        self._lock = threading.Lock()

    @staticmethod
    def _forever(pool: IPv4Network) -> Iterator[str]:
        while True:
            yield from (str(one) for one in pool.hosts())

    def node(self) -> str:
        """For a node."""
        with self._lock:
            return next(self._nodes)

    def pod(self) -> str:
        """For a pod."""
        with self._lock:
            return next(self._pods)

    def connect(self, pid: int, address: str) -> None:
        """Give the network namespace of a process an address, and a link to the bridge. Raises RuntimeError."""
        with self._lock:
            self._links += 1
            link = f"pod{self._links}"
        network.ip(
            f"link add {link} type veth peer name eth0 netns {pid}\nlink set {link} master {network.BRIDGE} up\n"
        )
        network.ip(
            f"link set lo up\naddr add {address}/{network.NETWORK.prefixlen} dev eth0\nlink set eth0 up\n"
            f"route add default via {network.HOST}\n",
            inside=pid,
        )


class Host:
    """See the module."""

    def __init__(self, rest: Rest, folder: Path, informers: dict[str, Informer]) -> None:
        self.rest = rest
        self.folder = folder
        self.events = Events(rest, "kubelet")
        self.reports = StatusReports(rest)
        self.addresses = Addresses()
        self.claims = Claims(rest, folder / "claims", informers)
        self.backoff_s = 1.0
        self.missing_images: set[str] = set()
        self.images: dict[str, Image] = {}
        programs = Path(sys.executable).parent
        self.path = f"{programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        needed = [Path(sys.prefix), Path(sys.base_prefix), Path(__file__).resolve()]
        self.hidden = [one for one in _HIDDEN if not any(path.is_relative_to(one) for path in needed)]
        self.wiring = Wiring(informers)
        self._informers = informers
        self._lock = threading.Lock()
        self._logs: dict[tuple[str, str, int], Path] = {}
        self._node_addresses: dict[str, str] = {}
        self._node_networks: dict[str, Sandbox] = {}
        # Nodes' networks die with the thread that started them.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="node-networks")
        self.logs_folder.mkdir(parents=True, exist_ok=True)

    @property
    def logs_folder(self) -> Path:
        """Where all containers' output is."""
        return self.folder / "logs"

    def log_path(self, key: Key, uid: str, container: str, restart: int) -> Path:
        """The log of one run of a container: named NUMBER_NAMESPACE_POD_CONTAINER_RESTART, and numbered in order."""
        run = (uid, container, restart)
        with self._lock:
            if run not in self._logs:
                name = f"{len(self._logs):05}_{key[0]}_{key[1]}_{container}_{restart}.log"
                self._logs[run] = self.logs_folder / name
            return self._logs[run]

    def image(self, name: str) -> Image:
        """What an image stands for."""
        return self.images.get(name, Image())

    def services(self) -> list[Object]:
        """All Services."""
        return self._informers["services"].all()

    def allocatable(self, pod: Object) -> dict[str, str]:
        """What the pod's node offers."""
        node = self._informers["nodes"].get("", pod["spec"]["nodeName"]) or {"status": {}}
        return dict(node["status"].get("allocatable", {}))

    def find(self, kind: str, namespace: str, name: str) -> Object | None:
        """A ConfigMap or Secret as it is now, or None."""
        try:
            found: Object = self.rest.persist("GET", path(kind, namespace, name))
        except ApiException as error:
            if error.status == 404:
                return None
            raise
        return found

    def token(self, pod: Object, source: Object) -> str:
        """A token of the pod's service account, bound to the pod."""
        meta = pod["metadata"]
        bound = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
        spec = {"expirationSeconds": source.get("expirationSeconds", 3600), "boundObjectRef": bound}
        if source.get("audience"):
            spec["audiences"] = [source["audience"]]
        account = pod["spec"].get("serviceAccountName", "default")
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        answer = self.rest.persist("POST", path("serviceaccounts/token", meta["namespace"], account), body)
        return str(answer["status"]["token"])

    def claim(self, namespace: str, name: str) -> Path | None:
        """The folder of a bound claim."""
        return self.claims.folder_of(namespace, name)

    def node_address(self, node: str) -> str:
        """Address of a node."""
        if node not in self._node_addresses:
            self._node_addresses[node] = self.addresses.node()
        return self._node_addresses[node]

    def node_network(self, node: str) -> int:
        """A process in the node's own network, for pods with hostNetwork."""

        def make() -> int:
            if node not in self._node_networks:
                made = Sandbox(node, {})
                self.addresses.connect(made.pid, self.node_address(node))
                self._node_networks[node] = made
            return self._node_networks[node].pid

        return self._starter.submit(make).result()

    def connect(self, pid: int) -> str:
        """A new pod's address, on the network."""
        address = self.addresses.pod()
        self.addresses.connect(pid, address)
        return address

    def close(self) -> None:
        """End nodes' networks, and report no more."""
        self.events.close()
        self.reports.close()
        for one in self._node_networks.values():
            one.end()
        self._starter.shutdown()
