"""The engine: one step after another, adapters coming and going, and an executor that fails."""

from contextlib import suppress

import pytest

from pomona.core.errors import AdapterError, InvalidRequestError
from pomona.core.request import FinishReason, Priority, ServiceLevel
from support.engine import EngineHarness, make_adapter, make_request


class BrokenError(RuntimeError):
    """What the executor raises in these tests."""


def test_a_step_without_work_does_nothing():
    harness = EngineHarness()
    assert harness.step() == []
    assert harness.executor.plans == []
    assert not harness.engine.has_work


def test_requests_of_many_adapters_and_of_none_run_in_one_batch():
    harness = EngineHarness(max_num_seqs=8)
    for name in ("x", "y"):
        harness.register(name)
    for index, adapter in enumerate([None, "x", "y", "x"]):
        harness.add(make_request(f"r{index}", 3, adapter=adapter))
    assert len(harness.step()) == 4
    assert len({tuple(harness.tokens(f"r{index}")) for index in range(4)}) == 3
    harness.run()


def test_a_retired_adapter_finishes_its_requests_and_is_then_reported():
    harness = EngineHarness()
    harness.register("x")
    harness.add(make_request("running", 3, adapter="x"))
    harness.step()
    harness.add(make_request("waiting", 3, adapter="x"))
    harness.engine.retire_adapter("x")
    with pytest.raises(InvalidRequestError, match="unloaded"):
        harness.engine.add(make_request("late", 3, adapter="x"))
    drained = []
    while harness.engine.has_work:
        assert drained == []
        harness.step()
        drained += harness.engine.take_drained()
    assert drained == ["x"]
    harness.run()
    assert {ending.finish_reason for ending in harness.endings.values()} == {FinishReason.LENGTH}
    assert harness.executor.resident_ids == set()
    assert harness.engine.adapter_statuses() == []


def test_an_idle_resident_adapter_is_evicted_by_a_step_of_its_own():
    harness = EngineHarness()
    harness.register("x")
    harness.add(make_request("a", 3, adapter="x"))
    harness.run()
    harness.engine.retire_adapter("x")
    assert harness.engine.take_drained() == []
    assert harness.engine.has_work
    harness.step()
    assert harness.plan().adapter_evictions == ("x",)
    assert harness.engine.take_drained() == ["x"]
    assert not harness.engine.has_work


def test_an_abort_may_drain_an_adapter():
    harness = EngineHarness()
    harness.register("x")
    harness.add(make_request("a", 3, adapter="x"))
    harness.engine.retire_adapter("x")
    harness.abort("a")
    assert harness.engine.take_drained() == ["x"]


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("loading", ["on_demand", "join", "assist"])
def test_an_adapter_that_cannot_be_loaded_fails_its_own_requests_and_is_loaded_anew(loading, overlap_steps):
    harness = EngineHarness(overlap_steps=overlap_steps, adapter_loading=loading, max_num_seqs=3)
    for name in "xy":
        harness.register(name)
    for index, adapter in enumerate([None, "y", "x", "x"]):
        harness.add(make_request(f"r{index}", 3, adapter=adapter))
    harness.executor.failing_copies = {"x"}
    harness.run()
    reasons = [harness.endings[f"r{index}"].finish_reason for index in range(4)]
    assert reasons == [FinishReason.LENGTH] * 2 + [FinishReason.FAIL] * 2
    assert "adapter could not be copied" in harness.endings["r2"].outputs[-1].error
    assert harness.tokens("r2") == []
    harness.executor.failing_copies = set()
    harness.add(make_request("again", 3, adapter="x"))
    harness.run()
    assert harness.endings["again"].finish_reason is FinishReason.LENGTH
    harness.engine.retire_adapter("x")
    harness.run()
    assert harness.engine.take_drained() == ["x"]


def test_two_versions_of_an_adapter_serve_side_by_side_while_one_drains():
    harness = EngineHarness()
    harness.register("v1")
    harness.add(make_request("old", 3, adapter="v1"))
    harness.step()
    harness.register("v2")
    harness.engine.retire_adapter("v1")
    harness.add(make_request("new", 3, adapter="v2"))
    harness.step()
    assert list(harness.scheduled()) == ["old", "new"]
    harness.run()
    assert harness.engine.take_drained() == ["v1"]


def test_a_revived_adapter_keeps_serving_and_is_not_reported():
    harness = EngineHarness()
    harness.register("x")
    harness.add(make_request("a", 3, adapter="x"))
    harness.engine.retire_adapter("x")
    harness.register("x")
    harness.add(make_request("b", 3, adapter="x"))
    harness.run()
    assert harness.engine.take_drained() == []
    assert [status.is_resident for status in harness.engine.adapter_statuses()] == [True]


def test_an_adapter_too_large_for_the_device_is_refused():
    harness = EngineHarness()
    with pytest.raises(AdapterError, match="num_adapter_pages"):
        harness.engine.register_adapter(make_adapter("x", 5))
    assert harness.engine.adapter_statuses() == []


