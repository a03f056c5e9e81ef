"""FairQueue: the waiting requests, which of them is next, and what every tenant has been charged.

The seam of fairness: ``POLICIES`` has one small class per policy, and the scheduler sees none of them. A class of
priority comes before the next; within it, the policy decides. Whether a candidate fits is the scheduler's question.
Charges: for input, and for adapter pages copied, when a request is first admitted; for output, as it is produced (the
scheduler adds ``Sequence.output_charge`` itself); for adapter pages held, as time passes. What a preempted sequence
computes again is charged to nobody: the tenant gets nothing for it, and it was not the one who asked for it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from pomona.core.errors import RateLimitError
from pomona.core.ids import TenantId
from pomona.core.request import Priority, Request
from pomona.sched.account import Account
from pomona.sched.fairness import FairnessConfig, Policy
from pomona.sched.rankings import DeficitRoundRobin, LeastCounterFirst, VirtualTokenCounter
from pomona.sched.sequence import Sequence
from pomona.sched.waiting import ArrivalOrder, TenantOrder, WaitingOrder

_WINDOW_S = 60.0
_MIN_SWEEP = 1024

POLICIES: Final[dict[Policy, Callable[[FairnessConfig, float], WaitingOrder]]] = {
    "fcfs": lambda config, max_lead: ArrivalOrder(),
    "rpm": lambda config, max_lead: ArrivalOrder(),
    "lcf": lambda config, max_lead: TenantOrder(LeastCounterFirst(), math.inf),
    "vtc": lambda config, max_lead: TenantOrder(VirtualTokenCounter(), max_lead),
    "wvtc": lambda config, max_lead: TenantOrder(VirtualTokenCounter(), max_lead),
    "drr": lambda config, max_lead: TenantOrder(DeficitRoundRobin(config.quantum), max_lead),
}
"""Policy -> the order of one priority class."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What comes before a tenant's next request."""

    num_requests: int
    num_prompt_tokens: int
    share: float
    """Of the places that become free, those that are the tenant's; in (0, 1]."""


