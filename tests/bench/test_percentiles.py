import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.bench.percentiles import Percentiles, percentile


def test_percentiles_interpolate_between_neighbours():
    summary = Percentiles.of([4.0, 1.0, 3.0, None, 2.0])
    assert summary == Percentiles(
        num_samples=4, mean=2.5, p50=2.5, p90=pytest.approx(3.7), p99=pytest.approx(3.97), max=4.0
    )


def test_percentiles_of_nothing_are_nothing():
    assert Percentiles.of([None]) is None


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=200))
def test_percentiles_agree_with_the_standard_library(samples):
    quantiles = statistics.quantiles(samples, n=100, method="inclusive")
    for k in (1, 50, 90, 99):
        assert percentile(sorted(samples), k / 100) == pytest.approx(quantiles[k - 1], rel=1e-9, abs=1e-9)
