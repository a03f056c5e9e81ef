"""Who is served next under each policy, what is charged, and who makes way: on an engine, step by step."""

import math
import random

import pytest

from pomona.core.errors import ConfigError, DeadlineError, RateLimitError
from pomona.core.plan import StepPlan
from pomona.core.request import Priority, ServiceLevel
from pomona.sched.account import Account
from pomona.sched.fair_queue import FairQueue
from pomona.sched.fairness import FairnessConfig, Policy, ServicePrices
from pomona.sched.pace import Pace
from pomona.sched.sequence import Sequence
from support.engine import EngineHarness, make_request

POLICIES: list[Policy] = ["fcfs", "lcf", "vtc", "wvtc", "drr"]


def make_harness(policy: Policy = "vtc", **changes: object) -> EngineHarness:
    """One place in the batch, so that the order of admission is the order of service."""
    fairness = {"policy": policy, "has_seats": False} | {
        name: changes.pop(name) for name in list(changes) if name in FairnessConfig.__dataclass_fields__
    }
    limits = {"max_num_seqs": 1, "num_kv_blocks": 100, "max_waiting": 1000, "enable_prefix_cache": False}
    return EngineHarness(**(limits | changes), fairness=FairnessConfig(**fairness))  # type: ignore[arg-type]


def add(harness: EngineHarness, name: str, prompt: int = 2, max_tokens: int = 1, **level: object) -> None:
    """A request of the tenant that its name begins with."""
    first = 100 * len(harness.requests)
    request = make_request(
        name,
        range(first, first + prompt),
        max_tokens,
        tenant=name[0],
        level=ServiceLevel(**level),  # type: ignore[arg-type]
        arrival_s=harness.clock.now_s,
    )
    harness.add(request)


def order(harness: EngineHarness) -> list[str]:
    """Run to the end; names in order of first admission."""
    harness.run()
    started: dict[str, None] = {}
    for plan in harness.executor.plans:
        started |= {str(entry.request_id): None for entry in plan.seqs if entry.start}
    return list(started)


def account(harness: EngineHarness, tenant: str, priority: Priority = Priority.STANDARD) -> Account:
    accounts = harness.engine._scheduler._queue._accounts
    return next(one for key, one in accounts.items() if key == (tenant, priority))


def plans_of_one_tenant(policy: Policy, seed: int) -> list[StepPlan]:
    """What a random hour of one tenant's requests is turned into, adapters, preemptions and aborts included."""
    rng = random.Random(seed)
    harness = EngineHarness(
        num_kv_blocks=rng.randint(5, 16),
        max_num_batched_tokens=rng.randint(2, 16),
        max_num_seqs=rng.randint(1, 6),
        max_waiting=1000,
        min_prefix_wait_tokens=rng.choice([0, 4]),
        adapter_wait_limit_s=rng.choice([0.0, 2.0]),
        num_adapter_pages=2,
        fairness=FairnessConfig(policy=policy, requests_per_minute=1000),
    )
    for name in ("x", "y"):
        harness.register(name)
    for index in range(60):
        prompt = [rng.randint(0, 2) for _ in range(rng.randint(1, 8))]
        harness.add(make_request(f"r{index}", prompt, rng.randint(1, 8), adapter=rng.choice([None, "x", "y"])))
        if rng.random() < 0.1:
            harness.abort(rng.choice(harness.alive))
        for _ in range(rng.randint(0, 2)):
            harness.step(rng.choice([0.0, 1.0]))
    harness.run()
    return harness.executor.plans


@pytest.mark.parametrize("policy", ["rpm", "lcf", "vtc", "wvtc", "drr"])
@pytest.mark.parametrize("seed", range(8))
def test_for_one_tenant_every_policy_is_first_come_first_served(policy, seed):
    assert plans_of_one_tenant(policy, seed) == plans_of_one_tenant("fcfs", seed)


