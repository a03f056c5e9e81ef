"""Account: what one tenant has in one priority class: requests waiting, places taken, and service charged."""

from collections import deque

from pomona.core.ids import AdapterId, TenantId
from pomona.core.request import Priority

_NUM_REMEMBERED_OUTPUTS = 5


class Account:
    """Written by the queue and, for speed, by the scheduler, which adds each output token's charge to ``counter``.

    Args:
        tenant_id: whose account.
        priority: of which class; classes have separate accounts, as they are served one after the other.
    """

    __slots__ = (
        "_last_outputs",
        "_num_pins",
        "_settled_s",
        "counter",
        "is_sampled",
        "num_held_pages",
        "num_running",
        "num_waiting",
        "num_waiting_prompt_tokens",
        "priority",
        "tenant_id",
        "tpot_s",
        "weight",
    )

    def __init__(self, tenant_id: TenantId, priority: Priority) -> None:
        self.tenant_id = tenant_id
        self.priority = priority
        self.weight = 1.0
        self.tpot_s: float | None = None
        self.counter = 0.0
        """Service charged, divided by weight, plus what was added by lifts: only differences mean anything."""
        self.num_waiting = 0
        self.num_running = 0
        self.num_waiting_prompt_tokens = 0
        """Prompt tokens of its waiting requests."""
        self.num_held_pages = 0
        """Pages of the distinct adapters that its running sequences pin."""
        self.is_sampled = False
        """True if any of its sequences gets a token from the latest step."""
        self._num_pins: dict[AdapterId, int] = {}
        self._settled_s = 0.0
        self._last_outputs: deque[int] = deque(maxlen=_NUM_REMEMBERED_OUTPUTS)

    @property
    def mean_output_tokens(self) -> float | None:
        """Output tokens of its latest requests; None before the first ended."""
        return sum(self._last_outputs) / len(self._last_outputs) if self._last_outputs else None

    def remember(self, num_output_tokens: int) -> None:
        """Note the output of a request that has ended."""
        self._last_outputs.append(num_output_tokens)

    def pin(self, adapter_id: AdapterId, num_pages: int) -> None:
        """Note that one of its sequences starts to run with an adapter; ``settle`` comes before."""
        num_pins = self._num_pins.get(adapter_id, 0)
        self._num_pins[adapter_id] = num_pins + 1
        if num_pins == 0:
            self.num_held_pages += num_pages

    def unpin(self, adapter_id: AdapterId, num_pages: int) -> None:
        """The counterpart of ``pin``."""
        self._num_pins[adapter_id] -= 1
        if self._num_pins[adapter_id] == 0:
            del self._num_pins[adapter_id]
            self.num_held_pages -= num_pages

    def settle(self, now_s: float, per_page_second: float) -> None:
        """Charge for the adapter pages held since the last time, unless the tenant got no token: set aside, or left out
        because a higher class takes whole steps, it gets nothing from the pages that it keeps; and input has a price of
        its own."""
        if self.num_held_pages and self.is_sampled:
            self.counter += per_page_second * self.num_held_pages * (now_s - self._settled_s) / self.weight
        self._settled_s = now_s
