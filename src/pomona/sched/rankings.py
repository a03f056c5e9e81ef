"""Rankings: whose turn it is among the tenants that have requests waiting. One class per policy; ``FairQueue`` charges.

A ranking yields accounts, best first. If a request was taken from the account just yielded, it goes on with the best
account as things are then; if not, with the next best. So nothing is sorted, and a step in which nobody can be admitted
costs one look at the top of a heap.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from pomona.sched.account import Account


class Ranking(Protocol):
    """Accounts in order of their right to be served next."""

    def enter(self, account: Account) -> None:
        """Take in an account that has nothing waiting and is about to."""
        ...

    def leave(self, account: Account) -> None:
        """Note that an account has nothing waiting any more."""
        ...

    def lower(self, account: Account) -> None:
        """Note that an account's counter has been lowered: a prediction was too high."""
        ...

    def best(self) -> Account | None:
        """The account that ``ranked`` would yield first."""
        ...

    def ranked(self) -> Iterator[Account]:
        """Yield accounts with requests waiting, best first."""
        ...

    def forget(self, account: Account) -> bool:
        """Drop an account that has nothing waiting or running, if a new one would count the same; else return False."""
        ...


class LeastCounterFirst:
    """The least counter first (LCF in the VTC paper). Time spent idle is saved up, and spent against the others.

    Of equal counters, a tenant with nothing running comes first, then the one that has waited longest.
    """

    def __init__(self) -> None:
        # Counters rise while their keys stay: a key is a lower bound, brought up to date when it comes to the top.
        self._heap: list[tuple[float, bool, int, Account]] = []
        self._members: set[Account] = set()
        self._num_entered = 0

    def enter(self, account: Account) -> None:
        """Take in an account that has nothing waiting and is about to."""
        if account not in self._members:
            self._members.add(account)
            self._num_entered += 1
            heapq.heappush(self._heap, _entry(account, self._num_entered))

    def leave(self, account: Account) -> None:
        """Nothing to do: whoever has nothing waiting is dropped at the top of the heap."""

    def lower(self, account: Account) -> None:
        """Make the keys lower bounds again."""
        if account in self._members:
            self._heap = [_entry(member, order) for _, _, order, member in self._heap]
            heapq.heapify(self._heap)

    def best(self) -> Account | None:
        """The account that ``ranked`` would yield first."""
        heap = self._heap
        while heap:
            account = heap[0][-1]
            if account.num_waiting == 0:
                heapq.heappop(heap)
                self._members.remove(account)
            elif _is_stale(heap[0]):
                heapq.heapreplace(heap, _entry(account, heap[0][2]))
            else:
                return account
        return None

    def ranked(self) -> Iterator[Account]:
        """Yield accounts with requests waiting, best first."""
        if self.best() is None:
            return
        heap = self._heap.copy()
        while heap:
            account = heap[0][-1]
            if account.num_waiting == 0:
                heapq.heappop(heap)
            elif _is_stale(heap[0]):
                heapq.heapreplace(heap, _entry(account, heap[0][2]))
            else:
                num_waiting = account.num_waiting
                yield account
                if account.num_waiting == num_waiting:
                    heapq.heappop(heap)
                else:
                    heapq.heapreplace(heap, _entry(account, heap[0][2]))

    def forget(self, account: Account) -> bool:
        """Never: what a tenant had once counts for ever."""
        return False


def _is_stale(entry: tuple[float, bool, int, Account]) -> bool:
    counter, has_running, _, account = entry
    return account.counter != counter or (account.num_running > 0) is not has_running


def _entry(account: Account, order: int) -> tuple[float, bool, int, Account]:
    return (account.counter, account.num_running > 0, order, account)


