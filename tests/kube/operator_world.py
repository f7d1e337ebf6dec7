"""The operator as a process on a real API server, with a control service that stands for a fleet."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kube.cluster import SOON, Cluster
from kube.control_plane import budget_api, has_cel
from kube.fleet_control import FleetControl
from tandem_operator import crds

IMAGE = "registry.invalid/tandem:none"
KINDS = "fleets,epp,epg,statefulsets,services,configmaps,poddisruptionbudgets"
GROUPS = {
    "statefulsets": "apps/v1",
    "services": "v1",
    "configmaps": "v1",
    "pods": "v1",
    "leases": "coordination.k8s.io/v1",
    "podgroups": "scheduling.volcano.sh/v1beta1",
}
"""Of kinds that are not ours."""


EVERYWHERE = ("*",)
NOWHERE = {"nodeSelector": {"tandem.dev/nowhere": "yes"}}
"""No node has it: pods wait, and cost nothing."""


def pool(**more: Any) -> dict[str, Any]:
    """What a Fleet says of a pool whose pods are never scheduled."""
    return {"nodes": 1, "gpusPerNode": 1, "rollout": {"canarySeconds": 0}, "pods": NOWHERE, **more}


def apply_kinds(cluster: Cluster, *, cel: bool) -> None:
    """Give the server our CustomResourceDefinitions, with rules in CEL or without."""
    cluster.kubectl("apply", "-f", "-", input="---\n".join(crds.files(cel=cel).values()))


def established(cluster: Cluster) -> bool:
    """Whether the server serves all kinds that it was given. `kubectl wait` fails when one is so new that it
    has no conditions."""
    kinds = json.loads(cluster.kubectl("get", "crd", "--output", "json"))["items"]
    served = {"type": "Established", "status": "True"}
    return all(
        any(one.items() >= served.items() for one in kind.get("status", {}).get("conditions") or []) for kind in kinds
    )


def serve_kinds(cluster: Cluster) -> None:
    """Our resources are served, their objects are garbage-collected, and no pod of a fleet finds its image."""
    cluster.kubelet.missing_images.add(IMAGE)
    apply_kinds(cluster, cel=has_cel())
    cluster.wait(lambda: established(cluster), SOON, "all kinds are served")
    cluster.control_plane.restart_controller_manager()


@dataclass
class Operator:
    """One replica, as a process."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int

    def counted(self, name: str, **labels: str) -> float:
        """The sum of a metric over all others of its labels; 0 while it is not there."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return 0.0
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        lines = [line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(part in line for part in wanted))

    def is_ready(self) -> bool:
        """Whether its readiness probe passes."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def looks(self, kind: str) -> float:
        """How often it has looked at objects of that kind, with success."""
        return self.counted("tandem_operator_reconciles_total", kind=kind, result="done")

    def written(self, since: int = 0) -> str:
        """Its log from there on."""
        return self.log.read_text(errors="replace")[since:]

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(60)


