"""`tandem node head` with the scripted engine in SGLang's place: script_head.py CONFIG HOST DATA RUN."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import script_engine
from ray import cloudpickle

from tandem.config import FleetConfig
from tandem.core.types import GroupSpec
from tandem.fleet.node_head import Head, HeadSettings
from tandem.fleet.node_process import run_node
from tandem.fleet.ray_processes import group_resource

cloudpickle.register_pickle_by_value(script_engine)  # the controller's process cannot import it


class GroupEngines(script_engine.ScriptEngines):
    """On nodes that belong to the group."""

    def bundle(self, spec: GroupSpec) -> Mapping[str, float]:
        return {**super().bundle(spec), group_resource(spec.group): 1.0}


def engines(config: Path, rooms: Path) -> script_engine.ScriptEngines:
    """In a Ray cluster that is somebody else's no node belongs to a group."""
    guest = FleetConfig.model_validate_json(config.read_bytes()).ray.address is not None
    return script_engine.ScriptEngines(str(rooms)) if guest else GroupEngines(str(rooms))


if __name__ == "__main__":
    config, host, data, run = sys.argv[1:]
    settings = HeadSettings(config=Path(config), host=host, data=Path(data), run=Path(run))
    node = Head(settings, engines=engines(settings.config, settings.run / "rooms"))
    os._exit(run_node(node.run, node.own))
