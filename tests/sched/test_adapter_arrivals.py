"""Adapters on their way to the device: who waits for them, who does not, and what happens to those who give up."""

import pytest

from pomona.core.errors import ConfigError
from pomona.core.request import FinishReason, Priority, ServiceLevel
from support.engine import EngineHarness, check_integrity, make_config, make_request


def make_harness(loading: str, **changes: object) -> EngineHarness:
    """Copies take three steps; room for everything but adapters."""
    values = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_kv_blocks": 200, "copy_steps": 3}
    harness = EngineHarness(**(values | {"adapter_loading": loading} | changes))
    for name in "xyz":
        harness.register(name)
    return harness


def add(harness: EngineHarness, name: str, adapter: str | None, max_tokens: int = 8, num_prompt: int = 3) -> None:
    first = 100 * len(harness.requests)
    harness.add(make_request(name, list(range(first, first + num_prompt)), max_tokens, adapter=adapter))


def steps_until(harness: EngineHarness, name: str) -> list[list[str]]:
    """Who computed in each step, up to the first in which the named one did."""
    seen = []
    for _ in range(100):
        harness.step()
        seen.append(sorted(harness.scheduled()))
        if name in seen[-1]:
            return seen
    raise AssertionError(f"{name} never computes")


def test_on_demand_the_step_itself_waits_for_the_copy():
    harness = make_harness("on_demand")
    add(harness, "a", "x")
    harness.step()
    assert [load.is_awaited for load in harness.plan().adapter_loads] == [True]
    assert list(harness.scheduled()) == ["a"]
    harness.run()


def test_a_request_joins_when_its_adapter_is_there_and_nobody_s_step_waits_for_it():
    harness = make_harness("join")
    add(harness, "warm", None, max_tokens=20)
    harness.step()
    add(harness, "cold", "x")
    seen = steps_until(harness, "cold")
    assert seen == [["warm"]] * 4 + [["cold", "warm"]]
    assert len(harness.tokens("warm")) == 6, "a token in every step"
    harness.run()


def test_several_requests_join_by_one_copy():
    harness = make_harness("join")
    add(harness, "a", "x")
    add(harness, "b", "x")
    steps_until(harness, "b")
    assert sorted(harness.scheduled()) == ["a", "b"]
    assert harness.engine.stats().num_adapter_loads == 1
    harness.run()


def test_with_assist_the_first_token_comes_at_once_and_the_second_with_the_adapter():
    harness = make_harness("assist")
    add(harness, "cold", "x", num_prompt=6)
    harness.step()
    assert harness.scheduled() == {"cold": 6}
    assert harness.executor.num_early_rows == 6
    assert len(harness.tokens("cold")) == 1
    seen = steps_until(harness, "cold")
    assert seen == [[], [], [], ["cold"]]
    harness.run()


def test_a_long_prompt_is_taken_over_by_the_device_in_its_middle():
    harness = make_harness("assist", max_prefill_chunk=4)
    add(harness, "cold", "x", num_prompt=30)
    harness.run()
    assert harness.executor.num_early_rows == 12, "three steps of eight"


def test_an_adapter_of_more_than_low_rank_parts_is_not_assisted():
    harness = make_harness("assist")
    harness.register("dense", 1, ("dora",))
    add(harness, "cold", "dense")
    assert len(steps_until(harness, "cold")) == 5
    assert harness.executor.num_early_rows == 0
    harness.run()


@pytest.mark.parametrize("loading", ["join", "assist"])
def test_adapters_of_requests_in_the_queue_are_copied_ahead(loading):
    harness = make_harness(loading, max_num_seqs=1, num_adapter_pages=3)
    add(harness, "base", None, max_tokens=6)
    add(harness, "a", "x", max_tokens=2)
    add(harness, "b", "y", max_tokens=2)
    harness.step()
    assert [load.adapter_id for load in harness.plan().adapter_loads] == ["x", "y"]
    steps_until(harness, "a")
    assert len(harness.tokens("base")) == 6
    steps_until(harness, "b")
    assert harness.executor.num_early_rows == 0
    harness.run()


@pytest.mark.parametrize("loading", ["join", "assist"])
def test_nothing_is_evicted_to_copy_ahead(loading):
    harness = make_harness(loading, max_num_seqs=1, num_adapter_pages=1)
    add(harness, "first", "x", max_tokens=1)
    harness.run()
    add(harness, "base", None, max_tokens=4)
    add(harness, "a", "y", max_tokens=2)
    harness.step()
    assert harness.plan().adapter_loads == harness.plan().adapter_evictions == ()
    harness.run()


@pytest.mark.parametrize("loading", ["join", "assist"])
def test_an_abort_during_the_copy_leaves_the_pages_to_others(loading):
    harness = make_harness(loading, num_adapter_pages=1)
    add(harness, "gone", "x")
    harness.step()
    assert harness.engine.stats().num_pinned_adapters == 1
    harness.abort("gone")
    assert harness.engine.stats().num_pinned_adapters == 0
    add(harness, "next", "y")
    harness.step()
    assert harness.plan().adapter_evictions == ("x",)
    harness.run()
    assert harness.endings["next"].finish_reason is FinishReason.LENGTH
    check_integrity(harness.engine._scheduler)


