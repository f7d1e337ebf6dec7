"""A whole fleet in the cluster, installed by the chart: the operator's pod, Ray's head, Redis, gateway and engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from chaos.recipes import Expected
from chaos.traffic import References, Traffic, take_references
from kube.cluster import Cluster
from kube.kubelet import Image
from support.helm import CHART, helm
from tandem.models.tiny import ensure_tiny

NAME = "mini"
RACK = "topology.tandem.dev/rack"
OPERATOR_ACCOUNT = "tandem-operator"
MODEL = "tiny"
_TOKENS_S = 120.0
"""Clients must be given a token within this, whatever happens to the fleet."""

OPERATOR_IMAGE, ENGINE_IMAGE = "tandem-operator:test", "tandem-engine:test"
NEXT_IMAGE, MISSING_IMAGE = "tandem-engine:next", "tandem-engine:missing"


def values(**spec: Any) -> dict[str, Any]:
    """Values of the chart for a fleet that two cores can run; `spec` is put over the Fleet's."""
    small = {"resources": {"requests": {"cpu": "100m", "memory": "64Mi"}}, "nodeSelector": {RACK: "a"}}
    # More than half of a test node, so that each engine has one of its own, and only at need that of the gateway.
    engine = {
        "resources": {"requests": {"cpu": "40", "memory": "64Mi"}},
        "sharedMemory": "256Mi",
        "ipcLock": False,
        "terminationGraceSeconds": 40,
    }
    pool = {"groups": 1, "nodes": 1, "gpusPerNode": 1, "pods": engine, "rollout": {"canarySeconds": 2}}
    fleet: dict[str, Any] = {
        "device": "cpu",
        "images": {"engine": {"name": ENGINE_IMAGE}, "redis": {"name": "redis:test"}},
        "prefill": pool,
        "decode": pool,
        "gateway": {"auth": "off", "replicas": 2, "pods": small},
        "redis": {"pods": small},
        "ray": {"pods": small},
        "timeouts": {"drainSeconds": 30, "migrateSeconds": 25},
    }
    for key, value in spec.items():
        fleet[key] = {**fleet.get(key, {}), **value} if isinstance(value, dict) else value
    return {
        "operator": {"replicas": 1, "image": {"name": OPERATOR_IMAGE}},
        "fleet": {"create": True, "name": NAME, "spec": fleet},
    }


