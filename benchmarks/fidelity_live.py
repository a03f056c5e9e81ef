"""The live side of ``benchmarks.fidelity``: an engine in real time, and the figures of what came out of it."""

import math
import time
from collections.abc import Sequence
from typing import Any

from pomona.bench.percentiles import percentile
from pomona.core.ids import RequestId
from pomona.core.output import RequestOutput
from pomona.core.request import FinishReason, Request
from pomona.engine.engine import Engine
from pomona.metrics.timeline import RequestTimeline


def note(timelines: dict[RequestId, RequestTimeline], outputs: Sequence[RequestOutput], now_s: float) -> None:
    """Write a step's outputs into the requests' timelines."""
    for output in outputs:
        _write(timelines[output.request_id], len(output.new_token_ids), output.finish_reason, now_s)


def _write(timeline: RequestTimeline, num_tokens: int, finish_reason: FinishReason | None, now_s: float) -> None:
    if num_tokens:
        timeline.add_tokens(num_tokens, now_s)
    if finish_reason is not None:
        timeline.end(now_s, finish_reason)


class LiveRun:
    """An engine turned in real time as the driver does: what has arrived, then a step. What came out is looked at when
    all is over. Its clock can be stopped between two steps.

    Args:
        engine: with nothing to do.
        requests: in the order of their arrival; times count from the beginning.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.clock_s = 0.0
        self._engine = engine
        self._requests = requests
        self._num_added = 0
        # Nothing that the garbage collector would go through while the run lasts.
        self._came_out: list[tuple[RequestId, int, FinishReason | None, float]] = []

    @property
    def is_over(self) -> bool:
        """True when every request has ended."""
        return self._num_added == len(self._requests) and not self._engine.has_work

    def go_on(self, seconds: float = math.inf) -> None:
        """To the end of the step in which so many seconds have passed, or to the end of all."""
        start_s = time.perf_counter() - self.clock_s
        end_s = self.clock_s + seconds
        engine, requests = self._engine, self._requests
        while self.clock_s < end_s and not self.is_over:
            now_s = time.perf_counter() - start_s
            while self._num_added < len(requests) and requests[self._num_added].arrival_s <= now_s:
                engine.add(requests[self._num_added])
                self._num_added += 1
            if engine.has_work:
                outputs = engine.step(start_s + now_s)
                out_s = time.perf_counter() - start_s
                for output in outputs:
                    what = (output.request_id, len(output.new_token_ids), output.finish_reason, out_s)
                    self._came_out.append(what)
            elif self._num_added < len(requests):
                until_s = min(requests[self._num_added].arrival_s - 1e-4, end_s)
                time.sleep(max(0.0, until_s - now_s))
            self.clock_s = time.perf_counter() - start_s

    def figures(self) -> dict[str, float]:
        """Of the whole run; see ``figures``."""
        timelines = {request.request_id: RequestTimeline(request.arrival_s) for request in self._requests}
        for request_id, num_tokens, finish_reason, out_s in self._came_out:
            _write(timelines[request_id], num_tokens, finish_reason, out_s)
        return figures(timelines.values())


def figures(timelines: Any) -> dict[str, float]:
    """p50 and p99 of TTFT and TPOT in seconds, output tokens per second from the first arrival to the last token."""
    found = list(timelines)
    ttft = sorted(timeline.ttft_s for timeline in found)
    tpot = sorted(timeline.tpot_s for timeline in found if timeline.tpot_s is not None)
    end_s = max(timeline.end_s for timeline in found)
    return {
        "ttft_p50_s": percentile(ttft, 0.5),
        "ttft_p99_s": percentile(ttft, 0.99),
        "tpot_p50_s": percentile(tpot, 0.5),
        "tpot_p99_s": percentile(tpot, 0.99),
        "output_tokens_per_s": sum(timeline.num_output_tokens for timeline in found) / end_s,
    }
