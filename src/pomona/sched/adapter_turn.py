"""AdapterTurn: who may take adapter pages when there are too few, so that every wait for them is bounded.

Requests whose adapter is resident overtake one whose adapter is not, which keeps the batch full; the price is that they
could keep its pages pinned for ever. So after a limit the waiting one becomes the claimant. The adapters whose running
users will be done first are *closed* to new users, as many as it needs the pages of, and until it has them nobody else
gets pages; users of all other adapters come and go meanwhile. KV is *confined* to its own blocks meanwhile, so that the
pages it has borrowed come back when those who hold them now are done. Base-model requests never wait here. Sequences
that wait with pages pinned, for a place in the batch, give them up to a claimant that they do not come before, and at
once to whom they would have to yield if they ran; and a claim ends when a sequence of a higher class lacks room.
"""

import math
from collections.abc import Callable, Iterable

from pomona.core.ids import AdapterId
from pomona.sched.adapter_arrivals import AdapterArrivals
from pomona.sched.fair_queue import FairQueue
from pomona.sched.memory import Memory
from pomona.sched.sequence import Sequence


class AdapterTurn:
    """Decides whether a waiting sequence may start, as far as adapter pages are concerned.

    Args:
        memory: the pages and who has them.
        arrivals: which waiting sequences pin some.
        queue: who has the better right to be served, and so passes a claimant.
        wait_limit_s: how long a request lets others overtake it.
        running: the sequences that run now.
    """

    def __init__(
        self,
        memory: Memory,
        arrivals: AdapterArrivals,
        queue: FairQueue,
        wait_limit_s: float,
        running: Callable[[], Iterable[Sequence]],
    ) -> None:
        self._memory = memory
        self._adapters = memory.adapters
        self._arrivals = arrivals
        self._queue = queue
        self._wait_limit_s = wait_limit_s
        self._running = running
        self._claimant: Sequence | None = None
        # When a claimant yielded: the wait for the next claim begins then, whoever makes it.
        self._yielded_s = -math.inf
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
        that use a closed adapter have ended, or have given up its pages.
        """
        adapter_id = seq.request.adapter_id
        if adapter_id is None:
            return True
        is_barred = self.is_barred(seq)
        if not is_barred and (self._adapters.is_resident(adapter_id) or self._memory.can_load(adapter_id)):
            return True
        self._note(seq, now_s)
        if is_barred:
            return False
        self._arrivals.give_up(lambda joining: self._owes_pages(joining, seq))
        return self._memory.can_load(adapter_id)

    def pass_over(self, seq: Sequence, now_s: float) -> bool:
        """Stands for ``may_start`` where that was False of a sequence before this one, of the same tenant and adapter,
        which is not resident. Returns False if this one has to be asked all the same: it is the claimant now."""
        self._note(seq, now_s)
        return self._claimant is not seq

    def _note(self, seq: Sequence, now_s: float) -> None:
        """Note that a sequence is passed over. After the limit it becomes the claimant, if there is none."""
        if seq.first_blocked_s is None:
            seq.first_blocked_s = now_s
        if self._claimant is None and now_s - max(seq.first_blocked_s, self._yielded_s) >= self._wait_limit_s:
            self._claimant = seq
            self._memory.pool.is_confined = True

    def yield_room(self, seq: Sequence, now_s: float) -> bool:
        """End a claim of a lower class than that of a sequence that lacks room: KV is not confined for those who come
        after it. Returns True if there was one."""
        claimant = self._claimant
        if claimant is None or claimant.account.priority <= seq.account.priority:
            return False
        self._end_claim()
        self._yielded_s = now_s
        return True

    def is_barred(self, seq: Sequence) -> bool:
        """True if a claimant stands before the sequence, so that pages would be of no use to it."""
        claimant, adapter_id = self._claimant, seq.request.adapter_id
        if claimant is None or claimant is seq or adapter_id is None or seq.was_admitted:
            return False
        if self._arrivals.is_joining(seq) or self._queue.is_before(seq, claimant):
            return False
        if not self._adapters.is_resident(adapter_id):
            return True
        self._close(claimant)
        return adapter_id in self._closed

    def leave(self, seq: Sequence) -> None:
        """Note that the sequence has its pages, or has ended."""
        seq.first_blocked_s = None
        if self._claimant is seq:
            self._end_claim()

    def _end_claim(self) -> None:
        self._claimant = None
        self._closed.clear()
        self._memory.pool.is_confined = False

    def _owes_pages(self, joining: Sequence, seq: Sequence) -> bool:
        is_after_claimant = self._claimant is seq and not self._queue.is_before(joining, seq)
        return is_after_claimant or self._queue.must_yield(joining.account, seq.account)

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
