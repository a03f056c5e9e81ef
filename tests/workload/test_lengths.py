import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.core.errors import ConfigError
from pomona.workload.lengths import FixedLength, Lengths, LognormalLength, UniformLength


def draws(lengths: Lengths, num_draws: int = 20_000, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [lengths.draw(rng) for _ in range(num_draws)]


def test_a_fixed_length_is_always_the_same():
    assert set(draws(FixedLength(7), 100)) == {7}


def test_uniform_lengths_reach_both_bounds_and_every_value_between():
    assert set(draws(UniformLength(3, 9), 2000)) == set(range(3, 10))


def test_lognormal_lengths_have_the_asked_median_and_spread():
    lengths = draws(LognormalLength(median_tokens=200.0, sigma=0.5, max_tokens=100_000))
    assert statistics.median(lengths) == pytest.approx(200, rel=0.03)
    tenth, *_, ninetieth = statistics.quantiles(lengths, n=10)
    # The 90th percentile of a normal lies 1.2816 standard deviations above its median.
    assert ninetieth / tenth == pytest.approx(2.71828 ** (2 * 1.2816 * 0.5), rel=0.05)


def test_a_lognormal_without_spread_is_its_shifted_median():
    assert set(draws(LognormalLength(median_tokens=18.0, sigma=0.0, max_tokens=100, shift_tokens=-1), 10)) == {17}


@given(st.integers(1, 50), st.integers(0, 200), st.floats(0.1, 1e4), st.floats(0.0, 3.0), st.integers(-20, 20))
def test_lognormal_lengths_stay_within_their_bounds(min_tokens, extra, median_tokens, sigma, shift_tokens):
    lengths = LognormalLength(median_tokens, sigma, min_tokens + extra, min_tokens, shift_tokens)
    assert all(min_tokens <= length <= min_tokens + extra for length in draws(lengths, 30))


@pytest.mark.parametrize(
    "build, field",
    [
        (lambda: FixedLength(0), "num_tokens"),
        (lambda: FixedLength(1.5), "num_tokens"),  # type: ignore[arg-type]
        (lambda: UniformLength(0, 4), "min_tokens"),
        (lambda: UniformLength(5, 4), "max_tokens"),
        (lambda: LognormalLength(0.0, 1.0, 10), "median_tokens"),
        (lambda: LognormalLength(10.0, -1.0, 10), "sigma"),
        (lambda: LognormalLength(10.0, float("nan"), 10), "sigma"),
        (lambda: LognormalLength(10.0, 1.0, 10, min_tokens=11), "max_tokens"),
    ],
)
def test_impossible_lengths_are_refused_by_name(build, field):
    with pytest.raises(ConfigError, match=f"^{field} is"):
        build()