def test_first_come_first_served_serves_whoever_floods():
    harness = make_harness("fcfs")
    for name in ("a1", "a2", "a3", "b1", "b2"):
        add(harness, name)
    assert order(harness) == ["a1", "a2", "a3", "b1", "b2"]


@pytest.mark.parametrize("policy", ["lcf", "vtc", "wvtc"])
def test_counters_alternate_between_tenants(policy):
    harness = make_harness(policy)
    for name in ("a1", "a2", "a3", "b1", "b2"):
        add(harness, name)
    assert order(harness) == ["a1", "b1", "a2", "b2", "a3"]


def test_deficit_round_robin_serves_a_quantum_per_turn():
    harness = make_harness("drr", quantum=8.0)
    for name in ("a1", "a2", "a3", "a4", "b1", "b2", "b3"):
        add(harness, name)  # a charge of 2 + 2 each
    assert order(harness) == ["a1", "a2", "b1", "b2", "a3", "a4", "b3"]


def test_deficit_round_robin_passes_the_turn_on_when_a_tenant_leaves_in_the_middle_of_its_own():
    harness = make_harness("drr", quantum=1000.0)
    for name in ("x0", *(f"y{index}" for index in range(10)), "z0"):
        add(harness, name)
    for index in range(1, 30):
        harness.step()
        add(harness, f"x{index}")
        add(harness, f"z{index}")
    assert all(harness.tokens(f"y{index}") for index in range(10)), "one quantum, before x and z had two turns each"
    harness.run()


def test_with_deficit_round_robin_a_turn_s_credit_alone_preempts_nobody():
    lead = {"max_lead": 5.0, "quantum": 1000.0, "has_seats": True}
    harness = make_harness("drr", **lead, max_num_seqs=3, num_kv_blocks=18, max_prefill_chunk=1)
    for name in ("p1", "p2", "p3", "q1", "q2", "q3"):
        add(harness, name, prompt=3, max_tokens=8)
    harness.run()


def test_with_deficit_round_robin_a_tenant_too_far_ahead_does_not_hide_those_behind_it():
    queue = FairQueue(FairnessConfig(policy="drr", quantum=1.0), max_lead=5.0)
    for tenant, counter in (("p", -1.0), ("q", 10.0), ("r", 2.0)):
        seq = Sequence(make_request(tenant, tenant=tenant), 64)
        queue.push(seq)
        seq.account.counter = counter
    assert [seq.request_id for seq in queue.candidates()] == ["p", "r"]


@pytest.mark.parametrize("policy, share", [("vtc", 1.0), ("wvtc", 3.0), ("drr", 3.0)])
def test_weights_divide_service_where_they_count(policy, share):
    harness = make_harness(policy, quantum=4.0)
    for index in range(40):
        add(harness, f"a{index}", weight=3.0)
        add(harness, f"b{index}", weight=1.0)
    first = order(harness)[:40]
    num_a = sum(name.startswith("a") for name in first)
    assert num_a / (40 - num_a) == pytest.approx(share, rel=0.15)


def test_least_counter_first_saves_up_idle_time_and_the_lift_does_not():
    for policy, expected in (("lcf", ["b1", "b2", "b3", "b4"]), ("vtc", ["a6", "b1", "a7", "b2"])):
        harness = make_harness(policy)
        for index in range(1, 12):
            add(harness, f"a{index}")
        for _ in range(5):
            harness.step()
        for index in range(1, 5):
            add(harness, f"b{index}")
        assert order(harness)[5:9] == expected


@pytest.mark.parametrize("policy", ["vtc", "wvtc", "drr"])
def test_leaving_and_coming_back_sheds_nothing(policy):
    harness = make_harness(policy, quantum=4.0)
    add(harness, "a1", prompt=2, max_tokens=30)
    while harness.engine.has_work:
        harness.step()
    for name in ("b1", "a2", "b2"):
        add(harness, name)
    if policy == "drr":
        assert account(harness, "a").counter >= 0.0
    else:
        assert account(harness, "b").counter == account(harness, "a").counter > 60.0


