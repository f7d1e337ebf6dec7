"""The control plane of the tests: it is a real one, and survives what tests do to it."""

from __future__ import annotations

from kube.cluster import Cluster


def test_an_account_without_a_role_may_do_nothing(cluster: Cluster, namespace: str) -> None:
    kubeconfig = cluster.service_account("default", namespace)
    said = cluster.kubectl("get", "pods", "--namespace", namespace, kubeconfig=kubeconfig, check=False)
    assert f"system:serviceaccount:{namespace}:default" in said
    assert "forbidden" in said.lower()


def test_pods_of_an_account_that_is_not_there_are_refused(cluster: Cluster, namespace: str) -> None:
    said = cluster.kubectl(
        "run", "stranger", "--image", "none", "--namespace", namespace,
        "--overrides", '{"spec": {"serviceAccountName": "nobody"}}', check=False,
    )  # fmt: skip
    assert 'serviceaccount "nobody" not found' in said


def test_what_was_written_is_there_after_a_restart(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("create", "configmap", "kept", "--from-literal", "a=b", "--namespace", namespace)
    before = cluster.control_plane.pid("kube-apiserver")
    cluster.restart_api_server()
    assert cluster.control_plane.pid("kube-apiserver") != before
    kept = cluster.get("configmaps", "kept", namespace)
    assert kept is not None
    assert kept["data"] == {"a": "b"}


def test_a_slow_etcd_answers_at_last(cluster: Cluster, namespace: str) -> None:
    with cluster.slow_etcd():
        for number in range(5):
            cluster.kubectl("create", "configmap", f"slow-{number}", "--namespace", namespace)
    assert all(cluster.get("configmaps", f"slow-{number}", namespace) for number in range(5))
