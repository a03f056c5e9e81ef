"""What the policies promise, for any arrivals: the bound on the gap between tenants who wait, and that nothing idles.

The bound is that of docs/design/0011-fairness.md: over any stretch of steps in which two tenants of one class always
have requests waiting, one gets at most ``2 * (max_lead + max(admission, step))`` more than the other, by weight. With
the default lead this is the VTC paper's 2 * max(w_p * L_input, w_q * M), plus the largest single charges.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.core.request import Priority, ServiceLevel
from pomona.sched.account import Account
from pomona.sched.fairness import FairnessConfig, ServicePrices
from pomona.sched.scheduler import Scheduler
from pomona.sched.sequence import Sequence, SequenceState
from support.engine import EngineHarness, check_integrity, make_request

MAX_PROMPT, MAX_OUTPUT = 12, 10
WEIGHTS = {"p": 1.0, "q": 2.0, "r": 1.0}


@dataclass(frozen=True)
class Burst:
    """Equal requests that come together, some steps after the burst before."""

    after_steps: int
    tenant: str
    count: int
    num_prompt: int
    max_tokens: int
    adapter: str | None
    priority: Priority = Priority.STANDARD


def bursts(adapters: st.SearchStrategy[str | None], priorities: st.SearchStrategy[Priority]) -> st.SearchStrategy:
    return st.lists(
        st.builds(
            Burst,
            after_steps=st.integers(0, 4),
            tenant=st.sampled_from("pqr"),
            count=st.integers(1, 12),
            num_prompt=st.integers(1, MAX_PROMPT),
            max_tokens=st.integers(1, MAX_OUTPUT),
            adapter=adapters,
            priority=priorities,
        ),
        min_size=2,
        max_size=12,
    )


CONFIGS = st.fixed_dictionaries(
    {
        "num_kv_blocks": st.integers(6, 30),
        "block_size": st.integers(1, 4),
        "max_num_batched_tokens": st.integers(2, 24),
        "max_num_seqs": st.integers(1, 8),
        "max_prefill_chunk": st.none() | st.integers(1, 5),
        "reserve_steps": st.integers(0, 2),
        "min_prefix_wait_tokens": st.sampled_from([0, 4]),
        "num_adapter_pages": st.integers(2, 6),
        "blocks_per_page": st.integers(0, 3),
        "adapter_wait_limit_s": st.sampled_from([0.0, 2.0, 1e9]),
        "adapter_loading": st.sampled_from(["on_demand", "join", "assist"]),
        "copy_steps": st.integers(0, 3),
    }
)
PRICES = st.builds(
    ServicePrices,
    per_input_token=st.sampled_from([1.0, 5.0]),
    per_output_token=st.sampled_from([1.0, 2.0]),
    per_page_loaded=st.sampled_from([0.0, 7.0]),
    per_page_second=st.sampled_from([0.0, 1.0]),
)


@dataclass
class Ledger:
    """What every account was charged, and, of every two that never stopped waiting since, how far that differed."""

    accounts: dict[Account, float] = field(default_factory=dict)
    gaps: dict[tuple[Account, Account], tuple[float, float]] = field(default_factory=dict)
    largest: float = 0.0

    def interrupt(self, account: Account) -> None:
        """It had nothing waiting for a moment."""
        self.gaps = {pair: gap for pair, gap in self.gaps.items() if account not in pair}

    def note(self, backlogged: list[Account]) -> None:
        for pair in itertools.permutations(backlogged, 2):
            if pair[0].priority is not pair[1].priority:
                continue
            gap = pair[0].counter - pair[1].counter
            low, high = self.gaps.get(pair, (gap, gap))
            self.gaps[pair] = (min(low, gap), max(high, gap))
            self.largest = max(self.largest, self.gaps[pair][1] - self.gaps[pair][0])


class FairRun:
    """An engine fed with bursts, one second per step."""

    def __init__(self, config: dict[str, object], fairness: FairnessConfig) -> None:
        self.harness = EngineHarness(**{**config, "max_waiting": 10_000, "fairness": fairness})
        self.scheduler = self.harness.engine._scheduler
        self.queue = self.scheduler._queue
        self.ledger = Ledger()
        self.num_requests = 0
        for order in self.queue._orders.values():
            ranking = order._ranking  # type: ignore[attr-defined]
            ranking.enter = self._recording(ranking.enter)
        for name, num_pages in (("x", 1), ("y", 1), ("wide", 2)):
            self.harness.register(name, num_pages)
        self.barred: set[Sequence] = set()
        """From adapter pages when the step was planned: the claim may have ended since."""
        self.scheduler._turn.is_barred = self._noting(self.scheduler._turn.is_barred)  # type: ignore[method-assign]

    def _noting(self, is_barred: Callable[[Sequence], bool]) -> Callable[[Sequence], bool]:
        def note(seq: Sequence) -> bool:
            if found := is_barred(seq):
                self.barred.add(seq)
            return found

        return note

    def _recording(self, enter: Callable[[Account], None]) -> Callable[[Account], None]:
        def record(account: Account) -> None:
            self.ledger.interrupt(account)
            enter(account)

        return record

    def add(self, burst: Burst) -> None:
        for _ in range(burst.count):
            self.num_requests += 1
            # Unlike any other, so that nothing is found in the prefix cache; long prompts fit the smallest pool.
            first = 1000 * self.num_requests
            limit = self.harness.config.num_kv_blocks * self.harness.config.block_size
            num_prompt = min(burst.num_prompt, limit)
            self.harness.add(
                make_request(
                    f"{burst.tenant}{self.num_requests}",
                    range(first, first + num_prompt),
                    max(1, min(burst.max_tokens, limit - num_prompt + 1)),
                    adapter=burst.adapter,
                    tenant=burst.tenant,
                    level=ServiceLevel(priority=burst.priority, weight=WEIGHTS[burst.tenant]),
                )
            )

    def step(self) -> None:
        self.harness.executor.during_step = self.check_nothing_idles
        self.barred.clear()
        self.harness.step(1.0)
        check_integrity(self.scheduler)
        self.ledger.note([account for account in self.queue._accounts.values() if account.num_waiting])

    def check_nothing_idles(self) -> None:
        scheduler, plan = self.scheduler, self.harness.plan()
        if len(self.queue) == 0:
            return
        assert plan.seqs or scheduler.adapters.num_loading, "a step computes something while somebody waits"
        seq = next(iter(self.queue.candidates()))
        adapter_id = seq.request.adapter_id
        is_resident = adapter_id is not None and scheduler.adapters.is_resident(adapter_id)
        is_barred = adapter_id is not None and not (is_resident or scheduler.adapters.can_load(adapter_id))
        is_spent = plan.num_scheduled_tokens == self.harness.config.max_num_batched_tokens
        preempted = set(plan.released) & set(scheduler._seqs)
        is_loading = is_resident and scheduler.adapters.is_loading(adapter_id)
        if not (
            is_spent or is_barred or preempted or is_loading or scheduler._turn.is_barred(seq) or seq in self.barred
        ):
            assert not scheduler._fits(seq, []), "who is next and fits is admitted"

    def play(self, events: list[Burst], after_step: Callable[[], None] = lambda: None) -> None:
        for burst in events:
            for _ in range(burst.after_steps):
                if self.harness.engine.has_work:
                    self.step()
                    after_step()
            self.add(burst)
        for _ in range(10_000):
            if not self.harness.engine.has_work:
                break
            self.step()
            after_step()
        self.harness.run()

    def bound(self) -> float:
        """``2 * (max_lead + max(admission, step))``, charges divided by the smallest weight."""
        config, fairness = self.harness.config, self.queue.config
        prices, least_weight = fairness.prices, min(WEIGHTS.values()) if fairness.is_weighted else 1.0
        admission = prices.admission(MAX_PROMPT, 0) + 2 * prices.per_page_loaded
        step = config.max_num_seqs * prices.per_output_token + config.num_adapter_pages * prices.per_page_second
        return 2 * (config.max_lead + max(admission, step) / least_weight)


def test_pages_are_not_charged_while_a_higher_class_takes_every_step():
    prices = ServicePrices(per_input_token=1.0, per_output_token=1.0, per_page_second=1.0)
    config = {"num_kv_blocks": 11, "block_size": 1, "max_num_batched_tokens": 2, "max_num_seqs": 3}
    run = FairRun({**config, "num_adapter_pages": 2}, FairnessConfig(policy="vtc", prices=prices))
    run.play(
        [
            Burst(0, "p", 1, 1, 1, None, Priority.INTERACTIVE),
            Burst(0, "p", 2, 1, 2, "wide"),
            Burst(0, "q", 1, 1, 1, None),
            Burst(1, "p", 40, 2, 5, None, Priority.INTERACTIVE),
        ]
    )
    assert run.ledger.largest <= run.bound()


def test_pages_pinned_for_a_tenant_too_far_ahead_do_not_stop_everybody():
    config = {"num_kv_blocks": 6, "block_size": 1, "max_num_batched_tokens": 2, "max_num_seqs": 1}
    loading = {"num_adapter_pages": 2, "adapter_wait_limit_s": 1e9, "adapter_loading": "join"}
    prices = ServicePrices(per_output_token=1.0)
    run = FairRun({**config, **loading}, FairnessConfig(policy="vtc", prices=prices, has_seats=False))
    run.play([Burst(0, "p", 3, 1, 2, "wide"), Burst(0, "p", 2, 1, 1, None), Burst(0, "q", 1, 1, 1, "x")])
    assert run.ledger.largest <= run.bound()


def test_a_claim_that_ends_as_the_step_is_planned_has_barred_who_was_asked_before():
    config = {"num_kv_blocks": 6, "block_size": 1, "max_num_batched_tokens": 6, "max_num_seqs": 1}
    loading = {"num_adapter_pages": 2, "adapter_wait_limit_s": 2.0, "adapter_loading": "join"}
    run = FairRun({**config, **loading}, FairnessConfig(policy="vtc", prices=ServicePrices(1.0, 1.0), has_seats=False))
    run.play(
        [
            Burst(0, "p", 5, 1, 1, None, Priority.INTERACTIVE),
            Burst(0, "p", 1, 1, 1, "y", Priority.BATCH),
            Burst(0, "q", 4, 1, 6, "y", Priority.INTERACTIVE),
            Burst(0, "p", 1, 1, 1, "x", Priority.BATCH),
            Burst(0, "p", 1, 1, 1, "wide"),
            Burst(0, "p", 3, 1, 2, "wide", Priority.INTERACTIVE),
            Burst(0, "r", 4, 6, 1, None, Priority.INTERACTIVE),
        ]
    )
    assert run.ledger.largest <= run.bound()


@given(config=CONFIGS, prices=PRICES, policy=st.sampled_from(["vtc", "wvtc"]), data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_gap_between_two_backlogged_tenants_is_bounded_for_any_arrivals(config, prices, policy, data):
    lead = data.draw(st.none() | st.sampled_from([5.0, 20.0, 60.0]))
    seats = data.draw(st.booleans())
    fairness = FairnessConfig(policy=policy, prices=prices, max_lead=lead, has_seats=seats)
    run = FairRun(config, fairness)
    run.play(data.draw(bursts(st.sampled_from([None, "x", "y", "wide"]), st.sampled_from(Priority))))
    assert run.ledger.largest <= run.bound() + 1e-6


def noting_who_gets_pages(scheduler: Scheduler) -> list[Sequence]:
    """Note for whom sequences are preempted so that its adapter can be loaded, in the step planned last."""
    noted: list[Sequence] = []
    make_pages, choose = scheduler._make_pages, scheduler._choose

    def make_and_note(seq: Sequence, chosen: list[Sequence]) -> bool:
        is_made = make_pages(seq, chosen)
        noted.extend([seq] if is_made else [])
        return is_made

    def choose_anew(now_s: float) -> list[Sequence]:
        noted.clear()
        return choose(now_s)

    scheduler._make_pages, scheduler._choose = make_and_note, choose_anew  # type: ignore[method-assign]
    return noted


@given(config=CONFIGS, policy=st.sampled_from(["vtc", "wvtc", "drr"]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_nobody_is_preempted_for_pages_in_vain_and_all_requests_end(config, policy, data):
    lead, quantum = data.draw(st.none() | st.sampled_from([5.0, 30.0])), data.draw(st.sampled_from([1.0, 1000.0]))
    run = FairRun(
        config, FairnessConfig(policy=policy, max_lead=lead, quantum=quantum, has_seats=data.draw(st.booleans()))
    )
    noted = noting_who_gets_pages(run.scheduler)

    def check():
        for seq in noted:
            assert seq.state is not SequenceState.WAITING or run.scheduler._arrivals.is_joining(seq)

    run.play(data.draw(bursts(st.sampled_from([None, "x", "y", "wide"]), st.sampled_from(Priority))), check)
