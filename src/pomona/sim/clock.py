"""Virtual time: events on a heap, turned one after the other. The only clock of a simulation.

Equal times are resolved by the order in which events were put on the heap, so equal inputs give equal runs.
"""

import heapq
import math
from collections.abc import Callable

Action = Callable[[], None]


class EventHeap:
    """Events to come, earliest first. An event may put others on the heap, at its own time or later."""

    def __init__(self) -> None:
        self.now_s = 0.0
        """Time of the event being handled, or of the last one."""
        self.num_handled = 0
        """Events handled since the start."""
        # The number makes entries of equal time ordered, and keeps actions from being compared.
        self._events: list[tuple[float, int, Action]] = []
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._events)

    def at(self, time_s: float, action: Action) -> None:
        """Call ``action`` at ``time_s``, after all events of that time that are on the heap already."""
        assert self.now_s <= time_s < math.inf, f"an event at {time_s} s, but it is {self.now_s} s"
        self._num_added += 1
        heapq.heappush(self._events, (time_s, self._num_added, action))

    def after(self, delay_s: float, action: Action) -> None:
        """Call ``action`` in ``delay_s`` seconds."""
        self.at(self.now_s + delay_s, action)

    def run(self, until_s: float = math.inf) -> None:
        """Handle events until none is left, or the next is later than ``until_s``; it is then ``until_s``, or, if that
        is infinite, the time of the last event."""
        events = self._events
        while events and events[0][0] <= until_s:
            self.now_s, _, action = heapq.heappop(events)
            self.num_handled += 1
            action()
        if until_s < math.inf:
            self.now_s = max(self.now_s, until_s)
