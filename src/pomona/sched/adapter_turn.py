"""AdapterTurn: who may take adapter pages when there are too few, so that every wait for them is bounded.

Requests whose adapter is resident overtake one whose adapter is not, which keeps the batch full; the price is that they
could keep its pages pinned for ever. So after a limit the waiting one becomes the claimant, and until it has its pages
nothing new may pin any (compare SGLang's draining), except what comes before it in the fair order. Base-model requests
never wait here.
"""

from collections.abc import Callable

from pomona.sched.adapter_slots import AdapterSlots
from pomona.sched.sequence import Sequence


class AdapterTurn:
    """Decides whether a waiting sequence may start, as far as its adapter is concerned.

    Args:
        adapters: the pages and who pins them.
        wait_limit_s: how long a request lets others overtake it.
        is_before: True if the first of two waiting sequences has the better right to be served, and so passes a
            claimant.
    """

    def __init__(
        self, adapters: AdapterSlots, wait_limit_s: float, is_before: Callable[[Sequence, Sequence], bool]
    ) -> None:
        self._adapters = adapters
        self._wait_limit_s = wait_limit_s
        self._is_before = is_before
        self._claimant: Sequence | None = None

    def may_start(self, seq: Sequence, now_s: float) -> bool:
        """True if the sequence's adapter is resident or can be made so, and no claimant stands before it. Call it for
        waiting sequences in the order of the queue: the first to reach the limit becomes the claimant.

        Sequences that were admitted before and preempted since are not barred: they are finite in number, so the
        claimant waits at most until all that was ever admitted before it has ended.
        """
        adapter_id = seq.request.adapter_id
        if adapter_id is None:
            return True
        if not self.is_barred(seq) and (self._adapters.is_resident(adapter_id) or self._adapters.can_load(adapter_id)):
            return True
        if seq.first_blocked_s is None:
            seq.first_blocked_s = now_s
        if self._claimant is None and now_s - seq.first_blocked_s >= self._wait_limit_s:
            self._claimant = seq
        return False

    def is_barred(self, seq: Sequence) -> bool:
        """True if a claimant stands before the sequence, so that pages would be of no use to it."""
        claimant = self._claimant
        return (
            claimant is not None and claimant is not seq and not seq.was_admitted and not self._is_before(seq, claimant)
        )

    def leave(self, seq: Sequence) -> None:
        """Note that the sequence has started or ended."""
        seq.first_blocked_s = None
        if self._claimant is seq:
            self._claimant = None
