"""What requests used and what that costs. Pure.

Money is counted in whole picodollars (10⁻¹² $): a price per million tokens with up to six decimal places is a whole
number of them per token, so sums are exact and do not depend on the order of the records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from enum import StrEnum

import msgspec

_PICO = 12
_PICO_IN_MILLIONTH = 10**6
_DAY = 86400
_HOUR = 3600


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One request that is over, however it ended. Exactly one is written for each; a second one, of an answer whose
    gateway died before it was closed, has the same id."""

    id: str
    """Unique, and made by the gateway: never what a client sent as `x-request-id`, which it may send twice."""
    at: float
    """Unix seconds when it ended."""
    model: str
    tenant: str = "anonymous"
    key: str = ""
    """Id of the API key, never the key itself."""
    weight_version: str = ""
    endpoint: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Those of `prompt_tokens` that the prefix cache held."""
    completion_tokens: int = 0
    """Tokens of all choices that the client was given, reasoning included, also when the request failed later."""
    reasoning_tokens: int = 0
    choices: int = 1
    seconds: float = 0.0
    """From its arrival to its end."""
    ttft_seconds: float | None = None
    """From its arrival to its first token; None when there was none."""
    service_seconds: float = 0.0
    """How long engines were at work for it, both legs and all attempts together."""
    outcome: str = "ok"
    """"ok", "client_gone", or the code of the error."""
    attempts: int = 0
    migrations: int = 0
    user: str = ""
    """OpenAI's `user` field."""
    replica: str = ""
    priority: str = ""


class PriceError(ValueError):
    """A price that cannot be counted exactly, or is none."""


class Price(msgspec.Struct, frozen=True):
    """What a token costs, in picodollars. Made by `price`."""

    hit: int
    miss: int
    output: int

    def of(self, record: UsageRecord) -> int:
        """What the record costs, in picodollars."""
        cached = min(record.cached_tokens, record.prompt_tokens)
        return cached * self.hit + (record.prompt_tokens - cached) * self.miss + record.completion_tokens * self.output


def price(hit: Decimal | str, miss: Decimal | str, output: Decimal | str) -> Price:
    """A price in dollars per million tokens: of the prompt in the cache, of the rest of it, of the answer.

    Raises `PriceError`.
    """
    return Price(_per_token(hit), _per_token(miss), _per_token(output))


def _per_token(dollars: Decimal | str) -> int:
    # As a ratio of whole numbers: arithmetic on Decimals would round to the caller's context.
    try:
        over, under = Decimal(dollars).as_integer_ratio()
    except (ArithmeticError, ValueError):
        raise PriceError(f"{dollars!r} is not a price: write dollars per million tokens, like 0.55") from None
    whole, rest = divmod(over * _PICO_IN_MILLIONTH, under)
    if rest or over < 0:
        raise PriceError(f"the price {dollars} must be 0 or more, with at most six digits after the point")
    return whole


R1_PRICE = price("0.14", "0.55", "2.19")
"""DeepSeek-R1's own at its release."""


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """The price table: by name of the model, `default` for all others."""

    models: Mapping[str, Price] = msgspec.field(default_factory=dict)
    default: Price = R1_PRICE

    def of(self, record: UsageRecord) -> int:
        """What the record costs, in picodollars."""
        return self.models.get(record.model, self.default).of(record)


class Totals(msgspec.Struct):
    """Sums over some records. Whole numbers only, so that neither order nor grouping changes them."""

    requests: int = 0
    failed: int = 0
    """Those of `requests` whose outcome is neither "ok" nor "client_gone"."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    attempts: int = 0
    migrations: int = 0
    microseconds: int = 0
    """Sum of `seconds`."""
    service_microseconds: int = 0
    picodollars: int = 0

    @property
    def money(self) -> Decimal:
        """Dollars, exactly."""
        return dollars(self.picodollars)

    @property
    def tokens(self) -> int:
        """Tokens in and out."""
        return self.prompt_tokens + self.completion_tokens

    def add(self, record: UsageRecord, picodollars: int) -> None:
        self.requests += 1
        self.failed += record.outcome not in ("ok", "client_gone")
        self.prompt_tokens += record.prompt_tokens
        self.cached_tokens += record.cached_tokens
        self.completion_tokens += record.completion_tokens
        self.reasoning_tokens += record.reasoning_tokens
        self.attempts += record.attempts
        self.migrations += record.migrations
        self.microseconds += round(record.seconds * 1e6)
        self.service_microseconds += round(record.service_seconds * 1e6)
        self.picodollars += picodollars

    def merge(self, other: Totals) -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class By(StrEnum):
    """What records can be grouped by. Days and hours are UTC."""

    TENANT = "tenant"
    MODEL = "model"
    KEY = "key"
    USER = "user"
    DAY = "day"
    HOUR = "hour"
    OUTCOME = "outcome"
    ENDPOINT = "endpoint"
    VERSION = "version"
    PRIORITY = "priority"
    REPLICA = "replica"


_LABELS: Mapping[By, Callable[[UsageRecord], str]] = {
    By.TENANT: lambda record: record.tenant,
    By.MODEL: lambda record: record.model,
    By.KEY: lambda record: record.key,
    By.USER: lambda record: record.user,
    By.DAY: lambda record: utc_day(record.at),
    By.HOUR: lambda record: f"{utc_day(record.at)}T{int(record.at // _HOUR) % 24:02}",
    By.OUTCOME: lambda record: record.outcome,
    By.ENDPOINT: lambda record: record.endpoint,
    By.VERSION: lambda record: record.weight_version,
    By.PRIORITY: lambda record: record.priority,
    By.REPLICA: lambda record: record.replica,
}


class MemoryOfIds:
    """Remembers ids in memory: as much of it as there are records."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def first(self, identity: str) -> bool:
        """Whether it is seen for the first time."""
        if identity in self._seen:
            return False
        self._seen.add(identity)
        return True