def test_a_request_is_charged_its_whole_price_once_even_if_it_is_preempted():
    prices = ServicePrices(per_input_token=1.5, per_output_token=2.0, per_request=3.0, per_output_squared=0.25)
    harness = make_harness("vtc", prices=prices, max_num_seqs=4, num_kv_blocks=6)
    add(harness, "a1", prompt=8, max_tokens=8)
    add(harness, "a2", prompt=8, max_tokens=8)
    harness.run()
    assert harness.engine.stats().num_preemptions > 0
    assert account(harness, "a").counter == pytest.approx(2 * prices.request(8, 8))


@pytest.mark.parametrize("prediction", ["mean", "max_tokens"])
def test_predicted_output_is_charged_in_advance_and_corrected_at_the_end(prediction):
    harness = make_harness("vtc", prediction=prediction)
    add(harness, "a1", prompt=2, max_tokens=6)
    harness.run()
    before = account(harness, "a").counter
    assert before == 2 + 2 * 6
    add(harness, "a2", prompt=2, max_tokens=20)
    harness.step()
    assert account(harness, "a").counter == before + 2 + 2 * (6 if prediction == "mean" else 20)
    harness.step()
    harness.abort("a2")
    assert account(harness, "a").counter == before + 2 + 2 * 2


@pytest.mark.parametrize("weight_then", [1.0, 4.0])
def test_a_weight_that_changes_meanwhile_does_not_change_what_is_given_back(weight_then):
    harness = make_harness("wvtc", prediction="max_tokens", max_num_seqs=2)
    add(harness, "a1", max_tokens=20, weight=2.0)
    harness.step()
    counter = account(harness, "a").counter
    assert counter == (2 + 2 * 20) / 2.0
    add(harness, "a2", weight=weight_then)
    harness.abort("a1")
    assert account(harness, "a").counter == counter - 2 * 19 / 2.0, "one of twenty tokens was made"
    harness.run()


def test_cached_prompt_tokens_have_their_own_price():
    prices = ServicePrices(per_cached_token=0.25)
    harness = make_harness("vtc", prices=prices, enable_prefix_cache=True)
    for name in ("a1", "a2"):
        harness.add(make_request(name, range(9), 1, tenant="a"))
        harness.run()
    assert account(harness, "a").counter == (9 + 2) + (8 * 0.25 + 1 + 2)


def test_pages_are_charged_when_copied_and_while_held():
    prices = ServicePrices(per_page_loaded=10.0, per_page_second=1.0)
    harness = make_harness("vtc", prices=prices, max_num_seqs=4)
    harness.register("wide", 2)
    for name in ("a1", "a2"):
        harness.add(make_request(name, [ord(name[1])], 4, adapter="wide", tenant="a"))
    for _ in range(4):
        harness.step(1.0)
    # Two requests of one adapter hold its two pages once; the last step that they are in begins 3 s after the first.
    assert account(harness, "a").counter == 2 * (1 + 4 * 2) + 2 * 10.0 + 2 * 3.0
    harness.run()


def test_tenants_that_take_turns_for_the_price_of_pages_come_to_an_end():
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 4, "num_kv_blocks": 7}
    harness = make_harness("vtc", prices=ServicePrices(per_page_second=3.0), max_lead=5.0, **limits)
    for name in ("a1", "b1"):
        harness.register(name)
        prompt = range(100 * len(harness.requests), 100 * len(harness.requests) + 20)
        harness.add(make_request(name, prompt, 4, adapter=name, tenant=name[0]))
    for _ in range(100):
        harness.step(1.0)
    assert harness.alive == [], "one fits at a time, and holds its page for longer than the lead before its first token"