def test_when_the_executor_raises_every_request_fails_once_and_the_error_is_passed_on():
    harness = EngineHarness(max_num_seqs=1)
    harness.add(make_request("running", 3))
    harness.add(make_request("waiting", 3))
    harness.step()
    harness.executor.raises = BrokenError("secret detail")
    with pytest.raises(BrokenError):
        harness.step()
    outputs = harness.engine.fail_all("the engine stopped")
    harness.note(outputs)
    assert {output.request_id: output.finish_reason for output in outputs} == {
        "running": FinishReason.FAIL,
        "waiting": FinishReason.FAIL,
    }
    assert {output.error for output in outputs} == {"the model failed: BrokenError"}
    harness.run()


@pytest.mark.parametrize("overlap_steps", [False, True])
def test_what_a_plan_that_never_reached_the_executor_forgets_is_forgotten_with_the_next(overlap_steps, monkeypatch):
    harness = EngineHarness(overlap_steps=overlap_steps, num_adapter_pages=1)
    for name in "xy":
        harness.register(name)
    harness.add(make_request("r", adapter="x", max_tokens=8))
    harness.step()
    harness.abort("r")
    harness.add(make_request("s", adapter="y"))

    def interrupted(plan):
        harness.executor.plans.append(plan)
        harness.executor.abandon()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(harness.executor, "execute", interrupted)
        with suppress(KeyboardInterrupt):
            harness.run()
    assert (harness.executor.num_held, harness.executor.resident_ids) == (1, {"x"})
    harness.note(harness.engine.fail_all("interrupted"))
    harness.add(make_request("t"))
    harness.step()
    assert (set(harness.executor._held), harness.executor.resident_ids) == ({"t"}, set())
    harness.run()


def test_planning_that_was_interrupted_after_a_preemption_leaves_an_engine_that_goes_on(monkeypatch):
    harness = EngineHarness(max_num_seqs=1)
    harness.add(make_request("batch", max_tokens=8, level=ServiceLevel(priority=Priority.BATCH)))
    harness.step()
    harness.add(make_request("urgent", tenant="q", level=ServiceLevel(priority=Priority.INTERACTIVE)))

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(harness.engine._scheduler, "_start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            harness.step()
    assert harness.engine.stats().num_preemptions == 1
    harness.add(make_request("next"))
    harness.run()
    assert [harness.endings[name].finish_reason for name in ("batch", "urgent")] == [FinishReason.FAIL] * 2


def test_a_step_that_was_interrupted_leaves_an_engine_that_goes_on():
    harness = EngineHarness()
    harness.add(make_request("a", 3))
    harness.executor.raises = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        harness.step()
    harness.add(make_request("b", 3))
    harness.run()
    reasons = {name: ending.finish_reason for name, ending in harness.endings.items()}
    assert reasons == {"a": FinishReason.FAIL, "b": FinishReason.LENGTH}


def test_the_next_step_delivers_what_a_failed_one_ended():
    harness = EngineHarness()
    harness.add(make_request("a", 3))
    harness.executor.raises = BrokenError()
    with pytest.raises(BrokenError):
        harness.step()
    assert harness.engine.has_work
    harness.add(make_request("b", 3))
    assert {output.request_id for output in harness.step()} == {"a", "b"}
    harness.run()


def test_what_was_not_delivered_survives_another_failure():
    harness = EngineHarness()
    for name in ("a", "b"):
        harness.add(make_request(name, 3))
        harness.executor.raises = BrokenError()
        with pytest.raises(BrokenError):
            harness.step()
    assert [output.request_id for output in harness.engine.fail_all("stopped")] == ["a", "b"]


def test_after_a_failure_nothing_the_executor_held_is_relied_on():
    harness = EngineHarness()
    harness.register("x")
    harness.add(make_request("a", 10, adapter="x"))
    harness.run()
    harness.add(make_request("b", 10, adapter="x"))
    harness.executor.raises = BrokenError()
    with pytest.raises(BrokenError):
        harness.step()
    harness.executor.reset()
    harness.note(harness.engine.fail_all("restarted"))
    harness.add(make_request("c", 10, adapter="x"))
    harness.run()
    assert harness.endings["c"].outputs[-1].num_cached_tokens == 0
    assert harness.endings["c"].finish_reason is FinishReason.LENGTH


def test_failing_an_idle_engine_ends_nothing():
    harness = EngineHarness()
    assert harness.engine.fail_all("restarted") == []
    assert not harness.engine.has_work


def test_a_request_aborted_in_the_step_that_raises_ends_once():
    harness = EngineHarness()
    harness.add(make_request("a", 3))
    harness.executor.during_step = lambda: harness.abort("a")
    harness.executor.raises = BrokenError()
    with pytest.raises(BrokenError):
        harness.step()
    assert harness.engine.fail_all("stopped") == []
    assert harness.endings["a"].finish_reason is FinishReason.ABORT
