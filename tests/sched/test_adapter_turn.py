"""More adapters than pages: who runs, who waits, and for how long at most."""

import itertools

import pytest

from pomona.core.request import FinishReason, Priority, ServiceLevel
from support.engine import EngineHarness, make_request


def make_harness(*adapters: str, **changes: object) -> EngineHarness:
    """One adapter page per name by default, and room for everything else."""
    harness = EngineHarness(**({"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_kv_blocks": 200} | changes))
    for name in adapters:
        harness.register(name)
    return harness


def add(harness: EngineHarness, name: str, adapter: str | None, max_tokens: int = 4) -> None:
    """A request of one block, unlike any other."""
    first = 3 * len(harness.requests)
    harness.add(make_request(name, [first, first + 1, first + 2], max_tokens, adapter=adapter))


def test_a_load_comes_with_the_plan_that_first_uses_it():
    harness = make_harness("x", num_adapter_pages=1)
    add(harness, "a", "x")
    harness.step()
    assert [load.adapter_id for load in harness.plan().adapter_loads] == ["x"]
    harness.step()
    assert harness.plan().adapter_loads == ()
    harness.run()


def test_an_idle_adapter_makes_way_in_the_same_plan():
    harness = make_harness("x", "y", num_adapter_pages=1)
    add(harness, "a", "x")
    harness.run()
    add(harness, "b", "y")
    harness.step()
    assert harness.plan().adapter_evictions == ("x",)
    assert [load.adapter_id for load in harness.plan().adapter_loads] == ["y"]
    harness.run()


def test_lack_of_pages_holds_up_neither_base_nor_resident_adapters():
    harness = make_harness("x", "y", num_adapter_pages=1, adapter_wait_limit_s=60.0)
    add(harness, "x1", "x")
    add(harness, "y1", "y")
    add(harness, "base", None)
    add(harness, "x2", "x")
    harness.step()
    assert list(harness.scheduled()) == ["base", "x1", "x2"]
    harness.run()


def test_without_a_limit_a_stream_of_one_adapter_would_starve_another():
    harness = make_harness("x", "y", num_adapter_pages=1, adapter_wait_limit_s=1e9)
    add(harness, "x0", "x")
    harness.step()
    add(harness, "y0", "y")
    for index in range(1, 20):
        add(harness, f"x{index}", "x")
        harness.step(1.0)
    assert harness.tokens("y0") == []
    assert len(harness.tokens("x10")) == 4
    harness.run()


def test_after_the_limit_the_waiting_one_is_served_next():
    harness = make_harness("x", "y", num_adapter_pages=1, adapter_wait_limit_s=2.0)
    add(harness, "x0", "x")
    harness.step()
    add(harness, "y0", "y")
    first_scheduled_s = None
    for index in range(1, 30):
        add(harness, f"x{index}", "x")
        add(harness, f"base{index}", None)
        harness.step(1.0)
        assert f"base{index}" in harness.scheduled(), "base requests never wait for pages"
        if first_scheduled_s is None and "y0" in harness.scheduled():
            first_scheduled_s = harness.clock.now_s
    # Blocked at 1 s, claimant at 3 s; what then ran has 3 more tokens to go.
    assert first_scheduled_s == 6.0
    harness.run()


def test_a_limit_of_zero_serves_adapters_strictly_in_order():
    harness = make_harness("x", "y", num_adapter_pages=1, adapter_wait_limit_s=0.0)
    for index, adapter in enumerate("xyxy"):
        add(harness, f"{adapter}{index}", adapter)
    harness.run()
    started = [entry.request_id for plan in harness.executor.plans for entry in plan.seqs if entry.start]
    assert started == ["x0", "y1", "x2", "y3"]


def test_a_claimant_of_many_pages_collects_them_all():
    harness = make_harness("x", "y", num_adapter_pages=3, adapter_wait_limit_s=1.0)
    harness.register("wide", 3)
    for index, adapter in enumerate(["x", "y", "wide"]):
        add(harness, f"{adapter}{index}", adapter, max_tokens=6)
    for index in range(20):
        add(harness, f"later{index}", "xy"[index % 2], max_tokens=2)
        harness.step(1.0)
        if "wide2" in harness.scheduled():
            break
    assert harness.scheduled() == {"wide2": 3}
    assert set(harness.plan().adapter_evictions) == {"x", "y"}
    harness.run()


def test_when_the_claimant_is_aborted_the_others_go_on():
    harness = make_harness("x", "y", num_adapter_pages=1, adapter_wait_limit_s=0.0)
    add(harness, "x0", "x", max_tokens=10)
    add(harness, "y0", "y")
    add(harness, "x1", "x")
    harness.step()
    assert list(harness.scheduled()) == ["x0"]
    harness.abort("y0")
    harness.step()
    assert list(harness.scheduled()) == ["x0", "x1"]
    harness.run()


def test_a_preempted_sequence_is_not_barred_by_the_claimant():
    harness = make_harness("x", "y", num_adapter_pages=1, adapter_wait_limit_s=0.0, num_kv_blocks=6)
    for name in ("x0", "x1"):
        harness.add(make_request(name, [*range(ord(name[1]), ord(name[1]) + 8)], 9, adapter="x"))
    add(harness, "y0", "y")
    harness.step()
    while "y0" not in harness.scheduled():
        harness.step()
    assert harness.engine.stats().num_preemptions > 0
    assert harness.endings["x1"].finish_reason is FinishReason.LENGTH
    harness.run()


