"""Accounting of adapter pages: which adapters are registered, resident, pinned, draining, and next to evict.

Accounting only: weights live in the executor, which learns of every load and eviction through the step plan. Four
things can be true of a registered adapter, each the reason for the next: a request *uses* it from ``add`` to its end; a
running sequence, or one that waits for the copy, *pins* it; a pinned adapter is *resident*; a resident adapter that
nobody pins may be *evicted*. A resident adapter has its pages; while it is *loading*, its weights are on the way there.
A page that no adapter has is *free*, or *lent* to KV.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

from pomona.core.adapter import AdapterInfo
from pomona.core.errors import AdapterError
from pomona.core.ids import AdapterId, PageId
from pomona.core.plan import AdapterLoad


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """A registered adapter at one moment."""

    adapter_id: AdapterId
    page_ids: tuple[PageId, ...] | None
    """Its device pages; None while it is not resident."""
    is_draining: bool
    """It takes no new requests and goes when its last user ends."""
    num_users: int
    """Requests accepted for it that have not ended."""
    num_pins: int
    """Those of them that are running, or wait for nothing but its copy."""
    is_loading: bool = False
    """Its weights are on the way into its pages."""

    @property
    def is_resident(self) -> bool:
        """True when its weights are on the device, or on the way."""
        return self.page_ids is not None


class _Entry:
    """One registered adapter."""

    __slots__ = ("info", "is_draining", "is_loading", "is_resident", "num_pins", "num_users", "order", "page_ids")

    def __init__(self, info: AdapterInfo) -> None:
        self.info = info
        self.page_ids: tuple[PageId, ...] = ()
        self.is_resident = False
        self.is_loading = False
        self.is_draining = False
        self.num_users = 0
        self.num_pins = 0
        self.order = 0


class AdapterSlots:
    """Pages ``0 .. num_pages - 1`` and the adapters that compete for them.

    Args:
        num_pages: adapter pages of the executor.
        clock: orders uses, here and elsewhere.
    """

    def __init__(self, num_pages: int, clock: Iterator[int] | None = None) -> None:
        self.num_pages = num_pages
        self.num_lent_pages = 0
        """Pages that KV has."""
        self._clock = itertools.count() if clock is None else clock
        self.num_loads = 0
        """Loads since the start."""
        self.num_evictions = 0
        """Evictions since the start, those of drained adapters included."""
        self._entries: dict[AdapterId, _Entry] = {}
        self._free_pages = [PageId(index) for index in reversed(range(num_pages))]
        # Resident adapters that nobody pins and when they were last used, least recently first, and the pages they
        # hold together.
        self._idle: OrderedDict[AdapterId, int] = OrderedDict()
        self._num_idle_pages = 0
        self._num_resident = 0
        self._evictions: list[AdapterId] = []
        self.untold_loads: dict[AdapterId, AdapterLoad] = {}
        """Loads that the executor has not been told of."""
        self.num_loading = 0
        """Adapters that are loading."""
        # Loads of which the executor has not said that they have been made.
        self._copying: dict[int, AdapterId] = {}
        self._drained: list[AdapterId] = []

    @property
    def num_free_pages(self) -> int:
        """Pages that belong to no resident adapter and are not lent."""
        return len(self._free_pages)

    @property
    def num_used_pages(self) -> int:
        """Pages of resident adapters."""
        return self.num_pages - self.num_lent_pages - len(self._free_pages)

    @property
    def num_resident(self) -> int:
        """Adapters whose weights are, or will be after the next plan, on the device."""
        return self._num_resident

    @property
    def num_pinned(self) -> int:
        """Resident adapters that a running sequence needs."""
        return self._num_resident - len(self._idle)

    @property
    def has_evictions(self) -> bool:
        """True when the executor has not been told of every eviction."""
        return bool(self._evictions)

    def statuses(self) -> list[AdapterStatus]:
        """Every registered adapter, in the order they were registered; for people and tests, not for each step."""
        return [
            AdapterStatus(
                adapter_id=adapter_id,
                page_ids=entry.page_ids if entry.is_resident else None,
                is_draining=entry.is_draining,
                num_users=entry.num_users,
                num_pins=entry.num_pins,
                is_loading=entry.is_loading,
            )
            for adapter_id, entry in self._entries.items()
        ]

    def register(self, info: AdapterInfo) -> None:
        """Make a staged adapter available to requests. Registering it again changes nothing, except that a draining
        adapter takes new requests again and is then not reported as drained.

        Raises:
            AdapterError: it needs more pages than there are.
        """
        if info.num_pages > self.num_pages:
            raise AdapterError(
                f"the adapter needs {info.num_pages} adapter pages (rank {info.lora_rank}), "
                f"but num_adapter_pages is {self.num_pages}"
            )
        adapter_id = info.adapter_id
        entry = self._entries.get(adapter_id)
        if entry is None:
            self._entries[adapter_id] = _Entry(info)
        else:
            entry.is_draining = False
        if adapter_id in self._drained:
            self._drained.remove(adapter_id)

    def retire(self, adapter_id: AdapterId) -> None:
        """Let no new request use the adapter; when the last user has ended, free its pages and report it as drained.

        An adapter that is not registered is drained already, and reported.
        """
        entry = self._entries.get(adapter_id)
        if entry is None:
            if adapter_id not in self._drained:
                self._drained.append(adapter_id)
            return
        entry.is_draining = True
        self._drop_if_drained(entry)

    def take_drained(self) -> list[AdapterId]:
        """Adapters of which nothing is left, each reported once. One whose eviction the executor has not been told of
        yet is not among them."""
        drained = [adapter_id for adapter_id in self._drained if adapter_id not in self._evictions]
        self._drained = [adapter_id for adapter_id in self._drained if adapter_id in self._evictions]
        return drained

    def can_use(self, adapter_id: AdapterId) -> bool:
        """True when a new request may name the adapter."""
        entry = self._entries.get(adapter_id)
        return entry is not None and not entry.is_draining

    def use(self, adapter_id: AdapterId) -> None:
        """Count one accepted request; the adapter stays registered until ``end_use``."""
        assert self.can_use(adapter_id)
        self._entries[adapter_id].num_users += 1

    def end_use(self, adapter_id: AdapterId) -> None:
        """The counterpart of ``use``, after the request's last ``unpin``."""
        entry = self._entries[adapter_id]
        assert entry.num_users > entry.num_pins, "a request unpins before it ends"
        entry.num_users -= 1
        self._drop_if_drained(entry)

    def is_resident(self, adapter_id: AdapterId) -> bool:
        """True when a sequence may pin the adapter without a load; False if it is not registered."""
        entry = self._entries.get(adapter_id)
        return entry is not None and entry.is_resident

    def is_loading(self, adapter_id: AdapterId) -> bool:
        """True while the adapter's weights are on the way to its pages."""
        return self._entries[adapter_id].is_loading

    def info(self, adapter_id: AdapterId) -> AdapterInfo:
        """What was registered."""
        return self._entries[adapter_id].info

    def can_load(self, adapter_id: AdapterId) -> bool:
        """True when free pages and those of adapters that nobody pins are enough for it."""
        return self._entries[adapter_id].info.num_pages <= self.num_loadable_pages

    @property
    def idle_ids(self) -> tuple[AdapterId, ...]:
        """Resident adapters that nobody pins, next to be evicted first."""
        return tuple(self._idle)

    @property
    def oldest_idle(self) -> int | None:
        """When the adapter that is evicted next was last used; None if there is none."""
        return next(iter(self._idle.values()), None)

    @property
    def num_loadable_pages(self) -> int:
        """Pages that ``load`` could give: free ones, and those of adapters that nobody pins."""
        return len(self._free_pages) + self._num_idle_pages

    def num_pages_of(self, adapter_id: AdapterId) -> int:
        """Pages that the adapter takes while it is resident."""
        return self._entries[adapter_id].info.num_pages

    def num_pins_of(self, adapter_id: AdapterId) -> int:
        """Running sequences that need the adapter."""
        return self._entries[adapter_id].num_pins

    def load(self, adapter_id: AdapterId, *, is_awaited: bool = True) -> AdapterLoad:
        """Give the adapter its pages, evicting the least recently used adapters that nobody pins as needed.

        The load (``take_loads``), and the evictions (``take_evictions``), belong in the next plan.

        Args:
            adapter_id: registered and not resident; ``can_load`` said yes.
            is_awaited: the step that the plan is for waits for the copy. Otherwise the adapter is loading until
                ``settle_loads`` hears that the copy has been made.
        """
        entry = self._entries[adapter_id]
        assert not entry.is_resident
        assert self.can_load(adapter_id)
        num_pages = entry.info.num_pages
        while len(self._free_pages) < num_pages:
            self.evict_oldest()
        entry.page_ids = tuple(self._free_pages.pop() for _ in range(num_pages))
        entry.is_resident = True
        entry.is_loading = not is_awaited
        self.num_loading += entry.is_loading
        self._num_resident += 1
        self.num_loads += 1
        entry.order = self.num_loads
        self._idle[adapter_id] = next(self._clock)
        self._num_idle_pages += num_pages
        load = self.untold_loads[adapter_id] = AdapterLoad(adapter_id, entry.page_ids, entry.order, is_awaited)
        return load

    def loaded_by(self, load_ids: Set[int]) -> list[AdapterId]:
        """Resident adapters that came by these loads."""
        return [name for name, entry in self._entries.items() if entry.is_resident and entry.order in load_ids]

    def evict(self, adapter_id: AdapterId) -> None:
        """Evict an adapter that nobody pins, if it is resident."""
        if self.is_resident(adapter_id):
            self._evict(adapter_id)

    def evict_oldest(self) -> None:
        """Evict the least recently used adapter that nobody pins."""
        self._evict(next(iter(self._idle)))

    def lend(self) -> PageId:
        """Give a free page to KV."""
        self.num_lent_pages += 1
        return self._free_pages.pop()

    def take_back(self, page_id: PageId) -> None:
        """Have a lent page back, as a free one."""
        self.num_lent_pages -= 1
        self._free_pages.append(page_id)

    def take_loads(self) -> tuple[AdapterLoad, ...]:
        """Loads that the executor has not been told of, in order; the caller puts them into its plan."""
        loads = tuple(self.untold_loads.values())
        self.untold_loads.clear()
        return loads

    def settle_loads(self, loads: Iterable[AdapterLoad], loading: Set[int]) -> None:
        """Take in how far the copies are.

        Args:
            loads: of the plan whose result this is.
            loading: ids of the loads, of that plan and earlier ones, that have not been made.
        """
        copying = self._copying
        copying.update((load.load_id, load.adapter_id) for load in loads if not load.is_awaited)
        for load_id in [load_id for load_id in copying if load_id not in loading]:
            entry = self._entries.get(copying.pop(load_id))
            if entry is not None and entry.is_loading and entry.order == load_id:
                self._end_loading(entry)

    def pin(self, adapter_id: AdapterId) -> int:
        """Forbid eviction of a resident adapter until ``unpin``, and mark it as most recently used.

        Returns:
            Its place among the adapters of a batch: positive, and constant while it stays resident.
        """
        entry = self._entries[adapter_id]
        assert entry.is_resident, "only resident adapters are pinned"
        assert entry.num_pins < entry.num_users, "only users pin"
        if entry.num_pins == 0:
            del self._idle[adapter_id]
            self._num_idle_pages -= len(entry.page_ids)
        entry.num_pins += 1
        return entry.order

    def unpin(self, adapter_id: AdapterId) -> None:
        """The counterpart of ``pin``."""
        entry = self._entries[adapter_id]
        assert entry.num_pins > 0, "unpinned more often than pinned"
        entry.num_pins -= 1
        if entry.num_pins == 0:
            self._idle[adapter_id] = next(self._clock)
            self._num_idle_pages += len(entry.page_ids)

    def take_evictions(self) -> tuple[AdapterId, ...]:
        """Evictions that the executor has not been told of, oldest first; the caller puts them into its plan."""
        evictions = tuple(self._evictions)
        self._evictions.clear()
        return evictions

    def evict_again(self, adapter_ids: Iterable[AdapterId]) -> None:
        """Put evictions into the next plan once more: the executor may not have carried out the plan they were in."""
        self._evictions.extend(adapter_ids)

    def forget_all(self) -> None:
        """No adapter is resident any more, because the executor may have lost its state. Nothing may be pinned.
        Registered adapters stay registered and are loaded again when needed. The next plan evicts all that the executor
        may still hold: copies into their pages have to stop before others write there."""
        assert self.num_pinned == 0, "pinned adapters cannot be forgotten"
        while self._idle:
            self.evict_oldest()
        self._copying.clear()

    def _drop_if_drained(self, entry: _Entry) -> None:
        if not entry.is_draining or entry.num_users > 0:
            return
        adapter_id = entry.info.adapter_id
        if entry.is_resident:
            self._evict(adapter_id)
        del self._entries[adapter_id]
        self._drained.append(adapter_id)

    def _end_loading(self, entry: _Entry) -> None:
        self.num_loading -= entry.is_loading
        entry.is_loading = False

    def _evict(self, adapter_id: AdapterId) -> None:
        entry = self._entries[adapter_id]
        assert entry.num_pins == 0, "a pinned adapter is never evicted"
        del self._idle[adapter_id]
        self._num_idle_pages -= len(entry.page_ids)
        self._free_pages.extend(reversed(entry.page_ids))
        entry.page_ids = ()
        entry.is_resident = False
        self._num_resident -= 1
        self._end_loading(entry)
        self.num_evictions += 1
        if self.untold_loads.pop(adapter_id, None) is None:
            self._evictions.append(adapter_id)
