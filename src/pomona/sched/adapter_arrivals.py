"""AdapterArrivals: how a sequence's adapter comes to the device, and from when on the sequence may compute.

Three ways. *on_demand*: the step that first needs an adapter waits for its copy, and with it everyone in the batch, as
in most engines. *join*: the copy runs beside the steps (Punica, arXiv 2310.18547, section 5.2); the sequence waits with
the adapter's pages pinned, and joins when the weights are there. *assist*: the sequence starts at once, its prompt is
computed from the host copy, and it decodes when the weights are there (CaraServe, arXiv 2401.11240). In the last two,
adapters of requests further back in the queue are copied ahead into pages that nobody uses.
"""

from collections.abc import Callable, Iterable
from typing import Literal

from pomona.sched.memory import Memory
from pomona.sched.sequence import Sequence

AdapterLoading = Literal["on_demand", "join", "assist"]
"""See the module."""

_MAX_LOOK_AHEAD = 32
"""Waiting requests whose adapters are copied ahead of their turn."""


class AdapterArrivals:
    """Pins adapters for sequences, and loads them.

    Args:
        memory: the pages, and KV that may have some of them.
        loading: which way.
    """

    def __init__(self, memory: Memory, loading: AdapterLoading) -> None:
        self._memory = memory
        self._adapters = memory.adapters
        self._is_awaited = loading == "on_demand"
        self._is_assisted = loading == "assist"
        self._joining: dict[Sequence, None] = {}
        """Those that wait, and pin their adapters already."""

    def may_start(self, seq: Sequence) -> bool:
        """True if a waiting sequence may begin to compute. Otherwise its adapter is on the way, or has just been sent
        for, and stays pinned for it. ``AdapterTurn.may_start`` said yes."""
        adapter_id = seq.request.adapter_id
        if adapter_id is None or self._is_awaited:
            return True
        adapters = self._adapters
        is_loading = not adapters.is_resident(adapter_id) or adapters.is_loading(adapter_id)
        if not is_loading or (self._is_assisted and not adapters.info(adapter_id).has_extras):
            return True
        if seq not in self._joining:
            self._pin(seq)
            self._joining[seq] = None
        return False

    def take(self, seq: Sequence) -> int:
        """Pin the adapter of a sequence that starts, loading it if need be.

        Returns:
            Pages that were loaded for it.
        """
        if seq in self._joining:
            del self._joining[seq]
        else:
            self._pin(seq)
        return seq.num_loaded_pages

    def leave(self, seq: Sequence) -> None:
        """Note that a waiting sequence has ended, or has to give up its adapter's pages."""
        if seq in self._joining:
            del self._joining[seq]
            assert seq.request.adapter_id is not None
            self._adapters.unpin(seq.request.adapter_id)

    def is_joining(self, seq: Sequence) -> bool:
        """True if a waiting sequence waits for its adapter's copy or its own turn, and pins the adapter already."""
        return seq in self._joining

    def give_up(self, owes: Callable[[Sequence], bool]) -> None:
        """Unpin the adapters of those waiting sequences that owe it, except while they are copied: a copy is soon made,
        and two that interrupted each other's would never have one."""
        for seq in list(self._joining):
            assert seq.request.adapter_id is not None
            if owes(seq) and not self._adapters.is_loading(seq.request.adapter_id):
                self.leave(seq)

    def is_held(self, seq: Sequence) -> bool:
        """True if a running sequence may not compute its next token yet: its prompt was computed from the host copy,
        and the weights are still on the way."""
        adapter_id = seq.request.adapter_id
        return (
            adapter_id is not None
            and seq.num_computed_tokens >= seq.num_prompt_tokens
            and self._adapters.is_loading(adapter_id)
        )

    def look_ahead(self, waiting: Iterable[Sequence]) -> None:
        """Begin to copy adapters of sequences that cannot start yet, best first, as far as free pages go. Nothing is
        evicted for them, and they may be evicted before they are used."""
        if self._is_awaited:
            return
        adapters = self._adapters
        for seq, _ in zip(waiting, range(_MAX_LOOK_AHEAD), strict=False):
            adapter_id = seq.request.adapter_id
            if adapter_id is None or adapters.is_resident(adapter_id):
                continue
            if adapters.num_pages_of(adapter_id) > adapters.num_free_pages:
                break
            self._memory.load(adapter_id, is_awaited=False)

    def _pin(self, seq: Sequence) -> None:
        adapters, adapter_id = self._adapters, seq.request.adapter_id
        assert adapter_id is not None
        if not adapters.is_resident(adapter_id):
            seq.num_loaded_pages = len(self._memory.load(adapter_id, is_awaited=self._is_awaited).page_ids)
        seq.adapter_order = adapters.pin(adapter_id)
