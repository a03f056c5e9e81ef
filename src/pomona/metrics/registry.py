"""Every exported metric, in one table: name, type, unit, help, labels, buckets.

Definitions only. ``server.metrics`` exports them; docs and dashboards are generated from them. Latencies are measured
by the server, from the moment a request was accepted (glossary: TTFT, ITL, TPOT, e2e latency, queue time).
"""

from dataclasses import dataclass
from typing import Final, Literal

_LATENCY_BUCKETS_S: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip
_TOKEN_LATENCY_BUCKETS_S: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported metric."""

    name: str
    """As Prometheus shows it; counters end in ``_total``."""
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    """``adapter`` is an adapter's name, the base model's name for requests without one, or "(other)" past the cap."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, without infinity."""
    stat: str | None = None
    """Field of ``core.output.EngineStats`` that it shows, or of ``AdapterService.totals`` or ``Ledger.totals``; None if
    the server counts it as it happens."""


TTFT_SECONDS: Final = Metric(
    "pomona_time_to_first_token_seconds",
    "histogram",
    "seconds",
    "Time from accepting a request to its first output token.",
    ("adapter",),
    _LATENCY_BUCKETS_S,
)
ITL_SECONDS: Final = Metric(
    "pomona_inter_token_latency_seconds",
    "histogram",
    "seconds",
    "Time between consecutive output tokens of a request.",
    ("adapter",),
    _TOKEN_LATENCY_BUCKETS_S,
)
TPOT_SECONDS: Final = Metric(
    "pomona_time_per_output_token_seconds",
    "histogram",
    "seconds",
    "(e2e latency - TTFT) / (output tokens - 1), once per finished request of two tokens or more.",
    ("adapter",),
    _TOKEN_LATENCY_BUCKETS_S,
)
E2E_SECONDS: Final = Metric(
    "pomona_e2e_latency_seconds",
    "histogram",
    "seconds",
    "Time from accepting a request to its last output token, for finished requests.",
    ("adapter",),
    _LATENCY_BUCKETS_S,
)
QUEUE_SECONDS: Final = Metric(
    "pomona_queue_time_seconds",
    "histogram",
    "seconds",
    "Time from accepting a request to the first step that computed a part of it.",
    ("adapter",),
    _LATENCY_BUCKETS_S,
)
REQUESTS: Final = Metric(
    "pomona_requests_total",
    "counter",
    "requests",
    "Requests ended, by reason: stop, length, abort, fail, or reject (never admitted). Every choice counts as one.",
    ("adapter", "finish_reason"),
)
PROMPT_TOKENS: Final = Metric(
    "pomona_prompt_tokens_total", "counter", "tokens", "Prompt tokens of requests that were scheduled.", ("adapter",)
)
CACHED_TOKENS: Final = Metric(
    "pomona_cached_tokens_total", "counter", "tokens", "Of these, tokens taken from the prefix cache.", ("adapter",)
)
OUTPUT_TOKENS: Final = Metric(
    "pomona_output_tokens_total", "counter", "tokens", "Output tokens given to requests.", ("adapter",)
)
HTTP_REQUESTS: Final = Metric(
    "pomona_http_requests_total",
    "counter",
    "requests",
    "HTTP requests answered; status 499: the client went away before there was an answer.",
    ("route", "method", "status"),
)
INTERNAL_ERRORS: Final = Metric(
    "pomona_internal_errors_total", "counter", "errors", "Errors that only a bug of Pomona's explains; see the log."
)
LOADED_ADAPTERS: Final = Metric("pomona_loaded_adapters", "gauge", "adapters", "Adapter names that requests may use.")
ENGINE_READY: Final = Metric(
    "pomona_engine_ready", "gauge", "boolean", "1 while the engine answers, 0 while it starts or restarts."
)
ENGINE_RESTARTS: Final = Metric(
    "pomona_engine_restarts_total", "counter", "restarts", "Times the engine was started again after its death."
)

_ENGINE_GAUGES: Final = (
    ("pomona_running_requests", "requests", "num_running", "Requests being computed."),
    ("pomona_waiting_requests", "requests", "num_waiting", "Requests in the queue."),
    ("pomona_kv_blocks", "blocks", "num_kv_blocks", "KV blocks there are, those in lent adapter pages included."),
    ("pomona_kv_blocks_used", "blocks", "num_kv_blocks_used", "KV blocks that running requests refer to."),
    ("pomona_adapter_pages", "pages", "num_adapter_pages", "Adapter pages there are."),
    ("pomona_adapter_pages_used", "pages", "num_adapter_pages_used", "Adapter pages that hold resident adapters."),
    ("pomona_adapter_pages_lent", "pages", "num_adapter_pages_lent", "Adapter pages that hold KV blocks meanwhile."),
    ("pomona_resident_adapters", "adapters", "num_resident_adapters", "Adapters resident on the device."),
    ("pomona_pinned_adapters", "adapters", "num_pinned_adapters", "Resident adapters that may not be evicted now."),
)  # fmt: skip
_ENGINE_COUNTERS: Final = (
    ("pomona_engine_steps_total", "steps", "num_steps", "Steps taken."),
    ("pomona_preemptions_total", "preemptions", "num_preemptions",
     "Times a running request had to give up its blocks."),
    ("pomona_engine_prompt_tokens_total", "tokens", "num_prompt_tokens",
     "Prompt tokens computed: prefix hits excluded, recomputation included."),
    ("pomona_engine_output_tokens_total", "tokens", "num_output_tokens", "Output tokens produced."),
    ("pomona_prefix_query_tokens_total", "tokens", "num_prefix_queries",
     "Prompt tokens looked up in the prefix cache."),
    ("pomona_prefix_hit_tokens_total", "tokens", "num_prefix_hits", "Prompt tokens found in the prefix cache."),
    ("pomona_adapter_loads_total", "adapters", "num_adapter_loads", "Adapters copied to the device."),
    ("pomona_adapter_evictions_total", "adapters", "num_adapter_evictions", "Adapters dropped from the device."),
)  # fmt: skip

