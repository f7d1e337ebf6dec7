"""Specs of Fleets, right and wrong, that servers and classes are asked about."""

from __future__ import annotations

from typing import Any

LEAST: dict[str, Any] = {"images": {"engine": {"name": "engine:1"}}}
"""The shortest that is valid."""

REFUSED_BY_SCHEMA: dict[str, dict[str, Any]] = {
    "no image": {"images": {}},
    "a word for a number": {"prefill": {"nodes": "four"}},
    "a half group": {"prefill": {"groups": 1.5}},
    "a group of no node": {"decode": {"nodes": 0}},
    "more than there can be": {"decode": {"nodes": 65}},
    "a bound that is not included": {"slo": {"ttftSeconds": 0}},
    "an unknown choice": {"gateway": {"serviceType": "Ingress"}},
    "YAML's off, which is no word": {"gateway": {"auth": False}},
    "a quantity without sense": {"redis": {"storage": "20 GB"}},
    "half a quantity": {"prefill": {"pods": {"resources": {"requests": {"cpu": 0.5}}}}},
    "a time that is none": {"decode": {"autoscaling": {"schedule": [{"begin": "24:00", "end": "01:00"}]}}},
    "an empty list of algorithms": {"oidc": {"issuer": "https://a", "audience": "b", "algorithms": []}},
    "an empty image": {"images": {"engine": {"name": ""}}},
    "a list in place of a map": {"tenants": []},
}
"""What every server refuses, by what is wrong; to be put over `LEAST`."""

UNKNOWN: dict[str, dict[str, Any]] = {
    "a pool that does not exist": {"prefil": {}},
    "Python's names": {"decode": {"gpus_per_node": 8}},
    "a huge page of no size": {"decode": {"pods": {"hugePages": {"hugepages-1Mi": "1Gi"}}}},
}
"""Unknown fields: servers drop them, or refuse them where the client asks for that (kubectl 1.27 and later does)."""
