"""What a benchmark found: per run and per request, as numbers and as JSON lines. Definitions are those of metrics.

All latencies are client-side. A request that failed has no latencies but counts as arrived: attainment and error
counts include it, so that refusing requests never improves a result.
"""

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomona.bench.config import BASE_ONLY, ServeBenchConfig
from pomona.bench.load import LoadResult, RequestRecord
from pomona.bench.percentiles import Percentiles
from pomona.core.errors import ConfigError
from pomona.core.request import FinishReason
from pomona.metrics.slo import Slo, attainment, goodput
from pomona.metrics.timeline import RequestTimeline
from pomona.workload.lengths import FixedLength

LATE_SEND_S = 0.01
"""A request that left this much after its time counts as late."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One popularity's results."""

    popularity: str
    num_models: int
    """Different models asked for, base included."""
    num_requests: int
    num_completed: int
    errors: tuple[tuple[str, int, str], ...]
    """(kind, requests, message of the first), most frequent kind first."""
    duration_s: float
    """From the first arrival to the end of the last request."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that the server says it took from a prefix cache."""
    num_output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    """Prompt and output tokens."""
    requests_per_s: float
    """Completed ones."""
    ttft_s: Percentiles | None
    itl_s: Percentiles | None
    """Pooled over tokens; 0 between those that came in one event."""
    tpot_s: Percentiles | None
    """Over requests with two or more output tokens."""
    e2e_s: Percentiles | None
    tokens_per_event: float
    attainment: float | None
    """Requests that met the SLO over requests that arrived; None without an SLO."""
    goodput_per_s: float | None
    max_in_flight: int
    send_lateness_s: Percentiles | None
    """How long after their time requests left the client."""
    num_late_sends: int
    held_s: Percentiles | None
    """How long ``max_concurrency`` held requests back; not part of any latency."""
    loop_lag_s: Percentiles | None
    """How late the client's event loop woke: an upper bound of what the client itself adds to an ITL."""
    client_cpu_s: float
    client_cpu_us_per_event: float


@dataclass(frozen=True, slots=True)
class RunReport:
    """One popularity's results and every request behind them."""

    summary: RunSummary
    records: tuple[RequestRecord, ...]


@dataclass(frozen=True, slots=True)
class BenchSetup:
    """Everything needed to tell what was measured, and to measure it again."""

    config: ServeBenchConfig
    base_model: str
    adapters: tuple[str, ...]
    served_models: tuple[str, ...]
    is_prompt_length_exact: bool
    """False: prompts were words, their token counts are the server's and only near what was asked."""
    pomona_version: str
    commit: str | None
    client_hardware: str
    started_at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True, slots=True)
class BenchReport:
    """A finished benchmark."""

    setup: BenchSetup
    runs: tuple[RunReport, ...]
    """In the order in which they ran."""

    @property
    def base_run(self) -> RunSummary | None:
        """The base-only run, if there was one: what the others are compared with."""
        return next((run.summary for run in self.runs if run.summary.popularity == BASE_ONLY), None)

    def throughput_ratio(self, run: RunSummary) -> float | None:
        """Output tokens per second over the base-only run's; None without such a run."""
        base = self.base_run
        return run.output_tokens_per_s / base.output_tokens_per_s if base and base.output_tokens_per_s else None


def to_timeline(record: RequestRecord) -> RequestTimeline:
    """Return the client's view of a request. Tokens that the server counted beyond one per event were there at its end:
    those without text have no event, so the last with text may have come long before."""
    timeline = RequestTimeline(record.arrival_s)
    for token_s in record.token_times_s:
        timeline.add_tokens(1, token_s)
    num_more = (record.num_output_tokens or 0) - len(record.token_times_s)
    if record.finished_s is not None and num_more > 0:
        timeline.add_tokens(num_more, record.finished_s)
    if record.error is not None:
        timeline.end(record.ended_s, FinishReason.FAIL)
    else:
        timeline.end(record.ended_s, FinishReason.STOP if record.finish_reason == "stop" else FinishReason.LENGTH)
    return timeline


