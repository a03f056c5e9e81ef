"""SimulationReport: what a simulation found, as plain numbers that become a table, JSON, or a page of charts."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from pomona.sim.cluster import ClusterSim
from pomona.sim.ledger import Ledger, LedgerSummary, Percentiles

_NUM_BINS = 120


@dataclass(frozen=True, slots=True)
class TenantSummary:
    """One tenant's figures."""

    tenant: str
    service: float
    """Prompt tokens + 2 * output tokens, delivered."""
    summary: LedgerSummary


@dataclass(frozen=True, slots=True)
class Series:
    """A quantity over time; None where it is undefined."""

    name: str
    unit: str
    times_s: tuple[float, ...]
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """The findings."""

    spec: dict[str, Any]
    """As it was checked, defaults filled in."""
    simulated_s: float
    wall_s: float
    num_events: int
    num_steps: int
    replica_s: float
    """Replica-seconds paid for."""
    busy_share: float
    """Of the replica-seconds, what steps took."""
    num_preemptions: int
    num_adapter_loads: int
    num_lost_replicas: int
    cost_error: float | None
    """Median relative error of the cost model on steps it was not fitted to; None if it comes from a data sheet."""
    all: LedgerSummary
    tenants: tuple[TenantSummary, ...]
    series: tuple[Series, ...]

    @property
    def requests_per_wall_s(self) -> float:
        """Simulated requests per second of wall clock."""
        return self.all.num_requests / self.wall_s if self.wall_s > 0.0 else math.inf

    @property
    def cost_model(self) -> str:
        """Where steps' seconds come from, and how well they are known."""
        return "data sheet" if self.cost_error is None else f"profile, median error {self.cost_error:.1%}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is undefined is None."""
        found: dict[str, Any] = _plain(asdict(self) | {"requests_per_wall_s": self.requests_per_wall_s})
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_report(sim: ClusterSim, spec: dict[str, Any], wall_s: float, cost_error: float | None) -> SimulationReport:
    """Read a simulation's results.

    Args:
        sim: after its run.
        spec: what was asked.
        wall_s: how long the run took.
        cost_error: see the report's field.
    """
    ledger, slo = sim.ledger, sim.config.slo
    duration_s = sim.duration_s
    records = list(sim.replicas.values())
    return SimulationReport(
        spec=spec,
        simulated_s=sim.end_s,
        wall_s=wall_s,
        num_events=sim.heap.num_handled,
        num_steps=sum(record.num_steps for record in records),
        replica_s=sim.replica_s(),
        busy_share=sim.busy_share(),
        num_preemptions=sum(record.num_preemptions for record in records),
        num_adapter_loads=sum(record.num_adapter_loads for record in records),
        num_lost_replicas=sum(record.is_lost for record in records),
        cost_error=cost_error,
        all=ledger.summary(slo, duration_s),
        tenants=tuple(
            TenantSummary(str(tenant), sim.service.get(tenant, 0.0), ledger.summary(slo, duration_s, numbers))
            for tenant, numbers in ledger.numbers_by_tenant().items()
        ),
        series=(*_fleet_series(sim), *_request_series(ledger, sim, duration_s)),
    )


def _fleet_series(sim: ClusterSim) -> list[Series]:
    samples = sim.samples
    times = tuple(sample.now_s for sample in samples)
    series = [
        Series("requests on replicas", "", times, tuple(float(sum(n for _, n in s.loads)) for s in samples)),
        Series("waiting for a replica", "", times, tuple(float(s.num_waiting) for s in samples)),
        Series("replicas serving", "", times, tuple(float(len(s.loads)) for s in samples)),
        Series("replicas starting", "", times, tuple(float(s.num_starting) for s in samples)),
        Series("KV memory used", "%", times, tuple(100.0 * s.kv_used_share for s in samples)),
        Series("adapter memory used", "%", times, tuple(100.0 * s.adapter_pages_used_share for s in samples)),
    ]
    for tenant in sim.ledger.tenants[:12]:
        values = tuple(sample.service.get(tenant, 0.0) for sample in samples)
        series.append(Series(f"service of {tenant}", "weighted tokens", times, values))
    return series


def _request_series(ledger: Ledger, sim: ClusterSim, duration_s: float) -> list[Series]:
    """Figures of the requests that arrived in each of equal bins of time, and the tokens that came out in it."""
    num_bins = max(1, min(_NUM_BINS, len(ledger) // 10))
    width_s = duration_s / num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for number, arrival_s in enumerate(ledger.arrival_s):
        bins[min(int(arrival_s / width_s), num_bins - 1)].append(number)
    summaries = [ledger.summary(sim.config.slo, width_s, numbers) for numbers in bins]
    times = tuple((index + 0.5) * width_s for index in range(num_bins))

    def milliseconds(latency: str, share: str) -> Series:
        found: list[Percentiles | None] = [getattr(summary, f"{latency}_s") for summary in summaries]
        values = tuple(None if entry is None else 1e3 * getattr(entry, share) for entry in found)
        return Series(f"{latency.upper()} {share}", "ms", times, values)

    attained = tuple(None if math.isnan(s.attainment) else 100.0 * s.attainment for s in summaries)
    return [
        *(milliseconds(latency, share) for latency in ("ttft", "tpot") for share in ("p50", "p90", "p99")),
        Series("attainment", "%", times, attained),
        Series("goodput", "requests/s", times, tuple(summary.goodput_rps for summary in summaries)),
        Series("arrivals", "requests/s", times, tuple(summary.num_requests / width_s for summary in summaries)),
        Series("throughput", "output tokens/s", times, _tokens_per_s(ledger, sim.end_s, width_s, num_bins)),
    ]


def _tokens_per_s(ledger: Ledger, end_s: float, width_s: float, num_bins: int) -> tuple[float, ...]:
    """Output tokens per second of each bin; those of a request are taken to come evenly from its first to its end."""
    num_tokens = [0.0] * num_bins
    for number, count in enumerate(ledger.num_output_tokens):
        if not count:
            continue
        first_s, last_s = ledger.first_token_s[number], ledger.last_token_s[number]
        last_s = end_s if math.isnan(last_s) else last_s
        begin, end = (min(int(time_s / width_s), num_bins - 1) for time_s in (first_s, last_s))
        for index in range(begin, end + 1):
            until_s = last_s if index == end else (index + 1) * width_s
            inside_s = until_s - max(first_s, index * width_s)
            num_tokens[index] += count * inside_s / (last_s - first_s) if begin < end else count
    return tuple(count / width_s for count in num_tokens)
