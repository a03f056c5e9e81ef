"""RequestTimeline: when things happened to one request, and the latencies that follow.

The definitions are the glossary's; whoever fills in the times decides whether they are the server's or the client's.
No clock is read here. All times are seconds on one clock.
"""

import itertools

from pomona.core.request import FinishReason


class RequestTimeline:
    """Events of one request, in the order they happen; closed exactly once by ``end``.

    Args:
        arrival_s: when the request arrived.
    """

    __slots__ = ("_token_times_s", "arrival_s", "end_s", "finish_reason", "first_scheduled_s")

    def __init__(self, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self.first_scheduled_s: float | None = None
        """When it first took part in a step; None if it never did."""
        self.end_s: float | None = None
        """When it ended; None while it has not."""
        self.finish_reason: FinishReason | None = None
        """How it ended; None while it has not, and for a request that was rejected."""
        self._token_times_s: list[float] = []

    @property
    def num_output_tokens(self) -> int:
        """Tokens delivered so far."""
        return len(self._token_times_s)

    @property
    def is_ended(self) -> bool:
        """True after ``end``."""
        return self.end_s is not None

    @property
    def is_finished(self) -> bool:
        """True if it ended with a whole answer, and not by abort, failure or rejection."""
        return self.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)

    def schedule(self, now_s: float) -> None:
        """Note that it takes part in a step; only the first time counts."""
        if self.first_scheduled_s is None:
            self.first_scheduled_s = now_s

    def add_tokens(self, num_tokens: int, now_s: float) -> None:
        """Note that so many output tokens arrived together."""
        assert not self.is_ended, "no token follows the end"
        self._token_times_s.extend([now_s] * num_tokens)

    def end(self, now_s: float, finish_reason: FinishReason | None) -> None:
        """Close the timeline.

        Args:
            now_s: when it ended.
            finish_reason: how, or None if it was rejected.
        """
        assert not self.is_ended, "a request ends once"
        self.end_s = now_s
        self.finish_reason = finish_reason

    @property
    def ttft_s(self) -> float | None:
        """First token minus arrival; None without tokens."""
        return self._token_times_s[0] - self.arrival_s if self._token_times_s else None

    @property
    def e2e_s(self) -> float | None:
        """Last token minus arrival; None without tokens."""
        return self._token_times_s[-1] - self.arrival_s if self._token_times_s else None

    @property
    def itl_s(self) -> list[float]:
        """Gaps between consecutive tokens; 0 between tokens that arrived together."""
        times = self._token_times_s
        return [after - before for before, after in itertools.pairwise(times)]

    @property
    def tpot_s(self) -> float | None:
        """(Last token minus first) / (tokens - 1); None, being undefined, below two tokens."""
        times = self._token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