@pytest.mark.parametrize("num_adapters", [3, 8])
def test_every_wait_is_bounded_when_pages_are_contended(num_adapters):
    names = [f"ad{index}" for index in range(num_adapters)]
    harness = make_harness(*names, num_adapter_pages=2, adapter_wait_limit_s=1.0, max_waiting=1000)
    max_tokens = 5
    # Two popular adapters keep coming; the others are asked for once, at the start.
    for name in itertools.islice(itertools.cycle(names), 2 * num_adapters):
        add(harness, f"{name}-{len(harness.requests)}", name, max_tokens)
    for _ in range(12 * num_adapters):
        for name in names[:2]:
            add(harness, f"{name}-{len(harness.requests)}", name, max_tokens)
        harness.step(1.0)
    late = [request_id for request_id in list(harness.requests)[: 2 * num_adapters] if not harness.tokens(request_id)]
    assert late == []
    waits = [
        harness.endings[request_id].outputs[0].first_scheduled_s
        for request_id in list(harness.requests)[: 2 * num_adapters]
    ]
    # Each turn costs at most the limit and one whole answer.
    assert max(waits) <= num_adapters * (1.0 + max_tokens + 1.0)
    harness.run()


def test_only_as_many_adapters_are_closed_as_the_claimant_needs_those_done_first_first():
    harness = make_harness("x", "y", "z", num_adapter_pages=2, adapter_wait_limit_s=0.0)
    add(harness, "x0", "x", max_tokens=20)
    add(harness, "y0", "y", max_tokens=6)
    harness.step()
    add(harness, "z0", "z", max_tokens=2)
    harness.step()
    add(harness, "x1", "x", max_tokens=2)
    add(harness, "y1", "y", max_tokens=2)
    harness.step()
    assert sorted(harness.scheduled()) == ["x0", "x1", "y0"], "y ends sooner, so it takes no new users"
    while "z0" not in harness.scheduled():
        harness.step()
    assert harness.plan().adapter_evictions == ("y",)
    assert harness.tokens("y1") == []
    harness.run()


def test_a_claim_ends_when_a_higher_class_lacks_room():
    harness = EngineHarness(
        **{"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_blocks": 16, "max_waiting": 100},
        **{"num_adapter_pages": 8, "blocks_per_page": 4, "adapter_wait_limit_s": 1.0, "enable_prefix_cache": False},
    )
    harness.register("wide", 8)
    pool, level = harness.engine._scheduler._pool, ServiceLevel(priority=Priority.INTERACTIVE)

    def flood(count: int) -> None:
        for _ in range(count - sum(name.startswith("urgent") for name in harness.alive)):
            number = len(harness.requests)
            harness.add(make_request(f"urgent{number}", [number % 9] * 8, 12, level=level))

    for _ in range(10):
        flood(6)
        harness.step(0.5)
    harness.add(make_request("claims", 4, 4, adapter="wide", level=ServiceLevel(priority=Priority.BATCH)))
    while not pool.is_confined:
        flood(6)
        harness.step(0.5)
    for _ in range(100):
        flood(12)
        harness.step(0.5)
        assert len(harness.scheduled()) == 8, "as if nobody claimed anything"
    assert not pool.is_confined
    assert harness.engine.stats().num_preemptions <= 1, "the claimant itself, should it have begun"
    harness.run()
    assert len(harness.tokens("claims")) == 4


def test_a_request_of_a_higher_class_is_admitted_as_if_nobody_claimed_anything():
    harness = make_harness(
        "x",
        **{"num_kv_blocks": 16, "max_num_batched_tokens": 128, "enable_prefix_cache": False},
        **{"num_adapter_pages": 8, "blocks_per_page": 4, "adapter_wait_limit_s": 0.0},
    )
    harness.register("wide", 8)
    urgent = ServiceLevel(priority=Priority.INTERACTIVE)
    harness.add(make_request("x0", 4, 20, adapter="x", level=urgent))
    harness.add(make_request("claims", 4, 4, adapter="wide", level=ServiceLevel(priority=Priority.BATCH)))
    harness.step()
    assert harness.engine._scheduler._pool.is_confined
    for name in ("long0", "long1"):
        harness.add(make_request(name, 40, 2, level=urgent))
    harness.step()
    assert set(harness.scheduled()) == {"x0", "long0", "long1"}
    harness.run()


def test_an_idle_adapter_that_the_claimant_counts_on_is_closed_too():
    harness = make_harness("x", "y", "z", num_adapter_pages=2, adapter_wait_limit_s=0.0)
    harness.register("wide", 2)
    add(harness, "y0", "y", max_tokens=1)
    harness.run()
    add(harness, "x0", "x", max_tokens=8)
    harness.step()
    add(harness, "wide0", "wide", max_tokens=2)
    harness.step()
    for index in range(30):
        add(harness, f"y{index + 1}", "y", max_tokens=2)
        harness.step()
        if "wide0" in harness.scheduled():
            break
    assert len(harness.tokens("x0")) == 8
    assert harness.tokens("y1") == [], "nobody may take what the claimant has been promised"
    harness.run()
