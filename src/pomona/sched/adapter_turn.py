"""AdapterTurn: who may take adapter pages when there are too few, so that every wait for them is bounded.

Requests whose adapter is resident overtake one whose adapter is not, which keeps the batch full; the price is that they
could keep its pages pinned for ever. So after a limit the waiting one becomes the claimant. The adapters whose running
users will be done first are *closed* to new users, as many as it needs the pages of, and until it has them nobody else
gets pages; users of all other adapters come and go meanwhile. KV is *confined* to its own blocks meanwhile, so that the
pages it has borrowed come back when those who hold them now are done. Base-model requests never wait here.
"""

from collections.abc import Callable, Iterable

from pomona.core.ids import AdapterId
from pomona.sched.memory import Memory
from pomona.sched.sequence import Sequence


class AdapterTurn:
    """Decides whether a waiting sequence may start, as far as adapter pages are concerned.

    Args:
        memory: the pages and who has them.
        wait_limit_s: how long a request lets others overtake it.
        is_before: True if the first of two waiting sequences has the better right to be served, and so passes a
            claimant.
        running: the sequences that run now.
    """

    def __init__(
        self,
        memory: Memory,
        wait_limit_s: float,
        is_before: Callable[[Sequence, Sequence], bool],
        running: Callable[[], Iterable[Sequence]],
    ) -> None:
        self._memory = memory
        self._adapters = memory.adapters
        self._wait_limit_s = wait_limit_s
        self._is_before = is_before
        self._running = running
        self._claimant: Sequence | None = None
        # Adapters that take no new users until the claimant has its pages; in the order in which they were closed.
        self._closed: dict[AdapterId, None] = {}

    @property
    def has_claimant(self) -> bool:
        """True while somebody has waited for pages beyond the limit."""
        return self._claimant is not None

    def may_start(self, seq: Sequence, now_s: float) -> bool:
        """True if the sequence's adapter is resident or can be made so, and no claimant stands before it. Call it for
        waiting sequences in the order of the queue: the first to reach the limit becomes the claimant.

        Sequences that were admitted before and preempted since, and those that wait for their adapter's copy, are not
        barred: they are finite in number, so the claimant waits at most until those of them, and of the running ones,
        that use a closed adapter have ended.
        """
        adapter_id = seq.request.adapter_id
        if adapter_id is None:
            return True
        if not self.is_barred(seq) and (self._adapters.is_resident(adapter_id) or self._memory.can_load(adapter_id)):
            return True
        if seq.first_blocked_s is None:
            seq.first_blocked_s = now_s
        if self._claimant is None and now_s - seq.first_blocked_s >= self._wait_limit_s:
            self._claimant = seq
            self._memory.pool.is_confined = True
        return False

    def is_barred(self, seq: Sequence) -> bool:
        """True if a claimant stands before the sequence, so that pages would be of no use to it."""
        claimant, adapter_id = self._claimant, seq.request.adapter_id
        if claimant is None or claimant is seq or adapter_id is None or seq.was_admitted or seq.is_joining:
            return False
        if self._is_before(seq, claimant):
            return False
        if not self._adapters.is_resident(adapter_id):
            return True
        self._close(claimant)
        return adapter_id in self._closed

    def leave(self, seq: Sequence) -> None:
        """Note that the sequence has its pages, or has ended."""
        seq.first_blocked_s = None
        if self._claimant is seq:
            self._claimant = None
            self._closed.clear()
            self._memory.pool.is_confined = False

    def _close(self, claimant: Sequence) -> None:
        """See to it that free pages, those that KV gives back and those of closed adapters are enough for the claimant:
        first it closes adapters that nobody uses, then those whose running users have the fewest tokens left."""
        adapters, adapter_id = self._adapters, claimant.request.adapter_id
        assert adapter_id is not None
        num_missing = adapters.num_pages_of(adapter_id) - adapters.num_free_pages - adapters.num_lent_pages
        num_missing -= sum(adapters.num_pages_of(one) for one in self._closed if adapters.is_resident(one))
        if num_missing <= 0:
            return
        tokens_left = dict.fromkeys(adapters.idle_ids, 0)
        for seq in self._running():
            used = seq.request.adapter_id
            if used is not None:
                tokens_left[used] = max(tokens_left.get(used, 0), seq.max_tokens_total - seq.num_computed_tokens)
        for used in sorted(tokens_left, key=tokens_left.__getitem__):
            if num_missing <= 0:
                break
            if used not in self._closed:
                self._closed[used] = None
                num_missing -= adapters.num_pages_of(used)
