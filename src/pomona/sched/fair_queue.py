"""FairQueue: the waiting requests, and which of them is next. First come, first served over all tenants for now.

Only order lives here; whether a candidate fits is the scheduler's question. A policy over tenants replaces the order
of ``candidates`` and nothing else.
"""

from collections import OrderedDict
from collections.abc import Iterator

from pomona.core.ids import RequestId
from pomona.sched.sequence import Sequence


class FairQueue:
    """Waiting sequences: preempted ones, the last preempted first, then new ones in order of arrival."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[RequestId, Sequence] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, seq: Sequence) -> None:
        """Append a new request."""
        assert seq.request_id not in self._waiting
        self._waiting[seq.request_id] = seq

    def requeue(self, seq: Sequence) -> None:
        """Put a preempted sequence before all others. The newest is preempted first, so the oldest comes out first."""
        self.push(seq)
        self._waiting.move_to_end(seq.request_id, last=False)

    def candidates(self) -> Iterator[Sequence]:
        """Yield every waiting sequence once, best first. The one just yielded may be removed before asking for the
        next, which is how a policy learns that it was admitted."""
        yield from list(self._waiting.values())

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that was admitted or has ended."""
        del self._waiting[seq.request_id]
