"""Deaths of the operator: each hits the replica that leads, and another one leads at once."""

from __future__ import annotations

import os
import random
import signal

from kube.kubelet.rest import path
from kube.live_fleet import Background, LiveFleet

LABEL = "app.kubernetes.io/component=operator"
BACKOFF_S = 0.1
"""Of pods that are to be back 3 s after a death at the latest, however often they died."""
_LEASE, _LEASES = "tandem-operator", "coordination.k8s.io/v1"
_LEADS_WITHIN_S = 90
_TOKENS = (5, 60)


def leader(fleet: LiveFleet) -> str:
    """Who holds the Lease; empty = nobody."""
    lease = fleet.cluster.get("leases", _LEASE, fleet.namespace, group=_LEASES)
    return str(lease["spec"].get("holderIdentity") or "") if lease is not None else ""


def kill_leader(fleet: LiveFleet, traffic: Background, rng: random.Random, killed: list[str]) -> None:
    """Wait for a leader that is not among `killed`, and kill it after a random number of clients' tokens.

    Its Lease is deleted then, as a person may do: else the next one would wait 15 s, and stand idle for most deaths.
    """

    def leads() -> tuple[str, int] | None:
        identity = leader(fleet)
        pids = fleet.cluster.kubelet.pids(identity.rpartition("_")[0], fleet.namespace)
        return (identity, pids[0]) if identity and identity not in killed and pids else None

    found = fleet.cluster.wait(leads, _LEADS_WITHIN_S, f"another operator leads, after {len(killed)} deaths")
    assert found is not None
    identity, pid = found
    traffic.progress(rng.randrange(*_TOKENS))
    assert leader(fleet) == identity, f"{identity} does not lead any more, and nobody has killed it"
    os.kill(pid, signal.SIGKILL)
    killed.append(identity)
    fleet.cluster.rest.persist("DELETE", path("leases", fleet.namespace, _LEASE, group=_LEASES))
