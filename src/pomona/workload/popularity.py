"""Which adapter each request asks for.

Three families. *Group* popularities say how the rows of one batch divide among adapters (Punica, arXiv 2310.18547,
section 7: Distinct, Uniform, Skewed, Identical); they are exact, not sampled. ``ZipfPopularity`` is a true power law
over a population of adapters, sampled request by request, and ``RecordedPopularity`` repeats counted uses likewise.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pomona.core.errors import ConfigError
from pomona.workload.checks import require, require_count

MAX_ADAPTERS = 10_000_000
"""Of a population: one float each."""
MAX_GROUP = 1_000_000
"""Requests of a group: one integer each."""
GROUP_RATIO = 1.5
"""Punica's Skewed: each adapter is asked for 1.5 times as often as the next."""


def identical_counts(num_rows: int) -> tuple[int, ...]:
    """One adapter has all rows."""
    return (num_rows,)


def distinct_counts(num_rows: int) -> tuple[int, ...]:
    """Every row has an adapter of its own."""
    return (1,) * num_rows


def uniform_counts(num_rows: int) -> tuple[int, ...]:
    """ceil(sqrt(num_rows)) adapters share the rows as equally as integers allow, larger shares first."""
    num_adapters = math.isqrt(num_rows - 1) + 1
    share, num_larger = divmod(num_rows, num_adapters)
    return (share + 1,) * num_larger + (share,) * (num_adapters - num_larger)


def skewed_counts(num_rows: int) -> tuple[int, ...]:
    """Punica's "Zipf-1.5": a geometric series 1, 1.5, 2.25, ... rounded down; what is left is one more adapter.

    The series stops before it would reach ``num_rows``. Most popular first.
    """
    counts: list[int] = []
    num_left, term = num_rows, 1.0
    while math.floor(term) < num_left:
        counts.append(math.floor(term))
        num_left -= counts[-1]
        term *= GROUP_RATIO
    return tuple(sorted([*counts, num_left], reverse=True))


GroupKind = Literal["identical", "distinct", "uniform", "zipf-1.5"]

GROUP_COUNTS: dict[GroupKind, Callable[[int], tuple[int, ...]]] = {
    "identical": identical_counts,
    "distinct": distinct_counts,
    "uniform": uniform_counts,
    "zipf-1.5": skewed_counts,
}
"""Rows of a batch -> rows per adapter; every result sums to the argument and has no zero."""


@dataclass(frozen=True, slots=True)
class BaseOnly:
    """No request asks for an adapter."""

    def indices(self, rng: random.Random) -> Iterator[int | None]:
        """Yield None for ever; draws nothing from ``rng``."""
        del rng
        return itertools.repeat(None)


@dataclass(frozen=True, slots=True)
class GroupPopularity:
    """Each group of ``group_size`` consecutive requests divides among adapters exactly as ``kind`` says, in an order
    shuffled anew for every group. Adapter k is the k-th most popular of every group; with fewer adapters than the kind
    needs, indices wrap around.

    ``distinct`` knows no groups: requests go round all adapters in turn, so that one comes back as late as possible.
    """

    kind: GroupKind
    """How a group divides."""
    num_adapters: int
    """How many there are."""
    group_size: int = 32
    """Requests of a group."""

    def __post_init__(self) -> None:
        """Refuse unknown kinds, and groups or populations without members."""
        if self.kind not in GROUP_COUNTS:
            raise ConfigError(f"kind is {self.kind!r}: must be one of {', '.join(GROUP_COUNTS)}")
        require_count("num_adapters", self.num_adapters, 1, MAX_ADAPTERS)
        require_count("group_size", self.group_size, 1, MAX_GROUP)

    def indices(self, rng: random.Random) -> Iterator[int | None]:
        """Yield adapter indices in [0, num_adapters); one shuffle from ``rng`` per group, none for ``distinct``."""
        if self.kind == "distinct":
            yield from itertools.cycle(range(self.num_adapters))
        counts = GROUP_COUNTS[self.kind](self.group_size)
        group = [k % self.num_adapters for k, count in enumerate(counts) for _ in range(count)]
        while True:
            yield from rng.sample(group, len(group))


@dataclass(frozen=True, slots=True)
class ZipfPopularity:
    """Independent draws: adapter k (from 0) has probability proportional to ``1 / (k + 1) ** alpha``.

    alpha 0 is uniform; a production trace of adapters shows 0.92. Memory is one float per adapter.
    """

    num_adapters: int
    """How many there are."""
    alpha: float
    """The exponent."""

    def __post_init__(self) -> None:
        """Refuse an empty population and exponents that are negative or not finite."""
        require_count("num_adapters", self.num_adapters, 1, MAX_ADAPTERS)
        require("alpha", self.alpha, "between 0 and 20", ok=0.0 <= self.alpha <= 20.0)

    def indices(self, rng: random.Random) -> Iterator[int | None]:
        """Yield adapter indices in [0, num_adapters); one draw from ``rng`` per request."""
        cumulative = list(itertools.accumulate((k + 1) ** -self.alpha for k in range(self.num_adapters)))
        population = range(self.num_adapters)
        while True:
            yield rng.choices(population, cum_weights=cumulative)[0]


@dataclass(frozen=True, slots=True)
class RecordedPopularity:
    """Independent draws in proportion to recorded uses; adapter 0 is the first of them.

    Alibaba's GenTD26 trace of image generation has 874 adapters, and 0.777 of its requests use none.
    """

    uses: tuple[float, ...]
    base_share: float = 0.0
    """Share of the requests that ask for no adapter."""

    def __post_init__(self) -> None:
        """Refuse an empty population, uses that are not positive, and shares outside [0, 1]."""
        require("uses", len(self.uses), "a population of at least one adapter", ok=len(self.uses) > 0)
        for index, use in enumerate(self.uses):
            require(f"uses[{index}]", use, "positive and finite", ok=math.isfinite(use) and use > 0)
        require("base_share", self.base_share, "between 0 and 1", ok=0.0 <= self.base_share <= 1.0)

    def indices(self, rng: random.Random) -> Iterator[int | None]:
        """Yield adapter indices or None; two draws from ``rng`` per request."""
        cumulative = list(itertools.accumulate(self.uses))
        population = range(len(cumulative))
        while True:
            is_base = rng.random() < self.base_share
            index = rng.choices(population, cum_weights=cumulative)[0]
            yield None if is_base else index


Popularity = BaseOnly | GroupPopularity | ZipfPopularity | RecordedPopularity