class VirtualTokenCounter:
    """Least counter first, where a tenant that comes back is lifted to the least counter of those who wait: idle time
    earns nothing, and leaving sheds nothing (VTC: Sheng et al., OSDI 2024, algorithm 2). Charges are divided by weight
    before they come here, which makes it the weighted one."""

    def __init__(self) -> None:
        self._order = LeastCounterFirst()
        self._last_to_leave: Account | None = None

    def enter(self, account: Account) -> None:
        """Lift an account that has nothing waiting and is about to, and take it in."""
        floor = self._order.best() or self._last_to_leave
        if floor is not None:
            account.counter = max(account.counter, floor.counter)
        self._order.enter(account)

    def leave(self, account: Account) -> None:
        """Note who has nothing waiting any more."""
        self._last_to_leave = account
        self._order.leave(account)

    def lower(self, account: Account) -> None:
        """Note that an account's counter has been lowered."""
        self._order.lower(account)

    def best(self) -> Account | None:
        """The account that ``ranked`` would yield first."""
        return self._order.best()

    def ranked(self) -> Iterator[Account]:
        """Yield accounts with requests waiting, best first."""
        return self._order.ranked()

    def forget(self, account: Account) -> bool:
        """Drop an account that its next request would lift anyway."""
        floor = self._order.best() or self._last_to_leave
        return floor is not None and floor is not account and account.counter <= floor.counter


class DeficitRoundRobin:
    """Tenants take turns; in its turn a tenant is served until its credit is used up, and every turn begins with
    another quantum (Shreedhar and Varghese, SIGCOMM 1995). Outputs are charged as they come, so credit can become debt.

    The counter is debt: negative is credit. Credit is lost by leaving; debt is paid off as rounds pass.

    Args:
        quantum: service per weight and turn.
    """

    def __init__(self, quantum: float) -> None:
        self._quantum = quantum
        self._ring: deque[Account] = deque()
        # Quanta that a member of the ring has gained on average; and the value when an account left.
        self._num_rounds = 0.0
        self._left_at: dict[Account, float] = {}

    def enter(self, account: Account) -> None:
        """Take in an account that has nothing waiting and is about to."""
        paid = self._quantum * (self._num_rounds - self._left_at.pop(account, self._num_rounds))
        account.counter = max(0.0, account.counter - paid)
        if not self._ring:
            account.counter -= self._quantum  # its turn begins
        self._ring.append(account)

    def leave(self, account: Account) -> None:
        """Take out an account that has nothing waiting any more."""
        was_its_turn = self._ring[0] is account
        self._ring.remove(account)
        self._left_at[account] = self._num_rounds
        if was_its_turn and self._ring:
            self._begin_turn()  # else ``best`` would take the next for one whose turn is over

    def lower(self, account: Account) -> None:
        """Nothing to do: no order depends on counters."""

    def best(self) -> Account | None:
        """The account whose turn it is, or begins now."""
        ring = self._ring
        if not ring:
            return None
        if ring[0].counter >= 0.0:
            # Rounds in which nobody gets out of debt are passed all at once.
            num_void = math.floor(min(account.counter for account in ring) / self._quantum)
            if num_void > 0:
                for account in ring:
                    account.counter -= num_void * self._quantum
                self._num_rounds += num_void
        while ring[0].counter >= 0.0:
            ring.rotate(-1)
            self._begin_turn()
        return ring[0]

    def ranked(self) -> Iterator[Account]:
        """Yield accounts with requests waiting, best first."""
        while (account := self.best()) is not None:
            num_waiting = account.num_waiting
            yield account
            if account.num_waiting == num_waiting:
                break
        for account in list(self._ring)[1:]:
            # One that cannot be served now does not hold up the others.
            num_waiting = -1
            while account.num_waiting and account.num_waiting != num_waiting:
                num_waiting = account.num_waiting
                yield account

    def forget(self, account: Account) -> bool:
        """Drop an account whose debt is paid."""
        is_paid = account.counter <= self._quantum * (self._num_rounds - self._left_at.get(account, self._num_rounds))
        if is_paid:
            self._left_at.pop(account, None)
        return is_paid

    def _begin_turn(self) -> None:
        """Give the first of the ring its quantum."""
        self._ring[0].counter -= self._quantum
        self._num_rounds += 1 / len(self._ring)
