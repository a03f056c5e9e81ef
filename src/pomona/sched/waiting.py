"""The waiting requests of one priority class, in the order in which they may start: by arrival, or by tenant.

A preempted sequence comes back as the next of its order: of all by arrival, of its tenant's otherwise. That it had its
turn before does not put it before tenants that had less.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from typing import Protocol

from pomona.core.ids import RequestId
from pomona.sched.account import Account
from pomona.sched.rankings import Ranking
from pomona.sched.sequence import Sequence


class WaitingOrder(Protocol):
    """Who waits, and who is next."""

    def push(self, seq: Sequence) -> None:
        """Append a new request."""
        ...

    def requeue(self, seq: Sequence) -> None:
        """Put a preempted sequence back, before those that came after it."""
        ...

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that was admitted or has ended."""
        ...

    def candidates(self) -> Iterator[Sequence]:
        """Yield waiting sequences, best first. The one just yielded may be removed before asking for the next, which is
        how an order learns that it was admitted."""
        ...

    def best_account(self) -> Account | None:
        """Whose request ``candidates`` would yield first."""
        ...

    def lower(self, account: Account) -> None:
        """Note that an account's counter has been lowered."""
        ...

    def forget(self, account: Account) -> bool:
        """Drop an account that has nothing waiting or running, if a new one would count the same; else return False."""
        ...


class ArrivalOrder:
    """First come, first served over all tenants; preempted ones, the last preempted first, before new ones."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[RequestId, Sequence] = OrderedDict()

    def push(self, seq: Sequence) -> None:
        """Append a new request."""
        assert seq.request_id not in self._waiting
        self._waiting[seq.request_id] = seq

    def requeue(self, seq: Sequence) -> None:
        """Put a preempted sequence before all others. The newest is preempted first, so the oldest comes out first."""
        self.push(seq)
        self._waiting.move_to_end(seq.request_id, last=False)

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that was admitted or has ended."""
        del self._waiting[seq.request_id]

    def candidates(self) -> Iterator[Sequence]:
        """Yield waiting sequences, best first."""
        yield from list(self._waiting.values())

    def best_account(self) -> Account | None:
        """Whose request is next."""
        return next((seq.account for seq in self._waiting.values()), None)

    def lower(self, account: Account) -> None:
        """Counters do not matter."""

    def forget(self, account: Account) -> bool:
        """Counters do not matter."""
        return True


class TenantOrder:
    """The tenant first, by a ranking; then its requests by arrival.

    Args:
        ranking: the policy.
        max_lead: a tenant whose request cannot be admitted is passed over only by tenants that are ahead of it by no
            more than this.
    """

    def __init__(self, ranking: Ranking, max_lead: float) -> None:
        self._ranking = ranking
        self._max_lead = max_lead
        self._waiting: dict[Account, OrderedDict[RequestId, Sequence]] = {}

    def push(self, seq: Sequence) -> None:
        """Append a new request."""
        waiting = self._waiting.get(seq.account)
        if waiting is None:
            waiting = self._waiting[seq.account] = OrderedDict()
            self._ranking.enter(seq.account)
        assert seq.request_id not in waiting
        waiting[seq.request_id] = seq

    def requeue(self, seq: Sequence) -> None:
        """Put a preempted sequence before all others of its tenant."""
        self.push(seq)
        self._waiting[seq.account].move_to_end(seq.request_id, last=False)

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that was admitted or has ended."""
        waiting = self._waiting[seq.account]
        del waiting[seq.request_id]
        if not waiting:
            del self._waiting[seq.account]
            self._ranking.leave(seq.account)

    def candidates(self) -> Iterator[Sequence]:
        """Yield waiting sequences, best first."""
        least_passed_over = math.inf
        num_passed: dict[Account, int] = {}
        for account in self._ranking.ranked():
            if account.counter - least_passed_over > self._max_lead:
                continue  # not the end: the next may be less far ahead, turns do not go by counters
            waiting = self._waiting[account]
            num_waiting = len(waiting)
            for seq in islice(waiting.values(), num_passed.get(account, 0), None):
                yield seq
                if len(waiting) < num_waiting:
                    break
                num_passed[account] = num_passed.get(account, 0) + 1
            else:
                least_passed_over = min(least_passed_over, account.counter)

    def best_account(self) -> Account | None:
        """The tenant whose turn it is."""
        return self._ranking.best()

    def lower(self, account: Account) -> None:
        """Note that an account's counter has been lowered."""
        self._ranking.lower(account)

    def forget(self, account: Account) -> bool:
        """Drop an account if a new one would count the same."""
        return self._ranking.forget(account)
