"""Exports the metrics of ``metrics.registry`` in Prometheus' format, and measures requests for them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import prometheus_client
from prometheus_client import core as prometheus
from prometheus_client.registry import Collector

from pomona.core.interfaces import EngineClient
from pomona.core.output import RequestOutput
from pomona.core.request import FinishReason
from pomona.metrics import registry as table
from pomona.metrics.registry import Metric
from pomona.metrics.timeline import RequestTimeline

CONTENT_TYPE: Final = prometheus_client.CONTENT_TYPE_LATEST
OTHER_ADAPTERS: Final = "(other)"
"""Label of all adapters past the cap; no adapter can be called so."""


class _EngineCollector(Collector):
    """Reads the engine's latest snapshot when scraped."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterator[prometheus.Metric]:
        """Yield one family per engine metric."""
        stats = self._client.stats()
        for metric in table.ENGINE_METRICS:
            assert metric.stat is not None
            kind = prometheus.CounterMetricFamily if metric.kind == "counter" else prometheus.GaugeMetricFamily
            yield kind(metric.name, metric.help, value=getattr(stats, metric.stat))
        ready = table.ENGINE_READY
        yield prometheus.GaugeMetricFamily(ready.name, ready.help, value=float(self._client.is_ready))
        restarts = table.ENGINE_RESTARTS
        yield prometheus.CounterMetricFamily(restarts.name, restarts.help, value=self._client.num_restarts)


class _TotalsCollector(Collector):
    """Reads sums without labels when scraped: over all adapters, or of the ledger."""

    def __init__(self, metrics: Sequence[Metric], read: Callable[[], Mapping[str, float]]) -> None:
        self._metrics = metrics
        self._read = read

    def collect(self) -> Iterator[prometheus.Metric]:
        """Yield one family per metric."""
        values = self._read()
        for metric in self._metrics:
            assert metric.stat is not None
            kind = prometheus.CounterMetricFamily if metric.kind == "counter" else prometheus.GaugeMetricFamily
            yield kind(metric.name, metric.help, value=values[metric.stat])


class AdapterSeries:
    """All per-adapter series of one label, looked up once per request."""

    __slots__ = (
        "_requests",
        "cached_tokens",
        "e2e",
        "itl",
        "label",
        "output_tokens",
        "prompt_tokens",
        "queue",
        "tpot",
        "ttft",
    )

    def __init__(self, metrics: "ServerMetrics", label: str) -> None:
        self.label = label
        self._requests = metrics.requests
        self.ttft = metrics.ttft.labels(label)
        self.itl = metrics.itl.labels(label)
        self.tpot = metrics.tpot.labels(label)
        self.e2e = metrics.e2e.labels(label)
        self.queue = metrics.queue.labels(label)
        self.prompt_tokens = metrics.prompt_tokens.labels(label)
        self.cached_tokens = metrics.cached_tokens.labels(label)
        self.output_tokens = metrics.output_tokens.labels(label)

    def count_end(self, finish_reason: str) -> None:
        """Count one ended request."""
        self._requests.labels(self.label, finish_reason).inc()