class FairQueue:
    """Waiting sequences of all tenants and classes.

    Args:
        config: policy and prices.
        max_lead: how far a tenant may get ahead of one that waits; used by the policies that promise it.
    """

    def __init__(self, config: FairnessConfig, max_lead: float) -> None:
        self.config = config
        self.running: dict[Account, None] = {}
        """Accounts with running sequences, in the order in which they began."""
        self._outputs = (0.0, 0.0)  # tokens and requests of those that ended, old ones counting less and less
        self.has_targets = False
        """True once a request came with a target of its own."""
        self._max_lead = max_lead if config.has_bound else math.inf
        self._orders = {priority: POLICIES[config.policy](config, self._max_lead) for priority in Priority}
        self._accounts: dict[tuple[TenantId, Priority], Account] = {}
        self._num_waiting = dict.fromkeys(Priority, 0)
        self._sweep_at = _MIN_SWEEP
        self._arrivals: dict[TenantId, deque[float]] = {}

    def __len__(self) -> int:
        return sum(self._num_waiting.values())

    @property
    def mean_output_tokens(self) -> float | None:
        """Output tokens of the requests that ended of late; None before the first."""
        num_tokens, num_requests = self._outputs
        return num_tokens / num_requests if num_requests else None

    def is_waited_for(self, priority: Priority) -> bool:
        """True if requests of this class or a more urgent one wait."""
        return any(self._num_waiting[one] for one in Priority if one <= priority)

    def account_of(self, request: Request) -> Account:
        """The account that the request will be charged to, with what its service level says."""
        key = (request.tenant_id, request.service_level.priority)
        account = self._accounts.get(key)
        if account is None:
            if len(self._accounts) >= self._sweep_at:
                self._sweep()
            account = self._accounts[key] = Account(*key)
        level = request.service_level
        account.tpot_s = level.tpot_s
        self.has_targets = self.has_targets or level.tpot_s is not None or level.ttft_s is not None
        account.weight = level.weight if self.config.is_weighted else 1.0
        return account

    def check_rate(self, request: Request) -> None:
        """Count a request, under the policy that limits their rate.

        Raises:
            RateLimitError: the tenant has sent too many.
        """
        limit = self.config.requests_per_minute
        if self.config.policy != "rpm":
            return
        arrivals = self._arrivals.setdefault(request.tenant_id, deque())
        # One that was held up on its way (by its adapter, say) counts as having come with the latest.
        arrival_s = max(request.arrival_s, arrivals[-1]) if arrivals else request.arrival_s
        while arrivals and arrival_s - arrivals[0] >= _WINDOW_S:
            arrivals.popleft()
        if len(arrivals) >= limit:
            wait_s = _WINDOW_S - (arrival_s - arrivals[0])
            raise RateLimitError(f"{limit} requests came in the last minute: the limit of the tenant", wait_s)
        arrivals.append(arrival_s)

    def push(self, seq: Sequence) -> None:
        """Append a new request."""
        seq.account = self.account_of(seq.request)
        self._orders[seq.account.priority].push(seq)
        self._count(seq, 1)

    def requeue(self, seq: Sequence) -> None:
        """Put a preempted sequence back: as the next of all, or of its tenant, as the policy has it."""
        self._orders[seq.account.priority].requeue(seq)
        self._count(seq, 1)

    def candidates(self) -> Iterator[Sequence]:
        """Yield waiting sequences, best first. The one just yielded may be admitted before asking for the next, and the
        order takes note of it."""
        for priority, order in self._orders.items():
            if self._num_waiting[priority]:
                yield from order.candidates()

    def best_accounts(self) -> list[Account]:
        """Of every class with somebody waiting, who is next; most urgent class first."""
        found = [order.best_account() for priority, order in self._orders.items() if self._num_waiting[priority]]
        return [account for account in found if account is not None]

    def remove(self, seq: Sequence) -> None:
        """Take out a sequence that will not be admitted."""
        self._orders[seq.account.priority].remove(seq)
        self._count(seq, -1)

    def admit(self, seq: Sequence, num_cached_tokens: int, num_loaded_pages: int) -> None:
        """Take out a sequence that starts to run, and charge for it what is known now."""
        account, prices = seq.account, self.config.prices
        charge = 0.0
        if not seq.was_admitted:
            num_prompt = seq.num_prompt_tokens
            charge = prices.per_page_loaded * num_loaded_pages
            charge += prices.admission(num_prompt, num_cached_tokens)
            num_predicted = self._num_predicted(seq)
            charge += prices.outputs(num_prompt, 0, num_predicted)
            seq.num_charged_tokens += num_predicted
            seq.weight = account.weight
            seq.output_charge = prices.outputs(num_prompt, num_predicted, num_predicted + 1) / account.weight
            seq.output_charge_step = 2.0 * prices.per_output_squared / account.weight
        # After the charge, so that an order that looks for another finds the counter as it is now.
        self.remove(seq)
        account.counter += charge / account.weight
        if account.num_running == 0:
            self.running[account] = None
        account.num_running += 1

    def pin(self, seq: Sequence, num_pages: int, now_s: float) -> None:
        """Note that an admitted sequence keeps its adapter's pages on the device."""
        assert seq.request.adapter_id is not None
        seq.account.settle(now_s, self.config.prices.per_page_second)
        seq.account.pin(seq.request.adapter_id, num_pages)

    def unpin(self, seq: Sequence, num_pages: int, now_s: float) -> None:
        """The counterpart of ``pin``."""
        assert seq.request.adapter_id is not None
        seq.account.settle(now_s, self.config.prices.per_page_second)
        seq.account.unpin(seq.request.adapter_id, num_pages)

    def leave(self, seq: Sequence) -> None:
        """Note that a running sequence has left the device."""
        account = seq.account
        account.num_running -= 1
        if account.num_running == 0:
            del self.running[account]

    def end(self, seq: Sequence) -> None:
        """Correct the charge for predicted output that never came. The sequence neither waits nor runs."""
        if not seq.was_admitted:
            return
        account = seq.account
        num_known = len(seq.token_ids)
        num_output = num_known - seq.num_prompt_tokens
        account.remember(num_output)
        self._outputs = (0.95 * self._outputs[0] + num_output, 0.95 * self._outputs[1] + 1.0)
        if num_known < seq.num_charged_tokens:
            num_charged = seq.num_charged_tokens - seq.num_prompt_tokens
            refund = self.config.prices.outputs(seq.num_prompt_tokens, num_output, num_charged)
            account.counter -= refund / seq.weight
            self._orders[account.priority].lower(account)

    def settle(self, now_s: float) -> None:
        """Charge every tenant for the pages it holds, up to now."""
        price = self.config.prices.per_page_second
        if price:
            for account in self.running:
                account.settle(now_s, price)

    def note_sampled(self, chosen: Iterable[Sequence]) -> None:
        """Note who gets tokens from the step that begins: pages are charged to them alone. Were pages charged for while
        a prompt is computed, two tenants could be preempted for each other before either had a token, for ever."""
        for account in self.running:
            account.is_sampled = False
        for seq in chosen:
            seq.account.is_sampled |= seq.scheduled.is_sampled

    def must_yield(self, account: Account, waiting: Account) -> bool:
        """True if running sequences of one account have to make way for a waiting one of another: they are of a lower
        class, or too far ahead."""
        if account.priority is not waiting.priority:
            return account.priority > waiting.priority
        return account.counter - waiting.counter > self._max_lead

    def gives_seat(self, account: Account, waiting: Account) -> bool:
        """True if one account has several running sequences and the other, which waits, has none."""
        return (
            self.config.has_seats
            and self.config.has_bound
            and waiting.num_running == 0
            and account.num_running > 1
            and account.priority is waiting.priority
        )

    def has_claim(self, waiting: Account) -> bool:
        """True if some running sequence may be preempted for a waiting one of this account."""
        return any(self.must_yield(account, waiting) or self.gives_seat(account, waiting) for account in self.running)

    def is_before(self, seq: Sequence, other: Sequence) -> bool:
        """True if the first of two waiting sequences has the better right, by class or by counter."""
        account, account_of_other = seq.account, other.account
        if account.priority is not account_of_other.priority:
            return account.priority < account_of_other.priority
        return self.config.has_bound and account.counter < account_of_other.counter

    def turn_key(self, seq: Sequence) -> tuple[Priority, float]:
        """The smallest comes first in a step that cannot hold all running sequences."""
        return seq.account.priority, seq.account.counter if self.config.has_bound else 0.0

    def tightest_tpot_s(self) -> float | None:
        """The smallest target for the time per output token among the tenants with running sequences."""
        return min((account.tpot_s for account in self.running if account.tpot_s is not None), default=None)

    def preemption_key(self, seq: Sequence) -> tuple[Priority, float, int]:
        """The largest goes first: of the lowest class, of the tenant most served, the latest to be admitted."""
        account = seq.account
        return account.priority, account.counter if self.config.has_bound else 0.0, seq.admission_order

    def ahead_of(self, account: Account) -> Ahead:
        """What waits before a new request of the account: all of more urgent classes and, of its own class, what its
        tenant has there, while it shares what becomes free with the other tenants; all, under policies without tenants.
        """
        has_tenants = self.config.policy not in ("fcfs", "rpm")
        num_requests = num_prompt_tokens = 0
        total_weight = account.weight
        for other in self._accounts.values():
            if other.num_waiting == 0 or other.priority > account.priority:
                continue
            if has_tenants and other.priority is account.priority and other is not account:
                total_weight += other.weight
            else:
                num_requests += other.num_waiting
                num_prompt_tokens += other.num_waiting_prompt_tokens
        return Ahead(num_requests, num_prompt_tokens, account.weight / total_weight if has_tenants else 1.0)

    def _count(self, seq: Sequence, change: int) -> None:
        # After the order has changed: an account that enters it is one that has nothing waiting.
        account = seq.account
        self._num_waiting[account.priority] += change
        account.num_waiting += change
        account.num_waiting_prompt_tokens += change * seq.num_prompt_tokens

    def _num_predicted(self, seq: Sequence) -> int:
        limit = seq.max_tokens_total - seq.num_prompt_tokens
        if self.config.prediction == "none":
            return 0
        if self.config.prediction == "max_tokens":
            return limit
        mean = seq.account.mean_output_tokens
        return 0 if mean is None else min(limit, round(mean))

    def _sweep(self) -> None:
        """Forget accounts that have nothing and whose counters say nothing."""
        idle = [
            (key, account)
            for key, account in self._accounts.items()
            if account.num_waiting == account.num_running == 0 and self._orders[account.priority].forget(account)
        ]
        for key, _ in idle:
            del self._accounts[key]
        self._sweep_at = max(_MIN_SWEEP, 2 * len(self._accounts))