class LiveFleet:
    """A fleet that answers. Made by `install`."""

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self._folder = folder
        self._references: References | None = None

    @property
    def url(self) -> str:
        """Of the gateway, by its Service's address."""
        return f"http://{self.cluster.address(NAME, self.namespace)}:8000"

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One of Tandem's objects, which must be there."""
        found = self.cluster.get(kind, name, self.namespace, group="tandem.dev/v1alpha1")
        assert found is not None, f"there is no {kind} {name}"
        return found

    def groups(self, role: str) -> dict[str, str]:
        """Phase of each group of a role, by its name."""
        listed = json.loads(self.kubectl("get", "epg", "-o", "json"))["items"]
        return {
            one["metadata"]["name"]: one.get("status", {}).get("phase", "")
            for one in listed
            if one["spec"]["role"] == role
        }

    def ready(self, role: str, count: int) -> bool:
        """Whether a role has exactly so many groups, all of them ready."""
        groups = self.groups(role)
        return len(groups) == count and set(groups.values()) <= {"Ready"}

    def epoch(self, group: str) -> int:
        """The epoch of an ExpertParallelGroup, by its name; raised whenever its engines start anew."""
        return int(self.get("expertparallelgroups", group).get("status", {}).get("epoch", 0))

    def migrations(self) -> Counter[str]:
        """How many streams the gateways gave a new pair until now, by the reason: "moved", or how they broke."""
        return self._counted("tandem_migrations_total", "reason")

    def legs(self) -> Counter[str]:
        """How many legs of requests the gateways have sent to each group and seen the end of, by the group's id."""
        return self._counted("tandem_legs_total", "group")

    def _counted(self, metric: str, label: str) -> Counter[str]:
        """A metric of all gateways, by a label."""
        counts: Counter[str] = Counter()
        for pod in self.gateways():
            answer = httpx2.get(f"http://{pod['status']['podIP']}:8000/metrics", timeout=30)
            assert answer.status_code == 200, answer.text
            for line in answer.text.splitlines():
                if found := re.fullmatch(rf'{metric}\{{.*\b{label}="(.*?)".*\}} (\S+)', line):
                    counts[found[1]] += int(float(found[2]))
        return counts

    def gateways(self) -> list[dict[str, Any]]:
        """The gateways' pods."""
        pods = self.cluster.kubelet.objects("pods", self.namespace)
        return [one for one in pods if one["metadata"].get("labels", {}).get("tandem.dev/component") == "gateway"]

    def kubectl(self, *arguments: str, **options: Any) -> str:
        """kubectl in the fleet's namespace."""
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, **options)

    def upgrade(self, **spec: Any) -> None:
        """`helm upgrade` with another spec."""
        _helm(self.cluster, "upgrade", self.namespace, self._folder, values(**spec))

    def chat(self, text: str, tokens: int = 16) -> dict[str, Any]:
        """One greedy answer, whole."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
        answer = httpx2.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def references(self) -> References:
        """What each recipe's answer is; greedy ones are also the oracle's."""
        if self._references is None:
            model = self._folder / MODEL
            ensure_tiny(model)
            self._references = asyncio.run(take_references(self.url, MODEL, Expected(model, self._folder)))
        return self._references

    @contextlib.contextmanager
    def traffic(self, clients: int = 2) -> Iterator[Background]:
        """Clients that ask without a pause meanwhile; in the end each answer must be whole and right, and have been
        given at the first try."""
        background = Background(self.url, self.references(), clients)
        try:
            yield background
            background.progress(20)
        finally:
            background.stop()
        done = background.done
        assert done
        wrong = [f"{one.name} ({one.recipe}): {why}" for one in done if (why := self.references().fault(one))]
        again = [f"{one.name} ({one.recipe}): {one.tries} tries" for one in done if one.tries > 1]
        print(f"{len(done)} answers, {len(wrong)} wrong, {len(again)} of them after more than one try")
        assert not wrong, f"{len(wrong)} of {len(done)} answers: {wrong[:5]}"
        assert not again, f"connections broke for {len(again)} of {len(done)}: {again[:5]}"


class Background:
    """Traffic on a thread of its own, which is where the caller's thread is: in the cluster's network."""

    def __init__(self, base: str, references: References, clients: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="traffic", daemon=True)
        self._thread.start()
        self._traffic = self._call(self._start(base, references, clients))

    async def _start(self, base: str, references: References, clients: int) -> Traffic:
        traffic = Traffic({False: base}, MODEL, references, random.Random(5))
        traffic.start(clients)
        return traffic

    @property
    def done(self) -> list[Any]:
        """Requests that are over."""
        return self._traffic.done

    def progress(self, tokens: int) -> None:
        """Wait until clients have been given so many tokens more."""
        self._call(self._traffic.progress(tokens, _TOKENS_S))

    def stop(self) -> None:
        """Let what runs end."""
        try:
            self._call(self._traffic.stop())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(300)


def install(
    cluster: Cluster, namespace: str, folder: Path, *, operator: dict[str, Any] | None = None, **spec: Any
) -> LiveFleet:
    """`helm install`, without a wait. `operator`: further values of its own."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for image in (OPERATOR_IMAGE, ENGINE_IMAGE, NEXT_IMAGE):
        cluster.kubelet.images[image] = Image(env={"PATH": programs})
    cluster.kubelet.missing_images.add(MISSING_IMAGE)
    chosen = values(**spec)
    chosen["operator"].update(operator or {})
    _helm(cluster, "install", namespace, folder, chosen)
    return LiveFleet(cluster, namespace, folder)


def uninstall(fleet: LiveFleet) -> None:
    """Remove the fleet, then the release; the CRDs stay, as Helm has it."""
    fleet.kubectl("delete", "fleet", NAME, "--wait=true", "--timeout=90s")
    helm("uninstall", "tandem", "--namespace", fleet.namespace, kubeconfig=fleet.cluster.kubeconfig)


def _helm(cluster: Cluster, verb: str, namespace: str, folder: Path, chosen: dict[str, Any]) -> None:
    file = folder / f"values-{time.monotonic_ns()}.json"
    file.write_text(json.dumps(chosen))
    helm(verb, "tandem", CHART, "--namespace", namespace, "-f", file, kubeconfig=cluster.kubeconfig)
