"""ClusterIPs: an nftables ruleset that sends each new connection to one of a Service's ready endpoints, by chance.

As kube-proxy: connections that are open stay where they are; a Service without endpoints refuses. Not honoured:
session affinity, node ports, load balancers, external traffic policies.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from kube.kubelet.rest import Object
from kube.network import SERVICES

_RULES = """\
table ip services
delete table ip services
table ip services {{
  chain dispatch {{
{dispatch}
  }}
  chain refuse {{
{refuse}
    ip daddr {services} reject
  }}
  chain prerouting {{ type nat hook prerouting priority -100; jump dispatch; }}
  chain output {{ type nat hook output priority -100; jump dispatch; }}
  chain postrouting {{ type nat hook postrouting priority 100; ct status dnat masquerade; }}
  chain forward {{ type filter hook forward priority 0; jump refuse; }}
  chain local {{ type filter hook output priority 0; jump refuse; }}
}}
"""


def ruleset(services: Sequence[Object], endpoints: Sequence[Object]) -> str:
    """The rules, for `nft -f -`, which puts them in the place of the old ones in one step."""
    by_key = {(one["metadata"]["namespace"], one["metadata"]["name"]): one for one in endpoints}
    dispatch, refuse = [], []
    for service in services:
        address = service["spec"].get("clusterIP")
        if not address or address == "None":
            continue
        found = by_key.get((service["metadata"]["namespace"], service["metadata"]["name"]), {})
        for port in service["spec"].get("ports", []):
            protocol = port.get("protocol", "TCP").lower()
            match = f"ip daddr {address} {protocol} dport {port['port']}"
            targets = _targets(found, port.get("name"))
            if targets:
                chosen = ", ".join(f"{place} : {ip} . {number}" for place, (ip, number) in enumerate(targets))
                dispatch.append(f"    {match} dnat ip to numgen random mod {len(targets)} map {{ {chosen} }}")
            elif protocol == "tcp":
                refuse.append(f"    {match} reject with tcp reset")
    return _RULES.format(dispatch="\n".join(dispatch), refuse="\n".join(refuse), services=SERVICES)


def _targets(endpoints: Object, port: str | None) -> list[tuple[str, int]]:
    """Ready addresses with the number of a named port (or of the only, unnamed one)."""
    return sorted(
        {
            (address["ip"], one["port"])
            for subset in endpoints.get("subsets", [])
            for one in subset.get("ports", [])
            if one.get("name") == port
            for address in subset.get("addresses", [])
        }
    )


def apply(rules: str) -> None:
    """Put rules in place. Raises RuntimeError."""
    done = subprocess.run(["nft", "-f", "-"], input=rules, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nft: {done.stderr.strip()}; rules:\n{rules}")
