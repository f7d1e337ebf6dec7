"""Who asks: a tenant, what it may use, and how it ranks among others when there is not enough for all."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Priority(StrEnum):
    """Class of a request. A higher class is served first; within a class, tenants share by weight."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """One customer of the platform. A limit that is None does not exist."""

    name: str
    priority: Priority = Priority.NORMAL
    """The highest class that its requests may ask for, and theirs if they ask for none."""
    weight: float = 1.0
    """Its share against others of the same class; above 0."""
    requests_per_minute: int | None = None
    input_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    concurrency: int | None = None
    """Requests that may wait or run at once, over all gateway replicas."""
    models: tuple[str, ...] | None = None
    """Names of the models that it may use; None = every one."""


def without_limits(tenant: Tenant) -> Tenant:
    """The same tenant, which may use any amount."""
    return msgspec.structs.replace(
        tenant,
        requests_per_minute=None,
        input_tokens_per_minute=None,
        output_tokens_per_minute=None,
        concurrency=None,
    )


ANONYMOUS = Tenant(name="anonymous")
"""Whoever asks where no key is asked for."""
