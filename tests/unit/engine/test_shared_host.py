"""A follower on its leader's host does not take the leader's ports for a stranger's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tandem.engine.cpu.shared_host import choose_ports, wait_for_port


def taken(port: int) -> bool:
    raise ValueError(f"port_base at {port} is not available in 30 seconds")


def init_new(server_args: object) -> bool:
    return wait_for_port(taken, 16003)


def test_a_follower_does_not_look_at_the_leaders_ports() -> None:
    assert choose_ports(init_new, SimpleNamespace(node_rank=1)) is True


def test_a_leader_looks_at_its_own() -> None:
    with pytest.raises(ValueError, match="16003"):
        choose_ports(init_new, SimpleNamespace(node_rank=0))


def test_afterwards_every_port_is_looked_at_again() -> None:
    choose_ports(init_new, SimpleNamespace(node_rank=1))
    with pytest.raises(ValueError, match="16003"):
        wait_for_port(taken, 16003)
