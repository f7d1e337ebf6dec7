"""What all tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from support.redis_server import RedisServer

# How fast an example is says something about the machine, not about the code.
settings.register_profile(
    "tandem",
    deadline=None,
    max_examples=int(os.environ.get("TANDEM_EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tandem")


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """A real Redis of the module's own."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (Debian, Ubuntu: apt install redis-server); CI has it")
    server = RedisServer()
    server.start()
    yield server
    server.remove()
