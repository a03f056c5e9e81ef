import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.core.errors import ConfigError
from pomona.workload.popularity import GROUP_COUNTS, BaseOnly, GroupPopularity, Popularity, ZipfPopularity

# Punica's released generator, its exact outputs.
PUNICA_TABLE = {
    8: {"distinct": (1,) * 8, "uniform": (3, 3, 2), "zipf-1.5": (3, 2, 1, 1, 1), "identical": (8,)},
    16: {"distinct": (1,) * 16, "uniform": (4, 4, 4, 4), "zipf-1.5": (5, 4, 3, 2, 1, 1), "identical": (16,)},
    32: {
        "distinct": (1,) * 32,
        "uniform": (6, 6, 5, 5, 5, 5),
        "zipf-1.5": (11, 7, 5, 3, 2, 2, 1, 1),
        "identical": (32,),
    },
    64: {
        "distinct": (1,) * 64,
        "uniform": (8,) * 8,
        "zipf-1.5": (17, 17, 11, 7, 5, 3, 2, 1, 1),
        "identical": (64,),
    },
}


def first_indices(popularity: Popularity, num_requests: int, seed: int = 0) -> list[int | None]:
    return list(itertools.islice(popularity.indices(random.Random(seed)), num_requests))


@pytest.mark.parametrize("num_rows", PUNICA_TABLE)
@pytest.mark.parametrize("kind", GROUP_COUNTS)
def test_groups_divide_exactly_as_in_punica(kind, num_rows):
    assert GROUP_COUNTS[kind](num_rows) == PUNICA_TABLE[num_rows][kind]


@given(st.sampled_from(sorted(GROUP_COUNTS)), st.integers(1, 3000))
def test_every_row_of_a_group_gets_one_adapter_and_no_adapter_is_empty(kind, num_rows):
    counts = GROUP_COUNTS[kind](num_rows)
    assert sum(counts) == num_rows
    assert min(counts) >= 1
    assert list(counts) == sorted(counts, reverse=True)


@given(st.sampled_from(sorted(GROUP_COUNTS)), st.integers(1, 80), st.integers(0, 1000))
def test_each_group_of_requests_has_the_kinds_counts_in_some_order(kind, group_size, seed):
    popularity = GroupPopularity(kind, num_adapters=group_size, group_size=group_size)
    indices = first_indices(popularity, 3 * group_size, seed)
    for start in range(0, 3 * group_size, group_size):
        group = indices[start : start + group_size]
        assert tuple(sorted(Counter(group).values(), reverse=True)) == GROUP_COUNTS[kind](group_size)


def test_adapter_zero_is_the_most_popular_of_every_group():
    indices = first_indices(GroupPopularity("zipf-1.5", num_adapters=8), 32)
    assert [count for _, count in sorted(Counter(indices).items())] == [11, 7, 5, 3, 2, 2, 1, 1]


def test_groups_are_shuffled_differently():
    indices = first_indices(GroupPopularity("zipf-1.5", num_adapters=8), 64)
    assert indices[:32] != indices[32:]
    assert indices[:32] != sorted(indices[:32])


def test_distinct_asks_for_every_adapter_before_any_comes_again():
    for num_adapters in (8, 100):
        indices = first_indices(GroupPopularity("distinct", num_adapters, group_size=32), 2 * num_adapters)
        assert len(set(indices[:num_adapters])) == num_adapters
        assert indices[:num_adapters] == indices[num_adapters:]


def test_base_only_asks_for_no_adapter():
    assert first_indices(BaseOnly(), 3) == [None, None, None]


def test_zipf_frequencies_follow_the_power_law():
    num_adapters, alpha, num_requests = 20, 0.92, 50_000
    counts = Counter(first_indices(ZipfPopularity(num_adapters, alpha), num_requests))
    weights = [(k + 1) ** -alpha for k in range(num_adapters)]
    for k, weight in enumerate(weights):
        # Five standard deviations of a binomial count; the seed is fixed, so this never flickers.
        expected = num_requests * weight / sum(weights)
        assert abs(counts[k] - expected) < 5 * expected**0.5


def test_zipf_with_exponent_zero_is_uniform():
    counts = Counter(first_indices(ZipfPopularity(4, 0.0), 40_000))
    assert all(count == pytest.approx(10_000, rel=0.03) for count in counts.values())


def test_a_million_adapters_are_sampled_within_range():
    indices = first_indices(ZipfPopularity(1_000_000, 0.92), 1000)
    assert all(index is not None and 0 <= index < 1_000_000 for index in indices)
    assert max(index or 0 for index in indices) > 100_000


@pytest.mark.parametrize(
    "build, field",
    [
        (lambda: GroupPopularity("zipf", 8), "kind"),  # type: ignore[arg-type]
        (lambda: GroupPopularity("uniform", 0), "num_adapters"),
        (lambda: GroupPopularity("uniform", 8, group_size=0), "group_size"),
        (lambda: ZipfPopularity(0, 1.0), "num_adapters"),
        (lambda: ZipfPopularity(5, -0.1), "alpha"),
        (lambda: ZipfPopularity(5, float("nan")), "alpha"),
    ],
)
def test_impossible_popularities_are_refused_by_name(build, field):
    with pytest.raises(ConfigError, match=f"^{field} is"):
        build()
