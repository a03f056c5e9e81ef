"""HostCache: which adapters to keep in host memory. Accounting only: no weights, clock or lock; its owner stages and
unloads.

The rule is GreedyDual-Size-Frequency (Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency
caching policy", HP Labs 1998): an adapter's priority is ``clock + uses * load_s / num_bytes``; the lowest goes first,
and the clock rises to the priority of what went, so that what is not used any more ages past what is. What is in use,
or pinned, is never chosen.
"""

from collections import Counter
from dataclasses import dataclass

from pomona.core.ids import AdapterId


@dataclass(slots=True)
class _Kept:
    num_bytes: int
    load_s: float
    num_uses: int
    priority: float
    order: int
    """Breaks ties: the oldest goes first."""


class HostCache:
    """Bytes of staged adapters against a budget.

    Args:
        max_bytes: of staged adapters and of what is reserved for loads under way.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_evictions = 0
        """Adapters that had to go for others."""
        self._kept: dict[AdapterId, _Kept] = {}
        self._num_holds: Counter[AdapterId] = Counter()
        self._pinned: frozenset[AdapterId] = frozenset()
        self._num_kept_bytes = 0
        self._num_reserved_bytes = 0
        self._num_leaving_bytes = 0
        self._clock = 0.0
        self._order = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of staged adapters."""
        return self._num_kept_bytes

    @property
    def num_reserved_bytes(self) -> int:
        """Bytes promised to loads under way, and of adapters that are being freed."""
        return self._num_reserved_bytes + self._num_leaving_bytes

    @property
    def is_over(self) -> bool:
        """True while there is more than the budget, adapters that are being freed included."""
        return self._num_kept_bytes + self.num_reserved_bytes > self.max_bytes

    @property
    def ids(self) -> tuple[AdapterId, ...]:
        """Everything staged, the last to go first."""
        by_priority = sorted(self._kept.items(), key=lambda item: (item[1].priority, item[1].order), reverse=True)
        return tuple(adapter_id for adapter_id, _ in by_priority)

    def __contains__(self, adapter_id: AdapterId) -> bool:
        """True when the adapter is staged."""
        return adapter_id in self._kept

    def pin(self, adapter_ids: frozenset[AdapterId]) -> None:
        """Never choose these, from now on; what was pinned before and is not among them may go."""
        self._pinned = adapter_ids

    def num_holds(self, adapter_id: AdapterId) -> int:
        """Users of the adapter now, staged or not."""
        return self._num_holds[adapter_id]

    def hold(self, adapter_id: AdapterId, num_holds: int = 1) -> None:
        """Count users of a staged adapter; it stays until ``release``."""
        kept = self._kept[adapter_id]
        if not num_holds:
            return
        self._num_holds[adapter_id] += num_holds
        kept.num_uses += num_holds
        kept.priority = self._clock + kept.num_uses * kept.load_s / kept.num_bytes

    def release(self, adapter_id: AdapterId) -> None:
        """The counterpart of one ``hold``."""
        assert self._num_holds[adapter_id] > 0, "released more often than held"
        self._num_holds[adapter_id] -= 1
        if not self._num_holds[adapter_id]:
            del self._num_holds[adapter_id]

    def add(self, adapter_id: AdapterId, num_bytes: int, load_s: float) -> None:
        """Note that an adapter is staged; again costs nothing.

        Args:
            adapter_id: the adapter.
            num_bytes: of its host copy.
            load_s: what it took to bring it in, and would take again.
        """
        if adapter_id in self._kept:
            return
        self._order += 1
        size = max(num_bytes, 1)
        self._kept[adapter_id] = _Kept(size, load_s, 0, self._clock + load_s / size, self._order)
        self._num_kept_bytes += size

    def discard(self, adapter_id: AdapterId) -> int:
        """Note that an adapter is no longer staged; returns the bytes it had."""
        kept = self._kept.pop(adapter_id, None)
        if kept is None:
            return 0
        self._num_kept_bytes -= kept.num_bytes
        return kept.num_bytes

    def clear(self) -> None:
        """Nothing is staged any more: the engine is a new one. Users and reservations stay until they end."""
        self._kept.clear()
        self._num_kept_bytes = 0

    def reserve(self, num_bytes: int) -> None:
        """Promise bytes to a load."""
        self._num_reserved_bytes += num_bytes

    def unreserve(self, num_bytes: int) -> None:
        """The counterpart of ``reserve``."""
        self._num_reserved_bytes -= num_bytes
        assert self._num_reserved_bytes >= 0, "more was given back than reserved"

    def leave(self, num_bytes: int) -> None:
        """An adapter that was discarded takes these until it is freed. Nothing else has to go because of them."""
        self._num_leaving_bytes += num_bytes

    def left(self, num_bytes: int) -> None:
        """The counterpart of ``leave``."""
        self._num_leaving_bytes -= num_bytes
        assert self._num_leaving_bytes >= 0, "more was freed than was on its way out"

    def victims(self, num_bytes: int) -> list[AdapterId] | None:
        """What must go so that ``num_bytes`` more fit once all that leaves is freed, in order; None if that is not
        possible now."""
        chosen, num_missing = self._choose(num_bytes)
        return None if num_missing > 0 else chosen

    def leaves_room(self, num_bytes: int) -> bool:
        """False when, because of what is pinned, ``num_bytes`` will not fit however long one waits."""
        num_pinned_bytes = sum(kept.num_bytes for adapter_id, kept in self._kept.items() if adapter_id in self._pinned)
        return num_pinned_bytes + num_bytes <= self.max_bytes

    def surplus(self) -> list[AdapterId]:
        """What may go of what is more than the budget: adapters turned out larger than was reserved for them."""
        return self._choose(0)[0]

    def _choose(self, num_bytes: int) -> tuple[list[AdapterId], int]:
        """What must go, as far as anything may, and the bytes that would still be missing."""
        excess = self._num_kept_bytes + self._num_reserved_bytes + num_bytes - self.max_bytes
        chosen: list[AdapterId] = []
        if excess <= 0:
            return chosen, 0
        idle = [(kept.priority, kept.order, adapter_id) for adapter_id, kept in self._kept.items()]
        for _, _, adapter_id in sorted(idle):
            if excess <= 0:
                break
            if adapter_id not in self._num_holds and adapter_id not in self._pinned:
                chosen.append(adapter_id)
                excess -= self._kept[adapter_id].num_bytes
        return chosen, max(0, excess)

    def evict(self, adapter_id: AdapterId) -> int:
        """``discard`` one of ``victims`` and let the clock rise; returns the bytes it had."""
        assert adapter_id not in self._num_holds, "what is in use is never evicted"
        self._clock = max(self._clock, self._kept[adapter_id].priority)
        self.num_evictions += 1
        return self.discard(adapter_id)
