"""Histograms and counters of the hot path, and metrics that are read when they are scraped.

The histograms and counters take the place of prometheus-client's own, which lock and look a label up each time:
`Histogram.observe` costs 0.64 µs where `Series.observe` costs 0.12, and `labels().inc` 1.01 µs where `Counts.add` costs
0.08. That would add 3 µs to a file of 15 µs, and 0.8 µs to an ack of 46 µs. Everything else uses prometheus-client.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Series:
    """The observations of one histogram under one label. Counting takes one bisection."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds


class Durations:
    """Histograms of seconds, one for each value of a label; without a label there is one, under "". They become
    Prometheus's when they are scraped.
    """

    def __init__(self, name: str, text: str, label: str, values: Sequence[str]) -> None:
        self._name, self._text, self._labels = name, text, [label] if label else []
        self.series = {value: Series() for value in values}

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Return the metrics; prometheus_client calls this."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
        for value, series in self.series.items():
            buckets = list(zip(bounds, accumulate(series.counts), strict=True))
            family.add_metric([value] if value else [], buckets, series.sum)
        yield family


class Counts:
    """Counters under one label, used on the event loop alone and therefore without a lock; without a label there is
    one, under "".
    """

    def __init__(self, name: str, text: str, label: str, values: Sequence[str]) -> None:
        self._family = name, text, None, [label] if label else []
        self.by = dict.fromkeys(values, 0)

    def add(self, value: str, number: int = 1) -> None:
        """Count `number` more."""
        self.by[value] = self.by.get(value, 0) + number

    def add_plain(self, number: int = 1) -> None:
        """Count `number` more without a label."""
        self.add("", number)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Return the metrics; prometheus_client calls this."""
        family = CounterMetricFamily(*self._family)
        for value, number in self.by.items():
            family.add_metric([value] if value else [], number)
        yield family


class Read:
    """Metrics of one kind under one label that are read when they are scraped; without a label there is at most one,
    under "".
    """

    def __init__(
        self,
        kind: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        label: str,
        read: Callable[[], Mapping[str, float]],
    ) -> None:
        self._kind = kind
        self._family = name, text, None, [label] if label else []
        self._read = read

    def describe(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Return the names; prometheus_client would otherwise read the metrics for them."""
        yield self._kind(*self._family)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Return the metrics; prometheus_client calls this."""
        family = self._kind(*self._family)
        for value, number in self._read().items():
            family.add_metric([value] if value else [], number)
        yield family
