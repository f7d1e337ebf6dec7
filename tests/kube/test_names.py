"""Names and addresses of Services, rendered without a cluster."""

from __future__ import annotations

from typing import Any

from kube.kubelet.names import hosts
from kube.kubelet.proxy import ruleset
from kube.kubelet.rest import Object


def service(name: str, address: str, namespace: str = "n") -> Object:
    ports = [{"port": 80}]
    return {"metadata": {"name": name, "namespace": namespace}, "spec": {"clusterIP": address, "ports": ports}}


def endpoints(name: str, *addresses: dict[str, Any]) -> Object:
    subsets = [{"addresses": list(addresses), "ports": [{"port": 8000}]}]
    return {"metadata": {"name": name, "namespace": "n"}, "subsets": subsets}


def names(services: list[Object], found: list[Object]) -> dict[str, set[str]]:
    """Addresses by name, as a pod of namespace n sees them."""
    result: dict[str, set[str]] = {}
    for line in hosts(services, found, "n", ("10.0.0.9", "me"), []).splitlines():
        address, *known = line.split()
        for name in known:
            result.setdefault(name, set()).add(address)
    return result


def test_a_service_has_its_names() -> None:
    seen = names([service("web", "10.1.0.1")], [])
    assert {name for name in seen if name.startswith("web")} == {
        "web", "web.n", "web.n.svc", "web.n.svc.cluster.local"
    }  # fmt: skip


def test_the_short_name_is_that_of_the_own_namespace() -> None:
    seen = names([service("web", "10.1.0.1"), service("web", "10.1.0.2", "other")], [])
    assert seen["web"] == {"10.1.0.1"}
    assert seen["web.other"] == {"10.1.0.2"}


def test_a_headless_service_has_the_addresses_of_its_ready_pods() -> None:
    pods = endpoints("peer", {"ip": "10.0.0.1", "hostname": "peer-0"}, {"ip": "10.0.0.2", "hostname": "peer-1"})
    seen = names([service("peer", "None")], [pods])
    assert seen["peer"] == {"10.0.0.1", "10.0.0.2"}
    assert seen["peer-1.peer.n.svc.cluster.local"] == {"10.0.0.2"}


def test_a_pod_knows_its_own_name() -> None:
    assert names([], [])["me"] == {"10.0.0.9"}


def test_connections_go_to_each_endpoint_by_chance() -> None:
    rules = ruleset([service("web", "10.1.0.1")], [endpoints("web", {"ip": "10.0.0.1"}, {"ip": "10.0.0.2"})])
    assert (
        "ip daddr 10.1.0.1 tcp dport 80 dnat ip to numgen random mod 2 "
        "map { 0 : 10.0.0.1 . 8000, 1 : 10.0.0.2 . 8000 }" in rules
    )


def test_a_service_without_endpoints_is_refused() -> None:
    rules = ruleset([service("web", "10.1.0.1")], [])
    assert "ip daddr 10.1.0.1 tcp dport 80 reject with tcp reset" in rules