def summarise(popularity: str, load: LoadResult, slo: Slo | None) -> RunSummary:
    """Reduce a run's records to numbers."""
    records = load.records
    completed = [record for record in records if record.error is None]
    arrived = [to_timeline(record) for record in records]
    finished = [timeline for timeline in arrived if timeline.is_finished]
    duration_s = max(record.ended_s for record in records) - min(record.scheduled_s for record in records)
    num_prompt_tokens = sum(record.num_prompt_tokens or 0 for record in completed)
    num_output_tokens = sum(record.num_output_tokens or 0 for record in completed)
    num_events = sum(len(record.token_times_s) for record in completed)
    lateness_s = [record.sent_s - record.arrival_s for record in records]
    return RunSummary(
        popularity=popularity,
        num_models=len({record.model for record in records}),
        num_requests=len(records),
        num_completed=len(completed),
        errors=_count_errors(records),
        duration_s=duration_s,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=sum(record.num_cached_tokens or 0 for record in completed),
        num_output_tokens=num_output_tokens,
        output_tokens_per_s=num_output_tokens / duration_s,
        total_tokens_per_s=(num_prompt_tokens + num_output_tokens) / duration_s,
        requests_per_s=len(completed) / duration_s,
        ttft_s=Percentiles.of(timeline.ttft_s for timeline in finished),
        itl_s=Percentiles.of(gap_s for timeline in finished for gap_s in timeline.itl_s),
        tpot_s=Percentiles.of(timeline.tpot_s for timeline in finished),
        e2e_s=Percentiles.of(timeline.e2e_s for timeline in finished),
        tokens_per_event=num_output_tokens / num_events if num_events else 0.0,
        attainment=None if slo is None else attainment(slo, arrived),
        goodput_per_s=None if slo is None else goodput(slo, arrived, duration_s),
        max_in_flight=load.max_in_flight,
        send_lateness_s=Percentiles.of(lateness_s),
        num_late_sends=sum(late_s > LATE_SEND_S for late_s in lateness_s),
        held_s=Percentiles.of(record.arrival_s - record.scheduled_s for record in records),
        loop_lag_s=Percentiles.of(load.loop_lags_s),
        client_cpu_s=load.client_cpu_s,
        client_cpu_us_per_event=1e6 * load.client_cpu_s / num_events if num_events else 0.0,
    )


def _count_errors(records: tuple[RequestRecord, ...]) -> tuple[tuple[str, int, str], ...]:
    counts = Counter(record.error for record in records if record.error is not None)
    first = {record.error: record.error_message for record in reversed(records)}
    return tuple((kind, count, first[kind]) for kind, count in counts.most_common())


def to_json_lines(report: BenchReport, *, with_requests: bool = False) -> list[str]:
    """Return one JSON object per popularity: its setup, its results and, if asked, every request.

    Infinite rates are the string "inf"; the API key is never included.
    """
    setup = _jsonable(report.setup)
    del setup["config"]["api_key"], setup["config"]["popularities"]
    lines = []
    for run in report.runs:
        row = {
            "bench": "serve",
            "setup": {**setup, "popularity": run.summary.popularity},
            "results": {
                **_jsonable(run.summary),
                "throughput_ratio_to_base": report.throughput_ratio(run.summary),
            },
        }
        if with_requests:
            row["requests"] = [_jsonable(record) for record in run.records]
        lines.append(json.dumps(row, allow_nan=False))
    return lines


def check_writable(path: Path) -> None:
    """Make the file and its folder, so that a long benchmark does not end in an error.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"output_file: {error}") from error


def append_json_lines(report: BenchReport, path: Path, *, with_requests: bool) -> None:
    """Append the report to ``path``.

    Raises:
        ConfigError: it cannot be written.
    """
    check_writable(path)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in to_json_lines(report, with_requests=with_requests))


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
        # Lengths differ in meaning, not only in numbers, so their kind is part of the setup.
        return {"kind": type(value).__name__, **fields} if type(value).__module__ == _LENGTHS_MODULE else fields
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, float) and math.isinf(value)):
        return str(value)
    return value


_LENGTHS_MODULE = FixedLength.__module__
