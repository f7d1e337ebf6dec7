"""Fixtures of the tests on Kubernetes.

`cluster` is one for all of `tests/kube`: real etcd, kube-apiserver and kube-controller-manager, and four nodes with 8
GPUs each (`node-a1`, `node-a2` in rack a, `node-b1`, `node-b2` in rack b) whose pods are processes of this machine.
While it is up, the test process is in the cluster's network: pods' addresses and ClusterIPs are reached as they are.

    cluster.api               the official client (ApiClient), as the administrator
    cluster.rest              the same with dictionaries: cluster.rest.persist("GET", path("pods", namespace))
    cluster.kubectl(*args)    standard output; input=…, check=False, kubeconfig=…
    cluster.kubeconfig        of the administrator; cluster.service_account(name, namespace) makes one for that account
    cluster.apply(*objects, namespace=…), .get(kind, name, namespace, group=…), .pod(name, namespace), .ready(…)
    cluster.address(service, namespace), .events(name, namespace)
    cluster.wait(true, within, what)    asks again on every change that the kubelet sees, and every half second
    cluster.namespace()       a fresh namespace for the length of a `with`; the fixture `namespace` is one for a test
    cluster.restart_api_server(away_s), .slow_etcd(), .control_plane.restart_controller_manager()
    cluster.kubelet           .logs(pod, container, namespace), .pids(…), .add_node(…), .remove_node(…), .lose_node(…),
                              .return_node(…), .missing_images, .images, .set_backoff(…); see `kubelet/__init__.py`

The controller manager finds kinds to garbage-collect every 30 s: restart it after CRDs were added, rather than wait.
Where the programs are not there, the tests are skipped; with TANDEM_REQUIRE_KUBE=1 they fail.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from kube.cluster import Cluster
from kube.control_plane import why_not
from kube.operator_world import serve_kinds

NODES = {"node-a1": "a", "node-a2": "a", "node-b1": "b", "node-b2": "b"}
"""The nodes of `cluster`, and their racks."""
RACK = "topology.tandem.dev/rack"


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """The cluster; see the module."""
    missing = why_not()
    if missing is not None:
        if os.environ.get("TANDEM_REQUIRE_KUBE") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    cluster = Cluster()
    try:
        for name, rack in NODES.items():
            cluster.kubelet.add_node(name, {RACK: rack, "topology.kubernetes.io/zone": "here"})
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def crds(cluster: Cluster) -> None:
    """Our resources are served."""
    serve_kinds(cluster)


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own. When the test fails, what its pods wrote last is in the report."""
    with cluster.namespace() as name:
        request.node.stash[_NAMESPACE] = name
        yield name


_NAMESPACE = pytest.StashKey[str]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever comes first waits for the control plane: a minute or more on a busy machine."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the logs of pods, and of the controllers that act for Kubernetes, to the report of a failed test."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and report.when == "call" and _NAMESPACE in item.stash and cluster is not None:
        report.sections.append(("pods", cluster.kubelet.tails(item.stash[_NAMESPACE])))
        report.sections.append(("controllers", cluster.control_plane.log("kube-controller-manager")))
    return report
