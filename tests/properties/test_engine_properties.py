"""Scheduler and engine under any sequence of events, with tiny pools and an executor that checks every plan.

What is asserted where: plans, by ``FakeExecutor``; answers and single endings, by ``EngineHarness``; the books, by
``check_integrity`` after every event; and at the end that nothing is held and that the same events give the same plans.
"""

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pomona.core.errors import InvalidRequestError, PromptTooLongError, QueueFullError
from pomona.core.request import FinishReason, Priority, Request, SamplingParams, ServiceLevel
from pomona.sched.fairness import FairnessConfig, ServicePrices
from support.engine import EngineHarness, check_integrity, expected_output, make_request

ADAPTERS = ("x", "y", "wide")
NUM_PAGES_OF = {"x": 1, "y": 1, "wide": 2}
FEATURES_OF = {"y": ("dora",)}
MAX_MODEL_LEN = 24

CONFIGS = st.fixed_dictionaries(
    {
        "num_kv_blocks": st.integers(3, 14),
        "block_size": st.integers(1, 4),
        "max_num_batched_tokens": st.integers(1, 12),
        "max_num_seqs": st.integers(1, 4),
        "num_adapter_pages": st.integers(2, 3),
        "blocks_per_page": st.integers(0, 3),
        "max_prefill_chunk": st.none() | st.integers(1, 5),
        "max_waiting": st.integers(2, 6),
        "enable_prefix_cache": st.booleans(),
        "min_prefix_wait_tokens": st.integers(0, 4),
        "reserve_steps": st.integers(0, 2),
        "adapter_loading": st.sampled_from(["on_demand", "join", "assist"]),
        "adapter_wait_limit_s": st.sampled_from([0.0, 2.0, 1e9]),
        "max_model_len": st.just(MAX_MODEL_LEN),
        "max_step_s": st.none() | st.sampled_from([0.5, 1.5]),
        "fairness": st.builds(
            FairnessConfig,
            policy=st.sampled_from(["fcfs", "rpm", "lcf", "vtc", "wvtc", "drr"]),
            prices=st.builds(
                ServicePrices,
                per_cached_token=st.sampled_from([0.0, 0.5]),
                per_output_squared=st.sampled_from([0.0, 0.1]),
                per_page_loaded=st.sampled_from([0.0, 4.0]),
                per_page_second=st.sampled_from([0.0, 1.0]),
            ),
            prediction=st.sampled_from(["none", "mean", "max_tokens"]),
            requests_per_minute=st.just(1000),
            quantum=st.sampled_from([1.0, 20.0]),
            max_lead=st.none() | st.sampled_from([1.0, 15.0]),
            has_seats=st.booleans(),
        ),
    }
)
TENANTS = st.tuples(
    st.sampled_from("pqr"),
    st.builds(
        ServiceLevel,
        priority=st.sampled_from(Priority),
        weight=st.sampled_from([1.0, 3.0]),
        tpot_s=st.none() | st.just(0.5),
    ),
)
PREFIXES = st.sampled_from([(), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 9)])
PROMPTS = st.builds(
    lambda prefix, tail: (*prefix, *tail), PREFIXES, st.lists(st.integers(0, 2), min_size=1, max_size=8)
)


class Raised(Exception):
    """What the executor raises."""


OWNERS = st.tuples(st.sampled_from((None, *ADAPTERS)), st.sampled_from([b"", b"s"]))
"""Adapter and tenant salt."""


@st.composite
def requests(draw: st.DrawFn) -> Callable[..., Request]:
    """A request that only lacks its name; its stop token, if any, is one that it will produce."""
    prompt = draw(PROMPTS)
    adapter, salt = draw(OWNERS)
    max_tokens = draw(st.integers(1, 12))
    plain = make_request("r", prompt, max_tokens, adapter=adapter, salt=salt)
    stop = draw(st.none() | st.sampled_from(expected_output(plain, MAX_MODEL_LEN))) if draw(st.booleans()) else None
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(3, max_tokens))),
        temperature=0.0,
        stop_token_ids=() if stop is None else (stop,),
        logprobs=draw(st.none() | st.just(0)),
        prompt_logprobs=draw(st.none() | st.just(0)),
    )
    tenant, level = draw(TENANTS)

    def build(name: str, owner: tuple[str | None, bytes] = (adapter, salt)) -> Request:
        adapter, salt = owner
        return make_request(name, prompt, adapter=adapter, salt=salt, sampling=sampling, tenant=tenant, level=level)

    return build


