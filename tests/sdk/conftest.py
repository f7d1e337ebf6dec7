"""Official clients against a gateway that somebody else has started: TANDEM_TEST_URL says where.

The tests know nothing of the model but its name (the first that `/v1/models` lists): they look at how a client reads
the answers, not at what the answers say.
"""

from __future__ import annotations

import os

import pytest

URL = os.environ.get("TANDEM_TEST_URL", "").rstrip("/")

# Elsewhere the clients are not installed.
collect_ignore_glob = [] if URL else ["test_*.py"]


@pytest.fixture(scope="session")
def url() -> str:
    """Where the gateway listens, without a path."""
    return URL


@pytest.fixture(scope="session")
def key() -> str:
    """What to show as API key."""
    return os.environ.get("TANDEM_TEST_KEY", "none")


@pytest.fixture(scope="session")
def model(url: str, key: str) -> str:
    """The model's name."""
    import openai

    with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        return client.models.list().data[0].id
