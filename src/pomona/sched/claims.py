"""Claims: which running sequences make way for whom, by computing later in a step, or by being preempted.

Who waits has a claim on whoever is of a lower class, or too far ahead of it in service; and a tenant that has nothing
running has a claim to a seat: to the latest of the several requests of somebody. One that needs room to grow takes it
from the lowest class first, there from the tenant most served, there from the latest, who has least to lose.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from pomona.core.ids import AdapterId, BlockId, PageId
from pomona.sched.account import Account
from pomona.sched.config import SchedulerConfig
from pomona.sched.fair_queue import FairQueue
from pomona.sched.memory import Memory
from pomona.sched.sequence import Sequence


class Claims:
    """Decides, but changes nothing.

    Args:
        config: limits of the scheduler.
        queue: accounts of all tenants.
        memory: KV blocks and adapter pages.
    """

    def __init__(self, config: SchedulerConfig, queue: FairQueue, memory: Memory) -> None:
        self._config = config
        self._queue = queue
        self._memory = memory
        self._pool = memory.pool
        self._adapters = memory.adapters

    def split(self, running: list[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
        """Running sequences that compute before new ones are admitted, and those that compute after, in their order."""
        queue = self._queue
        waiting = queue.best_accounts()
        behind = {
            account
            for account in queue.running
            if any(queue.must_yield(account, one) or queue.gives_seat(account, one) for one in waiting)
        }
        if not behind:
            return running.copy(), []
        oldest = self._oldest(running)
        if not self._must_yield_to_any(oldest.account, waiting):
            first = [seq for seq in running if seq is oldest or seq.account not in behind]
            return first, [seq for seq in running if seq is not oldest and seq.account in behind]
        return [seq for seq in running if seq.account not in behind], [seq for seq in running if seq.account in behind]

    def has_any(self) -> bool:
        """True if somebody who is next to be admitted may make running sequences go."""
        return any(self._queue.has_claim(account) for account in self._queue.best_accounts())

    def by_turn(self, running: list[Sequence]) -> list[Sequence]:
        """Running sequences in the order of their right to be in a step that cannot hold them all: the oldest, so that
        something ends, then by class, by the tenant's service, and who was left out last time."""
        oldest = self._oldest(running)
        others = [seq for seq in running if seq is not oldest]
        return [oldest, *sorted(others, key=self._queue.turn_key)]

    def may_go_on(self, held: Iterable[Sequence]) -> list[Sequence]:
        """Those who computed later and may do so now: nobody is left waiting whom their tenant is too far ahead of."""
        queue = self._queue
        waiting = queue.best_accounts()
        stopped = {
            account
            for account in queue.running
            if any(account.priority is one.priority and queue.must_yield(account, one) for one in waiting)
        }
        return [seq for seq in held if seq.account not in stopped]

    def to_grow(self, running: list[Sequence], chosen: list[Sequence]) -> Sequence:
        """Who is preempted when a sequence needs another block: one that is not in the step yet, and the oldest only if
        there is no other, so that something always comes to an end."""
        taken = set(chosen)
        oldest = self._oldest(running)
        others = [seq for seq in running if seq not in taken and seq is not oldest]
        return max(others, key=self._queue.preemption_key) if others else oldest

    def for_room(
        self, seq: Sequence, found: list[BlockId], running: list[Sequence], chosen: list[Sequence]
    ) -> list[Sequence]:
        """Running sequences to preempt, one by one, until the waiting one has a place, and blocks beside those that it
        found. None if all of them together would not do."""
        going = list(self._that_go(self._debtors_of_blocks(seq, running, chosen), seq.account))
        return going if self._leave_room(going, seq, found, running) else []

    def for_pages(
        self, seq: Sequence, found: list[BlockId], running: list[Sequence], chosen: list[Sequence]
    ) -> list[Sequence]:
        """Running sequences to preempt so that the waiting one's adapter can be loaded; none if that cannot be had, or
        if there would not be blocks for it even after all others that make way had gone as well."""
        adapters, adapter_id = self._adapters, seq.request.adapter_id
        assert adapter_id is not None
        num_missing = adapters.num_pages_of(adapter_id) - self._memory.num_loadable_pages
        has_seat = adapters.num_pages_of(adapter_id) <= self._share(adapters.num_pages)
        debtors = self._debtors(seq, running, chosen, has_seat=has_seat)
        victims: dict[Sequence, None] = {}
        num_gone: Counter[Account] = Counter()
        for users, num_pages in self._holds(debtors):
            if num_missing <= 0:
                break
            going = [one for one in users if one not in victims]
            with_these = num_gone + Counter(one.account for one in going)
            if any(
                with_these[one.account] >= one.account.num_running
                and not self._queue.must_yield(one.account, seq.account)
                for one in going
            ):
                continue  # a tenant that only gives a seat keeps one itself
            victims.update(dict.fromkeys(going))
            num_gone = with_these
            num_missing -= num_pages
        if num_missing > 0:
            return []
        others = [one for one in self._debtors_of_blocks(seq, running, chosen) if one not in victims]
        going = [*victims, *self._that_go(others, seq.account, num_gone)]
        return list(victims) if self._leave_room(going, seq, found, running) else []

    def _leave_room(self, going: list[Sequence], seq: Sequence, found: list[BlockId], running: list[Sequence]) -> bool:
        """True if a waiting sequence has blocks beside those that it found once these running ones are gone."""
        config, memory, pool = self._config, self._memory, self._pool
        num_free = memory.num_free_blocks_beside(memory.num_pages_to_pin(seq.request.adapter_id))
        num_missing = self._num_blocks(seq) - len(found) - (num_free - pool.num_idle(found))
        num_missing += config.num_reserved_blocks(len(running) - len(going))
        if not pool.is_confined:
            unpinned = (one for one in self._adapters_held(going) if one != seq.request.adapter_id)
            num_missing -= pool.blocks_per_page * sum(map(self._adapters.num_pages_of, unpinned))
        tables = [one.block_ids for one in going]
        # The sum is cheap, and at least as much: it counts what they share several times.
        return num_missing <= sum(map(len, tables)) and num_missing <= memory.num_blocks_held(tables, found)

    def _holds(self, debtors: list[Sequence]) -> list[tuple[list[Sequence], int]]:
        """What comes back once some of the debtors go: those who hold it, and how many pages it is. An adapter, or a
        page lent to KV, that somebody goes on using is not among it."""
        adapters, pool = self._adapters, self._pool
        page_users: dict[PageId, list[Sequence]] = {}
        for debtor in debtors if adapters.num_lent_pages else ():
            for block_id in debtor.block_ids:
                if (page_id := pool.page_of(block_id)) is not None:
                    page_users.setdefault(page_id, []).append(debtor)
        adapter_users = self._adapters_held(debtors)
        return [(users, adapters.num_pages_of(adapter_id)) for adapter_id, users in adapter_users.items()] + [
            (list(dict.fromkeys(users)), 1)
            for page_id, users in page_users.items()
            if len(users) == pool.num_refs_in(page_id)
        ]

    def _adapters_held(self, debtors: list[Sequence]) -> dict[AdapterId, list[Sequence]]:
        """Adapters that nobody else uses, and which of the debtors do."""
        users: dict[AdapterId, list[Sequence]] = {}
        for debtor in debtors:
            if debtor.request.adapter_id is not None:
                users.setdefault(debtor.request.adapter_id, []).append(debtor)
        num_pins_of = self._adapters.num_pins_of
        return {adapter_id: mine for adapter_id, mine in users.items() if len(mine) == num_pins_of(adapter_id)}

    def _debtors_of_blocks(self, seq: Sequence, running: list[Sequence], chosen: list[Sequence]) -> list[Sequence]:
        """Those that make way for all the blocks of a waiting one."""
        has_seat = self._num_blocks(seq) <= self._share(self._config.num_kv_blocks)
        return self._debtors(seq, running, chosen, has_seat=has_seat)

    def _debtors(
        self, seq: Sequence, running: list[Sequence], chosen: list[Sequence], *, has_seat: bool
    ) -> list[Sequence]:
        """Running sequences that are not in the step yet and have to make way for a waiting one, first to go first."""
        queue = self._queue
        givers = {account for account in queue.running if has_seat and queue.gives_seat(account, seq.account)}
        yielding = {account for account in queue.running if queue.must_yield(account, seq.account)}
        if not givers and not yielding:
            return []
        taken = set(chosen)
        oldest = self._oldest(running)
        found = [
            one
            for one in running
            if (one.account in yielding or (one.account in givers and one is not oldest)) and one not in taken
        ]
        return sorted(found, key=queue.preemption_key, reverse=True)

    def _that_go(
        self, debtors: Iterable[Sequence], waiting: Account, num_gone_before: Counter[Account] | None = None
    ) -> Iterator[Sequence]:
        """Those of the debtors that make way if all have to: a tenant that only gives a seat keeps one itself."""
        num_gone = Counter(num_gone_before)
        for one in debtors:
            account = one.account
            if self._queue.must_yield(account, waiting) or num_gone[account] + 1 < account.num_running:
                num_gone[account] += 1
                yield one

    def _must_yield_to_any(self, account: Account, waiting: list[Account]) -> bool:
        return any(self._queue.must_yield(account, one) for one in waiting)

    def _num_blocks(self, seq: Sequence) -> int:
        """Blocks for all its known tokens."""
        return -(-len(seq.token_ids) // self._config.block_size)

    def _share(self, num_in_all: int) -> int:
        return num_in_all // (len(self._queue.running) + 1)

    @staticmethod
    def _oldest(running: list[Sequence]) -> Sequence:
        return min(running, key=lambda seq: (seq.account.priority, seq.admission_order))
