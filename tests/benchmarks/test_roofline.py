"""The formulas against counting by brute force: every multiply-add and every touched number of a tiny model's step."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.roofline import (
    BF16,
    Ceilings,
    Cost,
    Job,
    SequenceWork,
    attended_pairs,
    job_cost,
    job_floor_s,
    job_steps,
    lora_cost,
    op_by_op_floor_s,
    step_cost,
    step_costs,
)
from benchmarks.shapes import QWEN25_05B, SMOLLM2_135M, ModelShape

NANO = ModelShape(
    name="nano",
    architecture="Qwen2ForCausalLM",
    hidden_size=4,
    intermediate_size=6,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    vocab_size=11,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    has_qkv_bias=True,
)
NUMBER_BYTES = 2


class Tally:
    """A naive forward pass that only counts: multiply-adds, and which numbers in memory it touches."""

    def __init__(self, shape: ModelShape, ranks: list[int]) -> None:
        self.shape = shape
        self.ranks = ranks
        self.num_multiply_adds = 0
        self.touched: set[tuple[object, ...]] = set()

    def product(self, name: tuple[object, ...], fan_in: int, fan_out: int) -> None:
        for position in itertools.product(range(fan_out), range(fan_in)):
            self.num_multiply_adds += 1
            self.touched.add((*name, *position))

    def row(self, layer: int, adapter: int | None) -> None:
        """One row through the projections of a layer."""
        for target, (fan_in, fan_out) in self.shape.targets.items():
            self.product(("weight", layer, target), fan_in, fan_out)
            if target in ("q_proj", "k_proj", "v_proj"):
                self.touched |= {("bias", layer, target, index) for index in range(fan_out)}
            if adapter is not None:
                self.product(("a", adapter, layer, target), fan_in, self.ranks[adapter])
                self.product(("b", adapter, layer, target), self.ranks[adapter], fan_out)
        for norm, index in itertools.product(("before attention", "before mlp"), range(self.shape.hidden_size)):
            self.touched.add(("norm", layer, norm, index))

    def attend(self, layer: int, sequence: int, position: int) -> None:
        """One new token attends to itself and all before it."""
        heads_per_kv = self.shape.num_heads // self.shape.num_kv_heads
        for key, head, index in itertools.product(
            range(position + 1), range(self.shape.num_heads), range(self.shape.head_dim)
        ):
            self.num_multiply_adds += 2  # query times key, probability times value
            self.touched.add(("k", layer, sequence, key, head // heads_per_kv, index))
            self.touched.add(("v", layer, sequence, key, head // heads_per_kv, index))

    def step(self, sequences: list[SequenceWork]) -> None:
        embedded = 0
        for number, work in enumerate(sequences):
            first = work.num_context_tokens - work.num_new_tokens
            for position, layer in itertools.product(
                range(first, work.num_context_tokens), range(self.shape.num_layers)
            ):
                self.row(layer, work.adapter)
                self.attend(layer, number, position)
            for _, index in itertools.product(range(work.num_new_tokens), range(self.shape.hidden_size)):
                self.touched.add(("embedding row", number, embedded, index))
                embedded += 1
            if work.is_sampled:
                self.product(("lm_head",), self.shape.hidden_size, self.shape.vocab_size)
        self.touched |= {("last norm", index) for index in range(self.shape.hidden_size)}


def works() -> st.SearchStrategy[SequenceWork]:
    return st.builds(
        lambda new, before, adapter, is_sampled: SequenceWork(new, before + new, adapter, is_sampled),
        st.integers(1, 4),
        st.integers(0, 5),
        st.none() | st.integers(0, 2),
        st.booleans(),
    )


@given(st.lists(works(), min_size=1, max_size=4), st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_a_steps_cost_is_what_counting_every_multiplication_and_every_touched_number_gives(sequences, ranks):
    tally = Tally(NANO, ranks)
    tally.step(sequences)
    cost = step_cost(NANO, sequences, ranks)
    assert cost.flops == 2 * tally.num_multiply_adds
    assert cost.bytes == NUMBER_BYTES * len(tally.touched)


@given(st.integers(1, 30), st.integers(0, 30))
def test_attended_pairs_are_the_sum_over_new_tokens_of_what_each_sees(num_new, num_before):
    expected = sum(num_before + index + 1 for index in range(num_new))
    assert attended_pairs(num_new, num_before + num_new) == expected


def test_rows_without_an_adapter_add_nothing():
    sequences = [SequenceWork(1, 9), SequenceWork(3, 3)]
    assert step_costs(NANO, sequences, [7])["lora"] == Cost()


def test_sharing_an_adapter_saves_bytes_but_no_flops():
    identical = lora_cost([(32, 16)], 64, 64)
    distinct = lora_cost([(1, 16)] * 32, 64, 64)
    assert identical.flops == distinct.flops
    assert distinct.bytes == 32 * identical.bytes


def test_one_large_adapter_among_small_ones_costs_its_own_rows_only():
    def sequences(count: int) -> list[SequenceWork]:
        return [SequenceWork(1, 10, index) for index in range(count)]

    mixed = step_costs(NANO, sequences(32), [128] + [4] * 31)["lora"]
    small = step_costs(NANO, sequences(31), [4] * 31)["lora"]
    large = step_costs(NANO, sequences(1), [128])["lora"]
    assert (mixed.flops, mixed.bytes) == (small.flops + large.flops, small.bytes + large.bytes)


def test_a_step_that_samples_nothing_does_not_read_lm_head():
    costs = step_costs(NANO, [SequenceWork(4, 4, is_sampled=False)])
    assert costs["lm_head"] == Cost()


def test_known_models_have_their_published_number_of_parameters():
    assert SMOLLM2_135M.num_parameters == 134_515_008
    assert QWEN25_05B.num_parameters == 494_032_768
    assert SMOLLM2_135M.lora_parameters(16) == 4_884_480


def test_a_floor_is_the_longer_of_computing_and_moving_and_op_by_op_is_never_shorter():
    limits = Ceilings(flops_per_s=1e9, bytes_per_s=1e9)
    assert limits.floor_s(Cost(flops=2e9, bytes=1e9)) == 2.0
    assert limits.bound(Cost(flops=2e9, bytes=1e9)) == "compute"
    assert limits.bound(Cost(flops=1e9, bytes=2e9)) == "memory"
    sequences = [SequenceWork(1, 160, index) for index in range(8)]
    costs = step_costs(SMOLLM2_135M, sequences, [16] * 8)
    assert op_by_op_floor_s(costs, limits) >= limits.floor_s(step_cost(SMOLLM2_135M, sequences, [16] * 8))


def jobs() -> Iterator[Job]:
    for prompt, output, count, budget in itertools.product((1, 5, 16), (1, 2, 4), (1, 3), (4, 16, 64)):
        yield Job(prompt, output, tuple(range(count)), (2,) * count, budget)


@pytest.mark.parametrize("job", list(jobs()))
def test_a_jobs_steps_compute_each_prompt_once_sample_each_output_once_and_keep_the_budget(job):
    steps = job_steps(job)
    count = len(job.adapters)
    works = [work for step in steps for work in step]
    assert sum(work.num_new_tokens for work in works) == count * (job.num_prompt_tokens + job.num_output_tokens - 1)
    assert sum(work.is_sampled for work in works) == count * job.num_output_tokens
    assert all(sum(work.num_new_tokens for work in step) <= job.max_num_batched_tokens for step in steps)
    longest = max(work.num_context_tokens for work in works)
    assert longest == job.num_prompt_tokens + job.num_output_tokens - 1


def test_a_jobs_floor_is_at_least_that_of_its_work_all_at_once():
    limits = Ceilings(flops_per_s=1e11, bytes_per_s=1e10)
    job = Job(128, 8, (0, 1, None), (16, 16))
    assert job_floor_s(SMOLLM2_135M, job, limits) >= limits.floor_s(job_cost(SMOLLM2_135M, job, BF16))