@pytest.mark.parametrize("loading", ["join", "assist"])
def test_a_load_that_was_given_up_before_the_executor_heard_of_it_is_never_told(loading):
    harness = make_harness(loading, overlap_steps=True, num_adapter_pages=1)
    slots = harness.engine._scheduler.adapters
    slots.load("x", is_awaited=False)
    slots.load("y", is_awaited=False)
    assert slots.take_evictions() == ()
    assert [load.adapter_id for load in slots.take_loads()] == ["y"]


@pytest.mark.parametrize("loading", ["join", "assist"])
def test_a_failure_during_the_copy_ends_every_request_and_the_adapter_is_copied_anew(loading):
    harness = make_harness(loading)
    add(harness, "a", "x")
    harness.step()
    harness.executor.reset()
    harness.note(harness.engine.fail_all("restarted"))
    add(harness, "b", "x")
    harness.run()
    assert harness.endings["b"].finish_reason is FinishReason.LENGTH
    assert harness.engine.stats().num_adapter_loads == 2


def test_a_copy_that_was_evicted_and_begun_again_is_not_taken_for_the_first():
    harness = make_harness("join", num_adapter_pages=1)
    add(harness, "a", "x")
    harness.step()
    slots = harness.engine._scheduler.adapters
    harness.abort("a")
    add(harness, "b", "y")
    add(harness, "c", "x")
    harness.step()
    harness.abort("b")
    harness.step()
    (load,) = harness.plan().adapter_loads
    assert load.adapter_id == "x"
    slots.settle_loads((), frozenset({load.load_id}))
    assert slots.is_loading("x")
    harness.run()


WAYS_TO_JOIN = pytest.mark.parametrize("loading, features", [("join", ()), ("assist", ("dora",))])


def flood(harness: EngineHarness, count: int, level: ServiceLevel | None = None) -> None:
    """Requests of the base model, so that so many of them are alive."""
    for _ in range(count - sum(name.startswith("flood") for name in harness.alive)):
        number = len(harness.requests)
        harness.add(make_request(f"flood{number}", [number % 9] * 4, 8, level=level))


@WAYS_TO_JOIN
def test_one_that_waits_for_a_place_with_its_adapter_there_gives_the_pages_to_a_claimant(loading, features):
    harness = make_harness(loading, max_num_seqs=2, num_adapter_pages=1, adapter_wait_limit_s=1.0, max_waiting=100)
    harness.register("dense", 1, features)
    harness.add(make_request("late", 4, 4, adapter="dense", level=ServiceLevel(priority=Priority.BATCH)))
    harness.step(0.1)
    for _ in range(20):
        flood(harness, 4)
        harness.step(0.1)
    assert harness.engine.stats().num_pinned_adapters == 1
    add(harness, "claims", "y")
    for _ in range(40):
        flood(harness, 4)
        harness.step(0.1)
    assert harness.endings["claims"].finish_reason is FinishReason.LENGTH
    assert harness.tokens("late") == []
    harness.run()


@WAYS_TO_JOIN
def test_one_of_a_lower_class_gives_them_to_a_higher_one_at_once(loading, features):
    harness = make_harness(loading, max_num_seqs=2, num_adapter_pages=1, adapter_wait_limit_s=1e9, copy_steps=1)
    harness.register("dense", 1, features)
    for name in ("base1", "base2"):
        add(harness, name, None, max_tokens=6)
    harness.step()
    harness.add(make_request("late", 4, 4, adapter="dense", level=ServiceLevel(priority=Priority.BATCH)))
    harness.abort("base2")
    for _ in range(2):
        harness.step()
        flood(harness, 2)
    assert harness.engine.stats().num_pinned_adapters == 1
    level = ServiceLevel(priority=Priority.INTERACTIVE)
    harness.add(make_request("urgent", [9] * 4, 4, adapter="y", level=level))
    harness.step()
    assert [load.adapter_id for load in harness.plan().adapter_loads] == ["y"]
    harness.run()


def test_a_claimant_waits_for_a_copy_so_that_none_is_begun_in_vain():
    harness = make_harness("join", num_adapter_pages=1, adapter_wait_limit_s=0.0)
    for name in "xyz":
        add(harness, name, name, max_tokens=2)
    harness.run()
    assert harness.engine.stats().num_adapter_loads == 3


@WAYS_TO_JOIN
def test_nobody_makes_way_for_a_request_before_its_adapter_is_there(loading, features):
    harness = make_harness(loading, max_num_seqs=2, copy_steps=20)
    harness.register("dense", 1, features)
    for name in ("a1", "a2"):
        harness.add(make_request(name, [ord(name[1])] * 10, 40, tenant="a"))
    harness.step()
    harness.add(make_request("b1", 10, 4, tenant="b", adapter="dense"))
    for _ in range(20):
        harness.step()
    assert harness.engine.stats().num_preemptions == 0
    assert len(harness.tokens("a2")) == 21
    while not harness.tokens("b1"):
        harness.step()
    assert harness.engine.stats().num_preemptions == 1, "a seat"
    harness.run()


def test_the_way_of_loading_must_be_one_that_there_is():
    with pytest.raises(ConfigError, match="adapter_loading is 'later'"):
        make_config(adapter_loading="later")
