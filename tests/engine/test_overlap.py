"""Overlapped steps: what is planned before a result is known, what is computed in vain, and when the engine waits."""

import pytest

from pomona.core.request import FinishReason, SamplingParams
from pomona.sched.fairness import FairnessConfig, ServicePrices
from support.engine import EngineHarness, expected_output, make_request


def make_overlapped(**changes: object) -> EngineHarness:
    return EngineHarness(overlap_steps=True, **changes)


def num_rows(harness: EngineHarness) -> int:
    return sum(plan.num_scheduled_tokens for plan in harness.executor.plans)


def test_every_step_but_the_first_is_launched_while_another_is_under_way():
    harness = make_overlapped()
    harness.add(make_request("a", 3, max_tokens=6))
    harness.run()
    steps = [plan for plan in harness.executor.plans if plan.seqs]
    assert len(steps) == 6
    assert harness.executor.num_overlapped == 5


def test_without_overlap_no_step_is_under_way_when_the_next_one_is_planned():
    harness = EngineHarness()
    harness.add(make_request("a", 3, max_tokens=6))
    harness.run()
    assert harness.executor.num_overlapped == 0


def test_the_first_step_gives_its_tokens_at_once_and_leaves_the_next_one_under_way():
    harness = make_overlapped()
    harness.add(make_request("a", 3, max_tokens=6))
    (output,) = harness.step()
    assert len(output.new_token_ids) == 1
    assert len(harness.executor.under_way) == 1
    assert harness.engine.has_work


def test_a_length_limit_is_known_in_advance_so_no_row_is_computed_in_vain():
    harness = make_overlapped()
    harness.add(make_request("a", 3, max_tokens=5))
    harness.add(make_request("b", 60, max_tokens=64))  # ends at the context's end
    harness.run()
    assert num_rows(harness) == (3 + 5 - 1) + 63


def test_a_sequence_that_stopped_has_one_row_in_vain_which_is_ignored():
    plain = make_request("a", 3, max_tokens=8)
    tokens = expected_output(plain)
    sampling = SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=(tokens[3],))
    harness = make_overlapped()
    harness.add(make_request("a", 3, sampling=sampling))
    harness.run()
    assert harness.tokens("a") == tokens[:4]
    assert num_rows(harness) == 3 + 3 + 1


def test_its_blocks_serve_another_sequence_only_after_the_row_in_vain():
    tokens = expected_output(make_request("a", 4, max_tokens=8))
    sampling = SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=(tokens[1],))
    harness = make_overlapped(num_kv_blocks=3, max_model_len=12)
    harness.add(make_request("a", 4, sampling=sampling))
    harness.add(make_request("b", (7, 8, 9) * 3, max_tokens=3))  # needs all blocks
    harness.run()  # every answer is checked
    steps = [[str(entry.request_id) for entry in plan.seqs] for plan in harness.executor.plans]
    assert steps[:4] == [["a"], ["a"], ["a"], ["b"]]


def test_an_adapter_retired_with_its_last_request_is_not_reported_before_the_row_in_vain():
    tokens = expected_output(make_request("a", 3, max_tokens=8, adapter="x"))
    sampling = SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=(tokens[2],))
    harness = make_overlapped()
    harness.register("x")
    harness.add(make_request("a", 3, adapter="x", sampling=sampling))
    while not harness.endings["a"].finish_reason:
        harness.step()
    harness.engine.retire_adapter("x")
    assert harness.engine.take_drained() == []
    harness.run()
    assert harness.engine.take_drained() == ["x"]


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_the_engine_waits_for_tokens_that_the_next_step_s_sampling_has_to_know(penalty):
    harness = make_overlapped()
    harness.add(make_request("a", 3, sampling=SamplingParams(max_tokens=5, temperature=0.0, **{penalty: 1.5})))
    harness.add(make_request("b", 3, max_tokens=8))
    harness.run()
    with_penalty = [plan for plan in harness.executor.plans if any(e.request_id == "a" for e in plan.seqs)]
    assert len(with_penalty) == 5
    assert harness.executor.num_overlapped == 2, "only what comes after it overlaps"


def test_the_engine_waits_rather_than_preempt_while_a_result_is_outstanding():
    harness = make_overlapped(num_kv_blocks=4, max_model_len=16)
    stop = expected_output(make_request("a", 4, max_tokens=6), 16)[4]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=(stop,))
    harness.add(make_request("a", 4, sampling=sampling))
    harness.add(make_request("b", (9, 9, 9, 9), max_tokens=12))
    harness.run()
    assert harness.tokens("b") == expected_output(harness.requests["b"], 16)
    assert harness.engine.stats().num_preemptions == 0, "blocks of the one that stopped are enough"


def test_memory_that_is_short_for_good_ends_in_preemption_all_the_same():
    harness = make_overlapped(num_kv_blocks=5, max_model_len=20)
    harness.add(make_request("a", 4, max_tokens=14))
    harness.add(make_request("b", (9, 9, 9, 9), max_tokens=14))
    harness.run()
    assert harness.engine.stats().num_preemptions > 0


def test_a_charge_for_pages_that_makes_a_claim_is_seen_before_a_step_is_planned_ahead():
    prices = ServicePrices(per_page_second=1.0)
    fairness = FairnessConfig(policy="vtc", max_lead=20.0, has_seats=False, prices=prices)
    harness = make_overlapped(
        num_kv_blocks=11, max_model_len=24, num_adapter_pages=2, enable_prefix_cache=False, fairness=fairness
    )
    harness.register("x", 2)
    for name, token_id in (("a1", 1), ("a2", 5)):
        harness.add(make_request(name, [token_id] * 3, 15, tenant="a", adapter="x"))
    for index in range(60):
        harness.step(1.0)
        if index % 4 == 0 and index < 20:
            harness.add(make_request(f"b{index}", [7] * 7, 4, tenant="b"))
    harness.run()


def test_an_aborted_request_s_name_may_be_used_again_while_its_step_is_under_way():
    harness = make_overlapped()
    harness.add(make_request("a", 3, max_tokens=8))
    harness.step()
    assert harness.executor.under_way
    ending = harness.abort("a")
    assert ending is not None
    assert ending.finish_reason is FinishReason.ABORT
    harness.add(make_request("a", (5, 6, 7), max_tokens=4))
    harness.run()
    assert harness.tokens("a") == expected_output(harness.requests["a"])


def test_a_step_under_way_when_everything_failed_is_forgotten():
    harness = make_overlapped()
    harness.add(make_request("a", 3, max_tokens=8))
    harness.step()
    harness.executor.reset()
    harness.note(harness.engine.fail_all("restarted"))
    harness.add(make_request("b", 3, max_tokens=4))
    harness.run()
    assert harness.tokens("b") == expected_output(harness.requests["b"])