class EngineMachine(RuleBasedStateMachine):
    """Every rule goes through ``do``, so that the same events can be played again."""

    overlap_steps = False

    @initialize(config=CONFIGS, copy_steps=st.integers(0, 4), registered=st.sets(st.sampled_from(ADAPTERS)))
    def build(self, config: dict[str, object], copy_steps: int, registered: set[str]):
        self.config = {**config, "overlap_steps": self.overlap_steps, "copy_steps": copy_steps}
        self.harness = EngineHarness(**self.config)
        self.events: list[Callable[[EngineHarness], None]] = []
        self.num_requests = 0
        self.usable: set[str] = set()
        self.claimant: object = None
        self.lent_to_claim: set[tuple[str, int]] = set()
        turn = self.harness.engine._scheduler._turn
        turn._end_claim = self.noting_the_end_of_claims(turn._end_claim)
        self.retired: list[str] = []
        for name in sorted(registered):
            self.register(name)

    def do(self, event: Callable[[EngineHarness], None]):
        self.events.append(event)
        event(self.harness)

    def new_name(self) -> str:
        self.num_requests += 1
        return f"r{self.num_requests}"

    @property
    def alive(self) -> list[str]:
        return self.harness.alive

    def refusal(self, request: Request) -> type[Exception] | None:
        config = self.harness.config
        num_prompt = len(request.prompt_token_ids)
        if num_prompt >= config.max_model_len:
            return PromptTooLongError
        num_kv_tokens = min(num_prompt + request.sampling.max_tokens, config.max_model_len) - 1
        if num_kv_tokens > config.num_kv_blocks * config.block_size:
            return PromptTooLongError
        if request.adapter_id is not None and request.adapter_id not in self.usable:
            return InvalidRequestError
        if self.harness.engine.stats().num_waiting >= config.max_waiting:
            return QueueFullError
        return None

    def try_to_add(self, request: Request):
        refusal = self.refusal(request)
        if refusal is None:
            self.do(lambda harness: harness.add(request))
        else:
            with pytest.raises(refusal):
                self.harness.engine.add(request)

    @rule(request=requests())
    def add(self, request: Callable[..., Request]):
        self.try_to_add(request(self.new_name()))

    @rule(request=requests(), owners=st.lists(OWNERS, min_size=2, max_size=3))
    def add_alike(self, request: Callable[..., Request], owners: list[tuple[str | None, bytes]]):
        """The same prompt for several adapters and tenants, together or one after the other."""
        for owner in owners:
            self.try_to_add(request(self.new_name(), owner))
            self.do(lambda harness: [harness.step()])

    @rule(seconds=st.sampled_from([0.0, 1.0]), count=st.integers(1, 4))
    def step(self, seconds: float, count: int):
        for _ in range(count):
            self.do(lambda harness: [harness.step(seconds)])

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject):
        name = data.draw(st.sampled_from(self.alive))
        self.do(lambda harness: [harness.abort(name)])
        assert self.harness.endings[name].finish_reason is FinishReason.ABORT

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort_during_step(self, data: st.DataObject):
        name = data.draw(st.sampled_from(self.alive))

        def event(harness: EngineHarness):
            harness.executor.during_step = lambda: harness.abort(name)
            harness.step()
            harness.executor.during_step = None  # a step planned ahead may have had nothing to launch

        self.do(event)
        assert self.overlap_steps or self.harness.endings[name].finish_reason is FinishReason.ABORT

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def fail_one(self, data: st.DataObject):
        name = data.draw(st.sampled_from(self.alive))

        def event(harness: EngineHarness):
            harness.executor.failing = {name: "not finite"}
            harness.step()
            harness.executor.failing = {}

        self.do(event)

    @precondition(lambda self: self.alive)
    @rule(names=st.sets(st.sampled_from(ADAPTERS), min_size=1))
    def fail_copies(self, names: set[str]):
        def event(harness: EngineHarness):
            harness.executor.failing_copies = set(names)
            harness.step()
            harness.executor.failing_copies = set()

        self.do(event)

    @precondition(lambda self: self.alive)
    @rule(is_restarted=st.booleans())
    def raise_in_step(self, is_restarted: bool):
        def event(harness: EngineHarness):
            harness.executor.raises = Raised()
            with suppress(Raised):
                while harness.alive:  # overlapped, all may end before another step is launched
                    harness.step()
                assert self.overlap_steps, "a step computes something while requests are alive"
            harness.executor.raises = None
            if is_restarted:
                harness.executor.reset()
                harness.note(harness.engine.fail_all("restarted"))
            else:
                harness.step()

        self.do(event)
        assert not self.alive

    @rule(name=st.sampled_from(ADAPTERS))
    def register(self, name: str):
        self.do(lambda harness: harness.register(name, NUM_PAGES_OF[name], FEATURES_OF.get(name, ())))
        self.usable.add(name)
        if name in self.retired:
            self.retired.remove(name)

    @precondition(lambda self: self.usable)
    @rule(data=st.data())
    def retire(self, data: st.DataObject):
        name = data.draw(st.sampled_from(sorted(self.usable)))
        self.do(lambda harness: harness.engine.retire_adapter(name))
        self.usable.remove(name)
        self.retired.append(name)

    @rule()
    def take_drained(self):
        drained = self.harness.engine.take_drained()
        for name in drained:
            self.retired.remove(name)
            assert not [r for r in self.alive if self.harness.requests[r].adapter_id == name]
            assert name not in self.harness.executor.resident_ids

    @invariant()
    def books_balance(self):
        harness = self.harness
        check_integrity(harness.engine._scheduler)
        stats = harness.engine.stats()
        assert stats.num_running + stats.num_waiting == len(self.alive)
        assert stats.num_running <= harness.config.max_num_seqs
        assert stats.num_kv_blocks_used <= stats.num_kv_blocks
        self.lent_blocks_only_come_back()

    def noting_the_end_of_claims(self, end_claim: Callable[[], None]) -> Callable[[], None]:
        """The same sequence may claim again, before anybody looks."""

        def end_and_note():
            self.claimant = None
            end_claim()

        return end_and_note

    def lent_blocks_only_come_back(self):
        """While somebody has waited too long for pages: so that the wait ends with those who run now."""
        scheduler = self.harness.engine._scheduler
        claimant = scheduler._turn._claimant
        held = {
            (seq.request_id, block_id)
            for seq in scheduler._running
            for block_id in seq.block_ids
            if scheduler._pool.page_of(block_id) is not None
        }
        if claimant is not None and claimant is self.claimant:
            assert held <= self.lent_to_claim
        self.claimant, self.lent_to_claim = claimant, held

    def teardown(self):
        if not hasattr(self, "harness"):
            return
        self.do(lambda harness: harness.run(max_steps=3000))
        self.take_drained()
        assert self.retired == [], "every retired adapter was reported once"
        again = EngineHarness(**self.config)
        for event in self.events:
            event(again)
        assert again.executor.plans == self.harness.executor.plans
        assert again.endings == self.harness.endings


class OverlappedEngineMachine(EngineMachine):
    """The same with every step planned before the result of the one before it is known. Answers must not differ."""

    overlap_steps = True

    @precondition(lambda self: self.alive)
    @rule()
    def raise_in_result(self):
        def event(harness: EngineHarness):
            harness.executor.raises_in_result = Raised()
            with pytest.raises(Raised):
                harness.step()
            harness.step()

        self.do(event)
        assert not self.alive


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestOverlappedEngine = OverlappedEngineMachine.TestCase
TestOverlappedEngine.settings = TestEngine.settings
