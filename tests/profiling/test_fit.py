import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.profiling.fit import Sample, fit, fit_terms, non_negative_least_squares
from pomona.sim.cost_model import CostTerm, LinearCost
from pomona.sim.step_work import StepWork


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 8))
def test_no_other_non_negative_coefficients_are_better(seed, num_rows, num_columns):
    chance = np.random.default_rng(seed)
    matrix = chance.normal(size=(num_rows, num_columns))
    target = chance.normal(size=num_rows)
    found = non_negative_least_squares(matrix, target)
    assert (found >= 0).all()
    # The conditions of Karush, Kuhn and Tucker: nothing is gained by any step that stays non-negative.
    gradient = matrix.T @ (target - matrix @ found)
    assert (gradient <= 1e-6).all()
    assert np.abs(gradient[found > 0]).max(initial=0.0) <= 1e-6


def random_work(chance):
    num_rows = round(2 ** chance.uniform(0, 10))
    num_adapter_rows = chance.choice([0, num_rows // 2, num_rows])
    max_rank = chance.choice([4, 16, 64]) if num_adapter_rows else 0
    return StepWork(
        num_seqs=min(num_rows, chance.randrange(1, 64)),
        num_rows=num_rows,
        num_decode_rows=num_rows,
        num_sampled=num_rows,
        num_decode_kv_tokens=num_rows * chance.randrange(1, 1000),
        num_adapter_rows=num_adapter_rows,
        num_adapters=min(num_adapter_rows, chance.randrange(1, 9)),
        sum_row_ranks=num_adapter_rows * chance.randint(max_rank // 4, max_rank),
        sum_adapter_ranks=max_rank * chance.randrange(1, 5),
        max_rank=max_rank,
    )


def samples_of(cost, noise=0.0):
    chance = random.Random(1)
    works = [random_work(chance) for _ in range(120)]
    return [
        Sample(work, cost.seconds(work) * (1 + chance.uniform(-noise, noise)), index)
        for index, work in enumerate(works)
    ]


SUM_OF_RANKS = LinearCost(
    1e-3,
    (
        CostTerm("num_rows", 1e-6),
        CostTerm("num_rows", 2e-5, above=64),
        CostTerm("num_decode_kv_tokens", 1e-8),
        CostTerm("sum_row_ranks", 3e-7),
    ),
)
LARGEST_RANK = LinearCost(1e-3, (CostTerm("num_rows", 1e-5), CostTerm("padded_row_ranks", 3e-7)))


READ_BESIDE = LinearCost(1e-3, (CostTerm("num_rows", 1e-5), CostTerm("sum_adapter_ranks", 3e-5, beside_rows=16)))


@pytest.mark.parametrize(
    "cost, dense, adapters",
    [
        (SUM_OF_RANKS, "roofline, knee at 64 rows", "sum of ranks"),
        (LARGEST_RANK, None, "largest rank"),
        (READ_BESIDE, "affine", "sum of ranks, read beside up to 16 rows"),
    ],
)
def test_the_form_that_made_the_samples_is_found_again(cost, dense, adapters):
    found = fit(samples_of(cost))
    assert found.error.adapters == adapters
    assert dense in (None, found.error.dense)
    assert found.error.max < 1e-3
    work = random_work(random.Random(99))
    assert found.cost.seconds(work) == pytest.approx(cost.seconds(work), rel=1e-3)


def test_a_few_steps_that_were_disturbed_change_little():
    samples = samples_of(SUM_OF_RANKS, noise=0.02)
    disturbed = [
        Sample(sample.work, sample.seconds * (6.0 if index % 20 == 0 else 1.0), sample.point_index)
        for index, sample in enumerate(samples)
    ]
    cost = fit_terms(disturbed, SUM_OF_RANKS.terms)
    errors = [abs(cost.seconds(sample.work) / sample.seconds - 1) for sample in samples]
    assert np.median(errors) < 0.03


def test_slow_moments_that_steps_have_of_themselves_are_predicted_on_average():
    samples = [
        Sample(sample.work, sample.seconds * (1.6 if index % 5 == 0 else 1.0), sample.point_index)
        for index, sample in enumerate(samples_of(SUM_OF_RANKS, noise=0.02))
    ]
    cost = fit_terms(samples, SUM_OF_RANKS.terms)
    # 0.8 of them at 1.0, 0.2 at 1.6; of decodes of few rows as of others.
    few = [sample for sample in samples if sample.work.num_rows <= 32]
    assert np.mean([sample.seconds / cost.seconds(sample.work) for sample in few]) == pytest.approx(1.0, rel=0.05)
    assert np.mean([sample.seconds / cost.seconds(sample.work) for sample in samples]) == pytest.approx(1.0, rel=0.01)


def test_without_adapters_no_form_of_theirs_is_tried():
    cost = LinearCost(1e-3, (CostTerm("num_rows", 1e-5),))
    samples = [
        Sample(StepWork(num_rows=rows, num_seqs=1), cost.seconds(StepWork(num_rows=rows)), rows)
        for rows in range(1, 40)
    ]
    assert {error.adapters for error in fit(samples).tried} == {"none"}
