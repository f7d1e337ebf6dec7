"""What a Ray cluster has, for a process on one of its nodes: ask_ray.py ADDRESS. Prints one line of JSON."""

from __future__ import annotations

import json
import sys

import ray
from ray import serve
from ray.util import list_named_actors, placement_group_table

ray.init(address=sys.argv[1], namespace="asks", log_to_driver=False)
print(
    json.dumps(
        {
            "applications": sorted(serve.status().applications),
            "actors": sorted(
                one["name"] for one in list_named_actors(all_namespaces=True) if one["namespace"] != "serve"
            ),
            "placements": sorted(one["name"] for one in placement_group_table().values() if one["state"] != "REMOVED"),
        }
    )
)