class ServerMetrics:
    """The server's metrics, on a registry of their own.

    Args:
        client: whose statistics are exported beside the server's.
        base_name: label of requests without an adapter.
        max_adapter_labels: adapters with a label of their own; bounds the number of series.
    """

    def __init__(self, client: EngineClient, base_name: str, max_adapter_labels: int) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(_EngineCollector(client))
        self.ttft = self._histogram(table.TTFT_SECONDS)
        self.itl = self._histogram(table.ITL_SECONDS)
        self.tpot = self._histogram(table.TPOT_SECONDS)
        self.e2e = self._histogram(table.E2E_SECONDS)
        self.queue = self._histogram(table.QUEUE_SECONDS)
        self.requests = self._counter(table.REQUESTS)
        self.prompt_tokens = self._counter(table.PROMPT_TOKENS)
        self.cached_tokens = self._counter(table.CACHED_TOKENS)
        self.output_tokens = self._counter(table.OUTPUT_TOKENS)
        self.http_requests = self._counter(table.HTTP_REQUESTS)
        self.internal_errors = self._counter(table.INTERNAL_ERRORS)
        loaded = table.LOADED_ADAPTERS
        self.loaded_adapters = prometheus_client.Gauge(loaded.name, loaded.help, registry=self._registry)
        self._base_name = base_name
        self._max_adapter_labels = max_adapter_labels
        self._series: dict[str, AdapterSeries] = {}

    def add_residency(self, read: Callable[[], Mapping[str, float]]) -> None:
        """Export what ``read`` returns, by the ``stat`` of ``RESIDENCY_METRICS``."""
        self._registry.register(_TotalsCollector(table.RESIDENCY_METRICS, read))

    def add_ledger(self, read: Callable[[], Mapping[str, float]]) -> None:
        """Export what ``read`` returns, by the ``stat`` of ``LEDGER_METRICS``."""
        self._registry.register(_TotalsCollector(table.LEDGER_METRICS, read))

    def _histogram(self, metric: Metric) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(
            metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self._registry
        )

    def _counter(self, metric: Metric) -> prometheus_client.Counter:
        return prometheus_client.Counter(metric.name, metric.help, metric.labels, registry=self._registry)

    def series_of(self, adapter_name: str | None) -> AdapterSeries:
        """Return the series of an adapter name; None is the base model alone."""
        label = self._base_name if adapter_name is None else adapter_name
        # The base and "(other)" have their labels whatever the cap.
        if label not in self._series and adapter_name is not None:
            num_named = len(self._series.keys() - {self._base_name, OTHER_ADAPTERS})
            if num_named >= self._max_adapter_labels:
                label = OTHER_ADAPTERS
        series = self._series.get(label)
        if series is None:
            series = self._series[label] = AdapterSeries(self, label)
        return series

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)


class RequestMeter:
    """Measures one engine request, from its acceptance to its end.

    Args:
        series: where observations go.
        num_prompt_tokens: of the request.
        arrival_s: monotonic clock when it was accepted.
    """

    __slots__ = ("_num_prompt_tokens", "_series", "timeline")

    def __init__(self, series: AdapterSeries, num_prompt_tokens: int, arrival_s: float) -> None:
        self._series = series
        self._num_prompt_tokens = num_prompt_tokens
        self.timeline = RequestTimeline(arrival_s)

    def advance(self, output: RequestOutput, now_s: float) -> None:
        """Take note of an output. Tokens that come after the end are counted like others, but belong to no latency."""
        timeline, series = self.timeline, self._series
        if timeline.first_scheduled_s is None and output.first_scheduled_s is not None:
            timeline.schedule(output.first_scheduled_s)
            series.queue.observe(max(0.0, output.first_scheduled_s - timeline.arrival_s))
            series.prompt_tokens.inc(self._num_prompt_tokens)
            series.cached_tokens.inc(output.num_cached_tokens)
        num_new = len(output.new_token_ids)
        if num_new:
            series.output_tokens.inc(num_new)
            if timeline.is_ended:
                return
            is_first = not timeline.num_output_tokens
            timeline.add_tokens(num_new, now_s)
            if is_first:
                series.ttft.observe(now_s - timeline.arrival_s)

    def end(self, reason: FinishReason | None, now_s: float) -> None:
        """Close the timeline; None means that the request was rejected."""
        timeline, series = self.timeline, self._series
        timeline.end(now_s, reason)
        series.count_end("reject" if reason is None else reason.value)
        for gap_s in timeline.itl_s:
            series.itl.observe(gap_s)
        if timeline.is_finished and timeline.e2e_s is not None:
            series.e2e.observe(timeline.e2e_s)
            if timeline.tpot_s is not None:
                series.tpot.observe(timeline.tpot_s)