def test_pages_are_charged_also_if_no_step_could_be_planned_ahead():
    prices = ServicePrices(per_page_second=1.0)
    harness = make_harness("vtc", prices=prices, adapter_loading="assist", overlap_steps=True, copy_steps=3)
    harness.register("a")
    harness.add(make_request("a1", 3, 4, adapter="a", tenant="a"))
    while not harness.tokens("a1"):
        harness.step(1.0)  # its prompt is computed from the host copy; until that has been made there is nothing else
    harness.step(1.0)
    assert account(harness, "a").counter == 3 + 2 + 1.0
    harness.run()


def test_a_tenant_too_far_ahead_makes_way_without_waiting_for_its_end():
    harness = make_harness("vtc", max_lead=20.0, max_num_seqs=2)
    for name in ("a1", "a2", "a3"):
        add(harness, name, prompt=1, max_tokens=50)
    for _ in range(3):
        harness.step()
    add(harness, "b1", prompt=1, max_tokens=3)
    for _ in range(10):
        harness.step()
    assert harness.tokens("b1"), "within the lead of a few steps, not after 50"
    assert len(harness.tokens("a1")) < 20
    harness.run()


def test_a_tenant_with_nothing_running_gets_a_seat_at_once():
    harness = make_harness("vtc", has_seats=True, max_num_seqs=3)
    for index in range(6):
        add(harness, f"a{index}", prompt=1, max_tokens=50)
    harness.step()
    add(harness, "b1", prompt=1, max_tokens=5)
    harness.step()
    assert set(harness.scheduled()) == {"a0", "a1", "b1"}, "in the place of the latest of the other's"
    add(harness, "b2", prompt=1, max_tokens=5)
    harness.step()
    assert "b2" not in harness.scheduled(), "a seat, not a row of them"
    harness.run()


def test_batch_work_fills_what_is_left_and_gives_way_within_one_step():
    harness = make_harness("fcfs", max_num_seqs=2, num_kv_blocks=8)
    for name in ("a1", "a2", "a3"):
        add(harness, name, prompt=4, max_tokens=10, priority=Priority.BATCH)
    harness.step()
    assert set(harness.scheduled()) == {"a1", "a2"}
    add(harness, "b1", prompt=4, max_tokens=4)
    add(harness, "c1", prompt=4, max_tokens=4, priority=Priority.INTERACTIVE)
    harness.step()
    assert set(harness.scheduled()) == {"b1", "c1"}
    harness.run()


def test_room_to_grow_is_taken_from_the_lower_class_whoever_came_first():
    harness = make_harness("vtc", max_num_seqs=2, num_kv_blocks=7, max_model_len=28)
    add(harness, "s", prompt=4, max_tokens=20)
    harness.step()
    add(harness, "i", prompt=4, max_tokens=20, priority=Priority.INTERACTIVE)
    while harness.engine.stats().num_preemptions == 0:
        harness.step()
    num_tokens = len(harness.tokens("s"))
    assert "i" in harness.scheduled()
    while len(harness.tokens("i")) < 20:
        harness.step()
    assert len(harness.tokens("s")) == num_tokens
    assert harness.engine.stats().num_preemptions == 1
    harness.run()


def test_blocks_that_several_hold_are_room_only_once():
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_blocks": 20, "enable_prefix_cache": True}
    harness = make_harness("vtc", **limits)
    urgent, batch = ServiceLevel(priority=Priority.INTERACTIVE), ServiceLevel(priority=Priority.BATCH)
    harness.add(make_request("stays", [900] * 16, 40, level=urgent))
    for index in range(3):
        harness.add(make_request(f"batch{index}", [*range(20), 50 + index], 4, level=batch))
        harness.step()
    # Five blocks that they share and one each, with seven free and five held by an equal: the sum would be enough.
    harness.add(make_request("large", [800] * 61, 3, level=urgent))
    harness.step()
    assert harness.engine.stats().num_preemptions == 0
    assert len(harness.scheduled()) == 4
    harness.run()