ENGINE_METRICS: Final = tuple(
    Metric(name, "gauge", unit, text, stat=stat) for name, unit, stat, text in _ENGINE_GAUGES
) + tuple(
    Metric(name, "counter", unit, f"{text} Counted since the engine started.", stat=stat)
    for name, unit, stat, text in _ENGINE_COUNTERS
)
"""What the engine reports about itself."""

_RESIDENCY: Final = (
    ("pomona_adapter_host_bytes", "gauge", "bytes", "host_bytes", "Host memory of staged adapters."),
    ("pomona_adapter_host_budget_bytes", "gauge", "bytes", "host_budget_bytes", "Host memory that adapters may take."),
    ("pomona_staged_adapters", "gauge", "adapters", "staged", "Adapters in host memory."),
    ("pomona_adapter_waiting_requests", "gauge", "requests", "waiting", "Requests whose adapter is being brought in."),
    ("pomona_failed_adapters", "gauge", "adapters", "failed", "Names whose last load failed."),
    ("pomona_adapter_hits_total", "counter", "requests", "hits", "Requests that found their adapter in host memory."),
    ("pomona_adapter_misses_total", "counter", "requests", "misses",
     "Requests that had their adapter brought in, or waited for it."),
    ("pomona_adapter_stagings_total", "counter", "adapters", "loads", "Adapters brought into host memory."),
    ("pomona_adapter_staging_failures_total", "counter", "adapters", "failures", "Adapters that could not be."),
    ("pomona_adapter_staging_seconds_total", "counter", "seconds", "load_seconds",
     "Time spent bringing them in, one after the other."),
    ("pomona_adapter_host_evictions_total", "counter", "adapters", "evictions",
     "Adapters that left host memory for others."),
)  # fmt: skip

RESIDENCY_METRICS: Final = tuple(
    Metric(name, "gauge" if kind == "gauge" else "counter", unit, text, stat=stat)
    for name, kind, unit, stat, text in _RESIDENCY
)
"""What is known of adapters on their way to the device."""

_LEDGER: Final = (
    ("pomona_ledger_rows_total", "counter", "rows", "rows",
     "Rows of usage that this server has brought to the accounts database, those of dead servers included."),
    ("pomona_ledger_waiting_rows", "gauge", "rows", "waiting_rows",
     "Rows of ended requests that wait in the journal for the accounts database."),
    ("pomona_ledger_open_requests", "gauge", "requests", "open_requests",
     "Requests accepted whose row is not written yet, because they have not ended."),
    ("pomona_ledger_journal_bytes", "gauge", "bytes", "journal_bytes", "Disk space that the journal takes."),
    ("pomona_ledger_failed_writes_total", "counter", "writes", "failed_writes",
     "Times rows could not be brought to the disk or the database, and stayed in the journal."),
    ("pomona_accounts_database_down_seconds", "gauge", "seconds", "database_down_seconds",
     "Time since the accounts database began not to answer; 0 while it answers."),
)  # fmt: skip

LEDGER_METRICS: Final = tuple(
    Metric(name, "gauge" if kind == "gauge" else "counter", unit, f"{text} Only with accounts.", stat=stat)
    for name, kind, unit, stat, text in _LEDGER
)
"""Whether the bill is being written."""

SERVER_METRICS: Final = (
    TTFT_SECONDS,
    ITL_SECONDS,
    TPOT_SECONDS,
    E2E_SECONDS,
    QUEUE_SECONDS,
    REQUESTS,
    PROMPT_TOKENS,
    CACHED_TOKENS,
    OUTPUT_TOKENS,
    HTTP_REQUESTS,
    INTERNAL_ERRORS,
    LOADED_ADAPTERS,
    ENGINE_READY,
    ENGINE_RESTARTS,
    *RESIDENCY_METRICS,
    *LEDGER_METRICS,
)
"""What the server counts."""

METRICS: Final = SERVER_METRICS + ENGINE_METRICS
"""All of them."""