@dataclass
class World:
    """A namespace with a Fleet, a control service, and operators."""

    cluster: Cluster
    namespace: str
    folder: Path
    control: FleetControl
    operators: list[Operator] = field(default_factory=list)

    def operator(
        self,
        *options: str,
        kubeconfig: Path | None = None,
        namespaces: Sequence[str] = (),
        lease_namespace: str = "",
        lease_s: int = 20,
    ) -> Operator:
        """Start one more. It is the administrator, and looks at this namespace, unless something else is said;
        `EVERYWHERE` = at all, told as the chart does it."""
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
            port = probe.getsockname()[1]
        log = self.folder / f"operator-{len(self.operators)}.log"
        command = [sys.executable, "-m", "tandem_operator.main", "run", "--port", str(port), *options]
        for namespace in () if namespaces == EVERYWHERE else namespaces or (self.namespace,):
            command += ["--namespace", namespace]
        command += ["--lease-namespace", lease_namespace or self.namespace, "--lease-seconds", str(lease_s)]
        env = {**os.environ, "KUBECONFIG": str(kubeconfig or self.cluster.kubeconfig)}
        env["TANDEM_OPERATOR_CONTROL"] = f"127.0.0.1:{self.control.port}"
        if namespaces == EVERYWHERE:
            env["TANDEM_OPERATOR_NAMESPACES"] = "*"
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        self.operators.append(Operator(process, log, port))
        return self.operators[-1]

    def fleet(self, name: str = "f", **spec: Any) -> None:
        """Apply a Fleet."""
        pool = {"nodes": 2, "gpusPerNode": 1, "rollout": {"canarySeconds": 0}}
        image = {"name": IMAGE}
        body = {
            "apiVersion": "tandem.dev/v1alpha1",
            "kind": "Fleet",
            "metadata": {"name": name},
            "spec": {"device": "cpu", "images": {"engine": image, "redis": image}, "prefill": pool, "decode": pool},
        }
        body["spec"].update(spec)  # type: ignore[attr-defined]
        self.cluster.apply(body, namespace=self.namespace)

    def all(self) -> dict[str, dict[str, Any]]:
        """Every object that is the fleet's, by kind/name."""
        found = json.loads(self.cluster.kubectl("get", KINDS, "-n", self.namespace, "-o", "json"))["items"]
        ours = [
            one for one in found if "tandem.dev/fleet" in one["metadata"].get("labels", {}) or one["kind"] == "Fleet"
        ]
        return {f"{one['kind']}/{one['metadata']['name']}": one for one in ours}

    def got(self, what: str) -> dict[str, Any] | None:
        """One object by plural and name, as `services/f`, unless it is being deleted."""
        kind, _, name = what.partition("/")
        group = budget_api() if kind == "poddisruptionbudgets" else GROUPS.get(kind, "tandem.dev/v1alpha1")
        found = self.cluster.get(kind, name, self.namespace, group=group)
        return found if found is not None and "deletionTimestamp" not in found["metadata"] else None

    def kubectl(self, *arguments: str) -> str:
        """kubectl in its namespace."""
        return self.cluster.kubectl("-n", self.namespace, *arguments)

    def one(self, name: str) -> dict[str, Any] | None:
        return self.all().get(name)

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        status = (self.one(name) or {}).get("status") or {}
        return next((entry for entry in status.get("conditions", ()) if entry["type"] == kind), {"status": "?"})

    def calm(self) -> bool:
        """Whether both groups of a new fleet have told of all their pods that they find no image, the last news."""
        groups = ("ExpertParallelGroup/f-prefill-0", "ExpertParallelGroup/f-decode-0")
        told = [self.condition(group, "PodsReady").get("message", "") for group in groups]
        assert all(message.count("ErrImagePull") == 2 for message in told), f"they say {told}"
        return True

    def ready(self, summary: str = "1/1 1/1") -> None:
        """Wait until that many groups are ready, and all is told."""

        def told() -> bool:
            found = self.all()
            groups = [one for name, one in found.items() if name.startswith("ExpertParallelGroup/")]
            fleet = found.get("Fleet/f", {}).get("status") or {}
            waiting = [one["metadata"]["name"] for one in groups if (one.get("status") or {}).get("phase") != "Ready"]
            assert not waiting, f"{waiting} are not ready"
            assert fleet.get("summary") == summary, f"the fleet has {fleet.get('summary')}"
            pools = [one.get("status") or {} for name, one in found.items() if name.startswith("ExpertParallelPool/")]
            assert all(pool.get("ready") == pool.get("replicas") for pool in pools), "pools do not know"
            return True

        self.wait(told)

    def wait(self, true: Any, what: str = "") -> Any:
        return self.cluster.wait(true, SOON, what)

    def write_report(self) -> str:
        return "\n".join(operator.log.read_text(errors="replace")[-4000:] for operator in self.operators)

    def close(self) -> None:
        """End the operators and the control service."""
        for operator in self.operators:
            if operator.process.poll() is None:
                operator.kill()
        print(self.write_report())  # in the report of a test that fails
        self.let_groups_go()
        self.control.close()

    def let_groups_go(self) -> None:
        """Whatever a failed test left waits for a drain that nobody does any more."""
        for group in json.loads(self.cluster.kubectl("get", "epg", "-n", self.namespace, "-o", "json"))["items"]:
            name = group["metadata"]["name"]
            patch = '{"metadata":{"finalizers":null}}'
            self.cluster.kubectl("patch", "epg", name, "-n", self.namespace, "--type=merge", "-p", patch, check=False)
