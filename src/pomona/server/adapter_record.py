"""AdapterRecord: what is known of one name besides what it means: how often it was used and brought in, how long that
took, and why it cannot be used if it cannot. Bookkeeping only; ``server.adapter_service`` keeps it."""

import enum
from dataclasses import dataclass, field

from pomona.core.errors import (
    AdapterError,
    AdapterFailedError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    ModelNotFoundError,
    PomonaError,
)

_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 60.0


class Tier(enum.StrEnum):
    """Where an adapter is, or how far on its way; what people see as its state."""

    REGISTERED = "registered"
    """Known by name only."""
    FETCHING = "fetching"
    """Its files come to this machine."""
    VERIFYING = "verifying"
    """The engine reads, checks and converts them; they may have to wait for room in host memory."""
    STAGED = "staged"
    """In host memory; the engine copies it to the device when a request needs it."""
    RESIDENT = "resident"
    """On the device."""
    DRAINING = "draining"
    FAILED = "failed"
    """It could not be brought in; ``error`` says why."""


@dataclass(slots=True)
class AdapterRecord:
    """One name's history since start."""

    num_hits: int = 0
    """Requests that found it staged."""
    num_misses: int = 0
    """Requests that had it brought in, or waited for it."""
    num_loads: int = 0
    """Times it was brought in."""
    num_failures: int = 0
    """Times that failed."""
    num_evictions: int = 0
    """Times it had to go for others."""
    num_waiting: int = 0
    """Requests that wait for it now."""
    fetch_s: float = 0.0
    """How long the last fetching took."""
    stage_s: float = 0.0
    """How long the last verifying took, waiting for room included."""
    last_used_s: float | None = None
    """Unix time of the last request."""
    is_pinned: bool = False
    step: Tier | None = None
    """FETCHING or VERIFYING while it is being brought in."""
    error: AdapterError | None = None
    """Why it could not be brought in last time."""
    retry_at_s: float = 0.0
    """Monotonic time from which it may be tried again."""
    _delay_s: float = field(default=0.0, repr=False)

    def succeed(self) -> None:
        """It was brought in."""
        self.num_loads += 1
        self.error = None
        self._delay_s = 0.0

    def fail(self, error: AdapterError, now_s: float) -> None:
        """It could not be brought in: not to be tried again for a while that doubles with every failure."""
        self.num_failures += 1
        self.error = error
        self._delay_s = min(max(2 * self._delay_s, _FIRST_DELAY_S), _MAX_DELAY_S)
        self.retry_at_s = now_s + self._delay_s

    def refusal(self, model: str, now_s: float) -> PomonaError | None:
        """What to tell a request for it; None if it may be tried (again)."""
        if self.error is None or now_s >= self.retry_at_s:
            return None
        return refusal_of(self.error, model, self.retry_at_s - now_s)


def refusal_of(error: PomonaError, model: str, retry_after_s: float) -> PomonaError:
    """A failed load as the requests that waited for it are told."""
    if isinstance(error, AdapterUnavailableError):
        return AdapterUnavailableError(f"The adapter {model!r} cannot be brought in now: {error}", retry_after_s)
    if isinstance(error, AdapterNotFoundError):
        return ModelNotFoundError(model)
    if isinstance(error, AdapterError):
        return AdapterFailedError(f"The adapter {model!r} cannot be used: {error}")
    return error
