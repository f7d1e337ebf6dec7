"""From a configuration to the groups that it asks for; refuses, before anything starts, what cannot work."""

from __future__ import annotations

import json
from pathlib import Path

from tandem.config import FleetConfig, PoolConfig
from tandem.core.layout import GroupLayout, ParallelPlan, plan_group
from tandem.core.shape import ModelShape
from tandem.core.types import EngineSettings, GroupSpec, Role


def read_shape(model: Path) -> ModelShape:
    """The shape of the checkpoint in folder `model`. Raises OSError, ValueError (with a sentence)."""
    return ModelShape.from_config(json.loads((model / "config.json").read_text()))


def pool_of(config: FleetConfig, role: Role) -> PoolConfig:
    """The pool of `role`."""
    return config.prefill if role is Role.PREFILL else config.decode


def engine_settings(config: FleetConfig, spec: GroupSpec) -> EngineSettings:
    """How a group's engines are started: as its wish says, or as the pool does."""
    if spec.engine is not None:
        return spec.engine
    pool = pool_of(config, spec.role)
    return EngineSettings(
        args=pool.args,
        env=pool.env,
        redundant_experts=pool.redundant_experts,
        max_total_tokens=pool.max_total_tokens,
    )


def layout_of(
    config: FleetConfig, role: Role, nodes: int, gpus_per_node: int, engine: EngineSettings | None = None
) -> GroupLayout:
    """The layout of a group of `role` with so many nodes. `engine`: its own settings; None = the pool's."""
    pool = engine or pool_of(config, role)
    return GroupLayout(
        role=role,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        device=config.device,
        dtype=config.model.dtype,
        max_total_tokens=pool.max_total_tokens,
        redundant_experts=pool.redundant_experts,
    )


def plan_pool(config: FleetConfig, role: Role, shape: ModelShape) -> ParallelPlan:
    """How each group of the pool splits the model. Raises `LayoutError` with one sentence."""
    pool = pool_of(config, role)
    return plan_group(shape, layout_of(config, role, pool.nodes, pool.gpus_per_node))


def group_name(role: Role, number: int) -> str:
    """`prefill-0`, `decode-3`, …"""
    return f"{role}-{number}"


def wanted_groups(config: FleetConfig) -> list[GroupSpec]:
    """The groups that the configuration asks for."""
    return [
        GroupSpec(group=group_name(role, number), role=role, nodes=pool.nodes, gpus_per_node=pool.gpus_per_node)
        for role in Role
        for pool in (pool_of(config, role),)
        for number in range(pool.groups)
    ]
