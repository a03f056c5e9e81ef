"""What a step costs per sequence, counted rather than timed: calls of Python functions and objects kept alive."""

import sys
from types import FrameType

import pytest

from pomona.core.plan import StepResult
from pomona.core.request import SamplingParams
from pomona.sched.fairness import FairnessConfig
from support.engine import make_adapter, make_request, make_scheduler

NUM_SEQS = 128


def decoding_scheduler():
    """A scheduler with NUM_SEQS decoding sequences of eight adapters and of none."""
    scheduler = make_scheduler(
        num_kv_blocks=4 * NUM_SEQS,
        max_model_len=256,
        block_size=64,
        max_num_seqs=NUM_SEQS,
        max_waiting=NUM_SEQS,
        max_num_batched_tokens=8 * NUM_SEQS,
        num_adapter_pages=8,
    )
    for index in range(8):
        scheduler.adapters.register(make_adapter(f"a{index}"))
    sampling = SamplingParams(max_tokens=200, temperature=0.0, stop_token_ids=(1, 2))
    for index in range(NUM_SEQS):
        adapter = None if index % 3 == 0 else f"a{index % 8}"
        scheduler.add(make_request(f"r{index}", [index, 1, 2, 3], adapter=adapter, sampling=sampling))
    return scheduler


def turn(scheduler) -> None:
    plan = scheduler.schedule(0.0)
    result = StepResult(plan.step_id, {entry.request_id: 7 for entry in plan.seqs})
    assert len(scheduler.update(plan, result, 0.0)) == NUM_SEQS


def num_python_calls(run) -> int:
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def test_a_decode_costs_three_python_calls():
    scheduler = decoding_scheduler()
    turn(scheduler)
    # One ScheduledSeq, one append, one RequestOutput per sequence; the rest is per step.
    assert num_python_calls(lambda: turn(scheduler)) <= 3 * NUM_SEQS + 30


@pytest.mark.parametrize("policy", ["fcfs", "wvtc"])
@pytest.mark.parametrize("num_seats", [8, 64])
def test_who_waits_for_pages_costs_a_step_a_few_python_calls(policy, num_seats):
    """Thirty tenants ask for an adapter each, and there are pages for four."""
    scheduler = make_scheduler(
        num_kv_blocks=1000,
        max_num_seqs=num_seats,
        max_num_batched_tokens=256,
        max_waiting=2000,
        fairness=FairnessConfig(policy=policy),
    )
    for index in range(30):
        scheduler.adapters.register(make_adapter(f"a{index}"))

    def add(numbers):
        for number in numbers:
            name = f"a{number % 30}"
            scheduler.add(make_request(f"r{number}", 3, 50, adapter=name, tenant=name))

    def step():
        plan = scheduler.schedule(0.0)
        result = StepResult(plan.step_id, {entry.request_id: 7 for entry in plan.seqs if entry.is_sampled})
        scheduler.update(plan, result, 0.0)

    add(range(300))
    for _ in range(20):
        step()
    before = num_python_calls(step)
    add(number for number in range(300, 1500) if number % 30 >= 4)  # what may start now stays the same
    assert num_python_calls(step) - before <= 5 * 1040
    assert before <= 5 * 300 + 50 * 30
