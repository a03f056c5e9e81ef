"""A window of a simulation as a trace that https://ui.perfetto.dev shows: Chrome's trace-event JSON.

Each replica is a process with a track of steps and counters of its batch; requests are on tracks of their own process,
as spans of waiting and of answering. Microseconds.
"""

import heapq
import math
from collections.abc import Iterator
from typing import Any

from pomona.core.ids import ReplicaId
from pomona.sim.clock import EventHeap
from pomona.sim.ledger import Ending, Ledger
from pomona.sim.step_work import StepWork

_REQUESTS_PID = 1_000_000


class StepTrace:
    """Keeps the steps that begin in a window; pass ``note`` to ``ClusterSim.observe``.

    Args:
        heap: the simulation's clock.
        start_s: of the window.
        end_s: of the window.
    """

    def __init__(self, heap: EventHeap, start_s: float, end_s: float) -> None:
        self.start_s = start_s
        self.end_s = end_s
        self.steps: list[tuple[float, ReplicaId, float, StepWork]] = []
        """(beginning, replica, seconds, work)."""
        self._heap = heap

    @property
    def stopped_s(self) -> float:
        """After the run: when it stopped."""
        return self._heap.now_s

    def note(self, replica_id: ReplicaId, seconds: float, work: StepWork) -> None:
        """A step begins."""
        if self.start_s <= self._heap.now_s < self.end_s and work.num_rows:
            self.steps.append((self._heap.now_s, replica_id, seconds, work))


def trace_events(trace: StepTrace, ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yield the window's events."""
    for replica_id in sorted({step[1] for step in trace.steps}):
        yield _name("process_name", replica_id, 0, f"replica {replica_id}")
    for start_s, replica_id, seconds, work in trace.steps:
        kind = "decode" if work.num_prefill_rows == 0 else "prefill" if work.num_decode_rows == 0 else "mixed"
        yield {
            "ph": "X",
            "name": kind,
            "cat": "step",
            "pid": replica_id,
            "tid": 0,
            "ts": 1e6 * start_s,
            "dur": 1e6 * seconds,
            "args": {name: getattr(work, name) for name in StepWork.__dataclass_fields__},
        }
        for counter, value in (("sequences", work.num_seqs), ("rows", work.num_rows), ("adapters", work.num_adapters)):
            yield _counter(counter, replica_id, start_s, value)
    yield _name("process_name", _REQUESTS_PID, 0, "requests")
    lanes: list[tuple[float, int]] = []
    for number, arrival_s in enumerate(ledger.arrival_s):
        # What had not ended when the simulation stopped goes on to that moment.
        is_open = ledger.ending[number] == Ending.NONE
        end_s = trace.stopped_s if is_open else ledger.last_token_s[number]
        if arrival_s < trace.end_s and end_s >= trace.start_s:
            yield from _request(ledger, number, _lane(lanes, arrival_s, end_s), end_s)


def _request(ledger: Ledger, number: int, lane: int, last_s: float) -> Iterator[dict[str, Any]]:
    arrival_s, first_s = ledger.arrival_s[number], ledger.first_token_s[number]
    has_tokens = not math.isnan(first_s)
    arguments = {
        "request": number,
        "tenant": ledger.tenants[ledger.tenant[number]],
        "adapter": ledger.adapter_index[number],
        "prompt tokens": ledger.num_prompt_tokens[number],
        "output tokens": ledger.num_output_tokens[number],
        "replica": ledger.replica_id[number],
    }
    spans = [("to first token", arrival_s, first_s if has_tokens else last_s)]
    if has_tokens:
        spans.append(("answer", first_s, last_s))
    for name, start_s, end_s in spans:
        yield {
            "ph": "X",
            "name": name,
            "cat": "request",
            "pid": _REQUESTS_PID,
            "tid": lane,
            "ts": 1e6 * start_s,
            "dur": 1e6 * (end_s - start_s),
            "args": arguments,
        }


def _lane(lanes: list[tuple[float, int]], start_s: float, end_s: float) -> int:
    """The track that is free since longest, or a new one; ``lanes`` is a heap of (free from, track)."""
    if lanes and lanes[0][0] <= start_s:
        lane = lanes[0][1]
        heapq.heapreplace(lanes, (end_s, lane))
        return lane
    heapq.heappush(lanes, (end_s, len(lanes)))
    return len(lanes) - 1


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _counter(name: str, pid: int, time_s: float, value: float) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": pid, "ts": 1e6 * time_s, "args": {name: value}}
