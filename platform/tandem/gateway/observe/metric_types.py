"""Histograms that are cheap per token and per scrape, and label values that stay few."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Series:
    """One histogram with its label values given. Belongs to one thread: there is no lock."""

    __slots__ = ("_bounds", "_counts", "_ends", "_sum")

    def __init__(self, bounds: Sequence[float], ends: Sequence[int]) -> None:
        """`ends`: which of the bounds are told to Prometheus; it is counted by all of them."""
        self._bounds = bounds
        self._ends = (*ends, len(bounds))
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count `value`, `count` times at once."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    @property
    def sum(self) -> float:
        return self._sum

    @property
    def counts(self) -> tuple[int, ...]:
        """How many values there were in each of the buckets that it counts by."""
        return tuple(self._counts)

    @property
    def total(self) -> int:
        return sum(self._counts)

    def cumulative(self) -> list[int]:
        """How many values were at most each bound that Prometheus is told; the last: how many there were."""
        whole = list(accumulate(self._counts))
        return [whole[end] for end in self._ends]


class Histogram(Collector):
    """A Prometheus histogram. A value takes a fraction of a microsecond, however often it is counted at once."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        fine: Sequence[float] = (),
        registry: CollectorRegistry,
    ) -> None:
        """`fine`: bounds to count by, with the buckets' own among them, for who needs more than Prometheus is told."""
        self.name = name
        self._documentation = documentation
        self._labels = tuple(labels)
        told = tuple(float(bound) for bound in buckets)
        self._bounds = tuple(float(bound) for bound in fine) or told
        self._ends = [self._bounds.index(bound) for bound in told]
        self._les = [floatToGoString(bound) for bound in (*told, float("inf"))]
        self._series: dict[tuple[str, ...], Series] = {}
        self._texts: dict[tuple[str, ...], list[str]] = {}
        self._alone = None if labels else self.labels()
        registry.register(self)

    def labels(self, *values: str) -> Series:
        """The series of these label values: keep it where it is needed often."""
        series = self._series.get(values)
        if series is None:
            if len(values) != len(self._labels):
                raise ValueError(f"{self.name} has the labels {self._labels}, not {len(values)} of them")
            series = self._series[values] = Series(self._bounds, self._ends)
        return series

    def observe(self, value: float, count: int = 1) -> None:
        """Only for a histogram without labels."""
        assert self._alone is not None, f"{self.name} has labels"
        self._alone.observe(value, count)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many values there were in each bucket that it counts by; only for a histogram without labels."""
        assert self._alone is not None, f"{self.name} has labels"
        return self._alone.counts

    @property
    def total(self) -> int:
        """How many values there were, whatever their labels."""
        return sum(series.total for series in self._series.values())

    def describe(self) -> Iterator[HistogramMetricFamily]:
        yield HistogramMetricFamily(self.name, self._documentation, labels=self._labels)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self.name, self._documentation, labels=self._labels)
        for values, series in list(self._series.items()):
            counts: list[float] = list(series.cumulative())
            family.add_metric(values, list(zip(self._les, counts, strict=True)), series.sum)
        yield family

    def render(self) -> str:
        """The same as text; a tenth of the time that prometheus_client takes, because most of it is kept."""
        lines = [f"# HELP {self.name} {self._documentation}\n# TYPE {self.name} histogram\n"]
        for values, series in list(self._series.items()):
            texts = self._texts.get(values)
            if texts is None:
                texts = self._texts[values] = self._texts_of(values)
            counts = series.cumulative()
            lines += [
                f"{text} {number}\n" for text, number in zip(texts, (*counts, counts[-1], series.sum), strict=True)
            ]
        return "".join(lines)

    def _texts_of(self, values: tuple[str, ...]) -> list[str]:
        """What stands before each number."""
        labels = [f'{name}="{_escape(value)}"' for name, value in zip(self._labels, values, strict=True)]

        def text(kind: str, *given: str) -> str:
            return f"{self.name}_{kind}" + (f"{{{','.join(given)}}}" if given else "")

        buckets = [text("bucket", *labels, f'le="{le}"') for le in self._les]
        return [*buckets, text("count", *labels), text("sum", *labels)]


class Registry(CollectorRegistry):
    """A registry that writes its histograms itself."""

    def __init__(self) -> None:
        super().__init__()
        self._histograms: list[Histogram] = []
        self._others = CollectorRegistry()

    def register(self, collector: Collector) -> None:
        super().register(collector)
        if isinstance(collector, Histogram):
            self._histograms.append(collector)
        else:
            self._others.register(collector)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._others) + "".join(one.render() for one in self._histograms).encode()


_SAMPLE = re.compile(rb"^([A-Za-z_:][A-Za-z0-9_:]*)(\{?)", re.MULTILINE)


def labelled(exposition: bytes, name: str, value: str) -> bytes:
    """An exposition with one more label on every sample."""
    label = f'{name}="{_escape(value)}"'.encode()

    def add(found: re.Match[bytes]) -> bytes:
        return found[1] + b"{" + label + (b"," if found[2] else b"}")

    return _SAMPLE.sub(add, exposition)


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class Bounded:
    """The first `limit` values as they are, all later ones as "other": a label never has more values than that."""

    OTHER = "other"

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def of(self, value: str) -> str:
        if value in self._known:
            return value
        if len(self._known) >= self._limit:
            return self.OTHER
        self._known.add(value)
        return value
