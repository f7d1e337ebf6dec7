"""What all tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from support.redis_server import RedisServer


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """A real Redis of the module's own."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (Debian, Ubuntu: apt install redis-server); CI has it")
    server = RedisServer()
    server.start()
    yield server
    server.remove()
