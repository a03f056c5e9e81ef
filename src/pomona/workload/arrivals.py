"""When requests arrive: point processes that start at 0 and never end. Seconds, ascending.

The first arrival is always at 0, so that a run has no dead time at its beginning; what differs between the processes
is the gap between one arrival and the next. Callers take as many arrivals as they need.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from pomona.workload.checks import require_between

RATES = (1e-6, 1e9)
CVS = (1e-3, 1e3)
"""Beyond these, gaps are no numbers any more."""


@dataclass(frozen=True, slots=True)
class AllAtOnce:
    """Every request arrives at 0: an infinite rate."""

    def times(self, rng: random.Random) -> Iterator[float]:
        """Yield 0.0 for ever; draws nothing from ``rng``."""
        del rng
        return itertools.repeat(0.0)


@dataclass(frozen=True, slots=True)
class ConstantArrivals:
    """One request every ``1 / rate_per_s`` seconds."""

    rate_per_s: float
    """Requests per second."""

    def __post_init__(self) -> None:
        """Refuse rates out of range."""
        require_between("rate_per_s", self.rate_per_s, *RATES)

    def times(self, rng: random.Random) -> Iterator[float]:
        """Yield k / rate for k = 0, 1, ...; draws nothing from ``rng``."""
        del rng
        return (k / self.rate_per_s for k in itertools.count())


@dataclass(frozen=True, slots=True)
class PoissonArrivals:
    """Independent exponential gaps of mean ``1 / rate_per_s``: many clients that know nothing of each other."""

    rate_per_s: float
    """Requests per second."""

    def __post_init__(self) -> None:
        """Refuse rates out of range."""
        require_between("rate_per_s", self.rate_per_s, *RATES)

    def times(self, rng: random.Random) -> Iterator[float]:
        """Yield ascending arrival times; one draw from ``rng`` per gap."""
        gaps = (rng.expovariate(self.rate_per_s) for _ in itertools.count())
        return itertools.accumulate(gaps, initial=0.0)


@dataclass(frozen=True, slots=True)
class GammaArrivals:
    """Independent Gamma gaps: mean ``1 / rate_per_s``, standard deviation ``cv`` times the mean.

    cv 1 is Poisson, larger is burstier, smaller more regular. S-LoRA (arXiv 2311.03285, section 7.1) varies cv from 1
    to 8; production traces of code completion reach 13.
    """

    rate_per_s: float
    """Requests per second, on average."""
    cv: float = 1.0
    """Standard deviation of the gaps over their mean."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require_between("rate_per_s", self.rate_per_s, *RATES)
        require_between("cv", self.cv, *CVS)

    def times(self, rng: random.Random) -> Iterator[float]:
        """Yield ascending arrival times; one Gamma variate from ``rng`` per gap."""
        shape = 1.0 / self.cv**2
        scale_s = self.cv**2 / self.rate_per_s
        gaps = (rng.gammavariate(shape, scale_s) for _ in itertools.count())
        return itertools.accumulate(gaps, initial=0.0)


Arrivals = AllAtOnce | ConstantArrivals | PoissonArrivals | GammaArrivals
