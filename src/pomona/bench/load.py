"""Open-loop load: requests leave when their time has come, whatever became of the earlier ones.

The client watches itself: how late each request left, how late its own event loop woke, and how much CPU it burned.
A client that cannot keep up offers less load than it claims and so flatters the server; here that shows.
"""

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pomona.bench.client import ServerClient, StreamOutcome

_LAG_PROBE_S = 0.01


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request encoded before the run, so that encoding costs nothing while the clock runs."""

    arrival_s: float
    """Seconds after the run's start."""
    model: str
    body: bytes


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request's story. Times are seconds after the run's start; token counts are the server's."""

    model: str
    scheduled_s: float
    arrival_s: float
    """When it should have left: its scheduled time, or, if ``max_concurrency`` held it back, when its turn came.
    Latencies count from here."""
    sent_s: float
    """When it left."""
    ended_s: float
    token_times_s: tuple[float, ...]
    """One per event that brought a token."""
    finished_s: float | None
    """When the event that ended the answer came."""
    num_prompt_tokens: int | None
    num_cached_tokens: int | None
    num_output_tokens: int | None
    finish_reason: str | None
    error: str | None
    error_message: str


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All records of a run, in the order of the requests, and what the client noticed about itself."""

    records: tuple[RequestRecord, ...]
    max_in_flight: int
    client_cpu_s: float
    """CPU time of this process, all threads."""
    loop_lags_s: tuple[float, ...]
    """Samples of how much later than asked the event loop woke."""


class _Load:
    """One run in progress."""

    def __init__(
        self, client: ServerClient, max_concurrency: int | None, on_record: Callable[[RequestRecord], None]
    ) -> None:
        self._client = client
        self._turns = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else None
        self._on_record = on_record
        self._in_flight = 0
        self.max_in_flight = 0
        self._start_s = 0.0

    async def run(self, requests: Sequence[PreparedRequest]) -> list[RequestRecord]:
        """Send every request at its time and wait for the last answer."""
        self._start_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for request in requests:
                wait_s = self._start_s + request.arrival_s - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                tasks.append(group.create_task(self._send(request)))
        return [task.result() for task in tasks]

    async def _send(self, request: PreparedRequest) -> RequestRecord:
        arrival_s = request.arrival_s
        if self._turns is not None:
            is_held = self._turns.locked()
            await self._turns.acquire()
            if is_held:
                arrival_s = max(arrival_s, time.perf_counter() - self._start_s)
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            outcome = await self._client.stream_completion(request.body)
        finally:
            self._in_flight -= 1
            if self._turns is not None:
                self._turns.release()
        record = _record(request, arrival_s, outcome, self._start_s)
        self._on_record(record)
        return record


def _record(request: PreparedRequest, arrival_s: float, outcome: StreamOutcome, start_s: float) -> RequestRecord:
    usage = outcome.usage
    return RequestRecord(
        model=request.model,
        scheduled_s=request.arrival_s,
        arrival_s=arrival_s,
        sent_s=outcome.sent_s - start_s,
        ended_s=outcome.ended_s - start_s,
        token_times_s=tuple(token_s - start_s for token_s in outcome.token_times_s),
        finished_s=None if outcome.finished_s is None else outcome.finished_s - start_s,
        num_prompt_tokens=usage.prompt_tokens if usage else None,
        num_cached_tokens=usage.num_cached_tokens if usage else None,
        num_output_tokens=usage.completion_tokens if usage else None,
        finish_reason=outcome.finish_reason,
        error=outcome.error,
        error_message=outcome.error_message,
    )


async def _watch_loop(lags_s: list[float]) -> None:
    """Sample until cancelled; the sample under way then is kept if it is late already."""
    while True:
        asked_s = time.perf_counter() + _LAG_PROBE_S
        try:
            await asyncio.sleep(_LAG_PROBE_S)
        finally:
            lags_s.append(max(0.0, time.perf_counter() - asked_s))


async def run_load(
    client: ServerClient,
    requests: Sequence[PreparedRequest],
    max_concurrency: int | None,
    on_record: Callable[[RequestRecord], None],
) -> LoadResult:
    """Send ``requests`` (ascending arrival) and return their records.

    Args:
        client: an open client.
        requests: what to send, and when.
        max_concurrency: most requests in flight; None is no limit.
        on_record: called as each request ends, in the order of their endings.
    """
    load = _Load(client, max_concurrency, on_record)
    lags_s: list[float] = []
    watch = asyncio.create_task(_watch_loop(lags_s))
    # What exists by now stays out of garbage collection, whose pauses would count as the server's.
    gc.freeze()
    cpu_start_s = time.process_time()
    try:
        records = await load.run(requests)
    finally:
        gc.unfreeze()
        watch.cancel()
        await asyncio.wait([watch])
    cpu_s = time.process_time() - cpu_start_s
    return LoadResult(tuple(records), load.max_in_flight, cpu_s, tuple(lags_s))