class Aggregation:
    """Takes records one by one, in any order, and keeps only sums. A record that comes twice counts once."""

    def __init__(
        self,
        by: Sequence[By] = (),
        *,
        prices: Prices | None = None,
        since: float | None = None,
        until: float | None = None,
        tenant: str | None = None,
        first: Callable[[str], bool] | None = None,
    ) -> None:
        """Records from `since` to before `until` (Unix seconds), of `tenant` if given.

        `first(id)` tells whether an id is seen for the first time; the default remembers all ids in memory.
        """
        self.groups: dict[tuple[str, ...], Totals] = {}
        """Labels, in the order of `by`, to their sums."""
        self.from_at: float | None = None
        """Time of the earliest record counted."""
        self.to_at: float | None = None
        """Time of the latest record counted."""
        self.duplicates = 0
        self._labels = [_LABELS[one] for one in by]
        self._prices = prices or Prices()
        self._since = since
        self._until = until
        self._tenant = tenant
        self._first = first or MemoryOfIds().first

    def add(self, record: UsageRecord) -> None:
        if not self._wanted(record):
            return
        if not self._first(record.id):
            self.duplicates += 1
            return
        labels = tuple(label(record) for label in self._labels)
        totals = self.groups.get(labels)
        if totals is None:
            totals = self.groups[labels] = Totals()
        totals.add(record, self._prices.of(record))
        self.from_at = record.at if self.from_at is None else min(self.from_at, record.at)
        self.to_at = record.at if self.to_at is None else max(self.to_at, record.at)

    def extend(self, records: Iterable[UsageRecord]) -> None:
        for record in records:
            self.add(record)

    def total(self) -> Totals:
        """The sum of all groups."""
        whole = Totals()
        for totals in self.groups.values():
            whole.merge(totals)
        return whole

    def rows(self) -> list[tuple[tuple[str, ...], Totals]]:
        """All groups, sorted by their labels."""
        return sorted(self.groups.items(), key=lambda row: row[0])

    def _wanted(self, record: UsageRecord) -> bool:
        return (
            (self._since is None or record.at >= self._since)
            and (self._until is None or record.at < self._until)
            and (self._tenant is None or record.tenant == self._tenant)
        )


class GpuCost(msgspec.Struct, frozen=True, kw_only=True):
    """What the GPUs cost over a time, whoever used them. Dollars, rounded to 10⁻⁶; None where no token was counted."""

    hours: Decimal
    """GPU-hours."""
    money: Decimal
    per_million_tokens: Decimal | None
    """By tokens in and out."""
    per_million_completion_tokens: Decimal | None


def gpu_cost(totals: Totals, *, gpus: int, seconds: float, hour_price: Decimal | str) -> GpuCost:
    """GPU-hours are `gpus` × `seconds`: idle GPUs cost as much as busy ones. Raises `PriceError`."""
    per_hour = _per_token(hour_price)  # 10⁻⁶ dollars
    gpu_microseconds = gpus * round(seconds * 1e6)
    hour = _HOUR * 10**6

    def per_million(tokens: int) -> Decimal | None:
        return _micro(_divide(gpu_microseconds * per_hour * 10**6, hour * tokens)) if tokens else None

    return GpuCost(
        hours=_micro(_divide(gpu_microseconds * 10**6, hour)),
        money=_micro(_divide(gpu_microseconds * per_hour, hour)),
        per_million_tokens=per_million(totals.tokens),
        per_million_completion_tokens=per_million(totals.completion_tokens),
    )


def dollars(picodollars: int) -> Decimal:
    """Dollars, exactly: made from text, because Decimal's arithmetic rounds to 28 digits."""
    return Decimal(f"{picodollars}e-{_PICO}")


def _micro(value: int) -> Decimal:
    return Decimal(f"{value}e-6")


def _divide(over: int, under: int) -> int:
    """The quotient, rounded half up."""
    return (2 * over + under) // (2 * under)


def utc_day(at: float) -> str:
    """The day of Unix seconds `at`, as 2026-11-24. (Gregorian days in 400-year eras that begin on the 1st of March.)"""
    days = int(at // _DAY) + 719_468
    era, in_era = divmod(days, 146_097)
    year_of_era = (in_era - in_era // 1460 + in_era // 36_524 - in_era // 146_096) // 365
    in_year = in_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    march_month = (5 * in_year + 2) // 153
    day = in_year - (153 * march_month + 2) // 5 + 1
    month = march_month + 3 if march_month < 10 else march_month - 9
    year = year_of_era + era * 400 + (month <= 2)
    return f"{year:04}-{month:02}-{day:02}"