def test_blocks_that_the_waiting_one_shares_itself_are_not_wanted_as_well():
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_blocks": 11, "enable_prefix_cache": True}
    harness = make_harness("vtc", **limits)
    urgent, batch = ServiceLevel(priority=Priority.INTERACTIVE), ServiceLevel(priority=Priority.BATCH)
    for name, level, max_tokens in (("stays", urgent, 6), ("batch0", batch, 3), ("batch1", batch, 3)):
        harness.add(make_request(name, [*range(32), len(harness.requests)], max_tokens, level=level))
        harness.step()
    assert harness.engine.stats().num_kv_blocks_used == 11
    harness.add(make_request("same", [*range(32), 50], 3, level=urgent))
    harness.step()
    assert set(harness.scheduled()) >= {"stays", "same"}, "in the place of one block of batch1"
    harness.run()


def test_nobody_makes_way_in_vain_for_one_that_would_leave_the_others_no_room_to_grow():
    harness = make_harness("vtc", max_num_seqs=8, num_kv_blocks=12, max_num_batched_tokens=64, reserve_steps=8)
    for name, level in (("a1", Priority.INTERACTIVE), ("a2", Priority.INTERACTIVE), ("b1", Priority.BATCH)):
        add(harness, name, prompt=4 if name != "b1" else 12, max_tokens=4, priority=level)
    harness.step()
    # Five blocks are in use. Without b1's three there would be eight for c1 and two more, where four are reserved.
    add(harness, "c1", prompt=32, max_tokens=4, priority=Priority.INTERACTIVE)
    harness.step()
    assert set(harness.scheduled()) == {"a1", "a2", "b1"}
    harness.run()
    assert harness.engine.stats().num_preemptions == 0


def test_a_request_that_would_miss_its_target_is_refused_when_it_comes():
    harness = make_harness("fcfs")
    for index in range(20):
        add(harness, f"a{index}", prompt=2, max_tokens=20, ttft_s=1e6)
    for _ in range(30):
        harness.step(1.0)
    with pytest.raises(DeadlineError, match=r"the target is 50 s") as refused:
        add(harness, "b1", ttft_s=50.0)
    # Nineteen requests of 20 steps of a second each wait or run.
    assert refused.value.retry_after_s == pytest.approx(19 * 20 - 50, rel=0.3)
    harness.clock.advance(0.0)
    harness.run()
    add(harness, "b2", ttft_s=50.0)
    harness.run()


def test_a_slow_step_does_not_make_an_idle_engine_refuse_for_ever():
    harness = make_harness("vtc")
    add(harness, "a1", ttft_s=0.5)
    harness.step()
    harness.step(3.0)  # the first step took long
    harness.run()
    add(harness, "a2", prompt=2, max_tokens=40, ttft_s=0.5)
    with pytest.raises(DeadlineError):
        add(harness, "b1", prompt=2, ttft_s=0.5)
    while harness.engine.has_work:
        harness.step(0.01)
    add(harness, "a3", prompt=2, ttft_s=0.5)
    harness.step(0.01)
    add(harness, "b2", prompt=2, ttft_s=0.5)
    harness.run()


def test_under_a_fair_policy_the_estimate_is_the_tenants_own():
    harness = make_harness("vtc")
    for index in range(20):
        add(harness, f"a{index}", prompt=2, max_tokens=20, ttft_s=1e6)
    for _ in range(30):
        harness.step(1.0)
    add(harness, "b1", max_tokens=20, ttft_s=50.0)
    with pytest.raises(DeadlineError):
        add(harness, "a99", max_tokens=20, ttft_s=50.0)
    harness.run()


def test_a_rate_limit_counts_any_minute():
    harness = make_harness("rpm", requests_per_minute=2)
    add(harness, "a1")
    harness.clock.advance(10.0)
    add(harness, "a2")
    with pytest.raises(RateLimitError) as refused:
        add(harness, "a3")
    assert refused.value.retry_after_s == 50.0
    add(harness, "b1")
    harness.clock.advance(50.0)
    add(harness, "a4")
    harness.run()


