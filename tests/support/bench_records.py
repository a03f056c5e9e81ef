"""Builders for the load generator's records, with defaults so that only what matters is visible."""

from pomona.bench.load import LoadResult, RequestRecord


def make_record(
    *token_times_s: float,
    arrival_s: float = 0.0,
    scheduled_s: float | None = None,
    sent_s: float | None = None,
    ended_s: float | None = None,
    finished_s: float | None = None,
    num_output_tokens: int | None = None,
    error: str | None = None,
    model: str = "tiny",
) -> RequestRecord:
    """A request whose tokens were read at these times, one per event; failed if ``error`` is set."""
    last_s = token_times_s[-1] if token_times_s else arrival_s
    num_tokens = len(token_times_s) if num_output_tokens is None else num_output_tokens
    return RequestRecord(
        model=model,
        scheduled_s=arrival_s if scheduled_s is None else scheduled_s,
        arrival_s=arrival_s,
        sent_s=arrival_s if sent_s is None else sent_s,
        ended_s=last_s if ended_s is None else ended_s,
        token_times_s=token_times_s,
        finished_s=last_s if finished_s is None else finished_s,
        num_prompt_tokens=None if error else 10,
        num_cached_tokens=None,
        num_output_tokens=None if error else num_tokens,
        finish_reason=None if error else "length",
        error=error,
        error_message=f"about {error}" if error else "",
    )


def make_load(*records: RequestRecord, client_cpu_s: float = 0.0, loop_lags_s: tuple[float, ...] = ()) -> LoadResult:
    """A finished run."""
    return LoadResult(records, len(records), client_cpu_s, loop_lags_s)
