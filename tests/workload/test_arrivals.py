import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.core.errors import ConfigError
from pomona.workload.arrivals import AllAtOnce, Arrivals, ConstantArrivals, GammaArrivals, PoissonArrivals


def first_times(arrivals: Arrivals, num_requests: int, seed: int = 0) -> list[float]:
    return list(itertools.islice(arrivals.times(random.Random(seed)), num_requests))


def gaps_of(arrivals: Arrivals, num_requests: int = 20_000) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(first_times(arrivals, num_requests))]


def test_all_at_once_never_leaves_zero():
    assert first_times(AllAtOnce(), 5) == [0.0] * 5


def test_a_constant_rate_has_equal_gaps_and_does_not_drift():
    times = first_times(ConstantArrivals(rate_per_s=10.0), 100_001)
    assert times[:3] == [0.0, 0.1, 0.2]
    assert times[-1] == 10_000.0


@pytest.mark.parametrize("rate_per_s", [0.5, 8.0, 200.0])
def test_poisson_gaps_have_the_asked_mean_and_a_variation_of_one(rate_per_s):
    gaps = gaps_of(PoissonArrivals(rate_per_s))
    assert statistics.fmean(gaps) == pytest.approx(1 / rate_per_s, rel=0.03)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("cv", [0.2, 1.0, 2.0])
def test_gamma_gaps_have_the_asked_mean_and_variation(cv):
    gaps = gaps_of(GammaArrivals(rate_per_s=4.0, cv=cv))
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.05)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.06)


@given(
    st.sampled_from([ConstantArrivals, PoissonArrivals, GammaArrivals]),
    st.floats(0.001, 1e5),
    st.integers(0, 2**32),
)
def test_every_process_starts_at_zero_and_never_goes_back(process, rate_per_s, seed):
    times = first_times(process(rate_per_s), 50, seed)
    assert times[0] == 0.0
    assert times == sorted(times)


def test_the_seed_alone_decides_the_draws():
    arrivals = GammaArrivals(rate_per_s=3.0, cv=2.0)
    assert first_times(arrivals, 20, seed=1) == first_times(arrivals, 20, seed=1)
    assert first_times(arrivals, 20, seed=1) != first_times(arrivals, 20, seed=2)


@pytest.mark.parametrize("rate_per_s", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("process", [ConstantArrivals, PoissonArrivals, GammaArrivals])
def test_a_rate_that_is_not_positive_and_finite_is_refused_by_name(process, rate_per_s):
    with pytest.raises(ConfigError, match=r"^rate_per_s is"):
        process(rate_per_s)


@pytest.mark.parametrize("cv", [0.0, -1.0, math.nan])
def test_a_variation_that_is_not_positive_is_refused_by_name(cv):
    with pytest.raises(ConfigError, match=r"^cv is"):
        GammaArrivals(rate_per_s=1.0, cv=cv)