def test_a_rate_limit_counts_one_that_was_held_up_with_the_latest():
    queue = FairQueue(FairnessConfig(policy="rpm", requests_per_minute=2), math.inf)
    queue.check_rate(make_request("a1", arrival_s=50.0))
    queue.check_rate(make_request("held up", arrival_s=25.0))
    with pytest.raises(RateLimitError) as refused:
        queue.check_rate(make_request("held up too", arrival_s=20.0))
    assert refused.value.retry_after_s == 60.0, "not 90 s, as if it were 20 s now"
    with pytest.raises(RateLimitError) as refused:
        queue.check_rate(make_request("a2", arrival_s=100.0))
    assert refused.value.retry_after_s == 10.0
    for arrival_s in (110.0, 111.0):
        queue.check_rate(make_request("later", arrival_s=arrival_s))


def test_the_pace_is_learnt_and_steps_are_held_to_a_time():
    pace = Pace(max_rows=1000)
    now_s = 0.0
    for index in range(60):
        num_seqs, num_rows = (8, 8) if index % 5 else (9, 108)
        pace.observe(now_s, num_seqs, num_rows)
        now_s += 0.010 + 0.001 * num_seqs + 0.0001 * num_rows
    assert pace.seconds(8, 8) == pytest.approx(0.0188, rel=0.05)
    assert pace.seconds(1, 200) == pytest.approx(0.031, rel=0.15)
    allowance = pace.within(0.030)
    num_decodes = allowance.num_rows / (1 + allowance.rows_per_seq)
    assert num_decodes == pytest.approx((0.030 - 0.010) / 0.0011, rel=0.2)
    assert pace.within(None).num_rows == 1000
    assert pace.within(1e-6).num_rows == 1, "small steps are tried while the fixed cost is not known well"
    for index in range(400):
        num_seqs = (1, 8, 3)[index % 3]
        pace.observe(now_s, num_seqs, num_seqs)
        now_s += 0.010 + 0.0011 * num_seqs
    allowance = pace.within(1e-6)
    assert allowance.num_rows / (1 + allowance.rows_per_seq) > 3, "then most of a step is not for its fixed cost"


def test_what_a_prompt_takes_is_learnt_after_a_slow_beginning():
    pace = Pace(max_rows=1000)
    now_s = 0.0
    for index in range(600):
        num_seqs = 1 + index % 8
        num_rows = num_seqs + (200 if index % 20 == 19 else 0)
        pace.observe(now_s, num_seqs, num_rows)
        now_s += (0.005 + 0.0001 * num_seqs + 0.0001 * num_rows) * (20 if index < 12 else 1)
    assert pace.seconds(8, 208) == pytest.approx(0.0266, rel=0.1), "the first prompt was no accident"


def test_a_time_limit_takes_turns_among_running_sequences():
    harness = make_harness("vtc", max_num_seqs=8, max_step_s=0.5, max_num_batched_tokens=64)
    for index in range(8):
        add(harness, f"a{index}", prompt=1, max_tokens=30)
    for _ in range(60):
        harness.step(0.1 * max(1, len(harness.scheduled()) if harness.executor.plans else 1))
    counts = [len(harness.tokens(f"a{index}")) for index in range(8)]
    assert max(counts) - min(counts) <= 12 and min(counts) > 5
    assert len(harness.scheduled()) < 8
    harness.run()


@pytest.mark.parametrize(
    "changes", [{"quantum": 0.0}, {"quantum": 1e-18}, {"max_lead": math.inf}, {"requests_per_minute": 0}]
)
def test_settings_out_of_range_are_refused_by_name(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        FairnessConfig(**changes)
    with pytest.raises(ConfigError, match="per_request"):
        ServicePrices(per_request=-1.0)
