"""How many tokens prompts and answers have: distributions of positive integers, bounds included."""

import random
from dataclasses import dataclass

from pomona.workload.checks import MAX_TOKENS, require, require_between, require_count


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Always ``num_tokens``."""

    num_tokens: int
    """The length."""

    def __post_init__(self) -> None:
        """Refuse less than one token, and more than ``MAX_TOKENS``."""
        require_count("num_tokens", self.num_tokens, 1, MAX_TOKENS)

    def draw(self, rng: random.Random) -> int:
        """Return the length; draws nothing from ``rng``."""
        del rng
        return self.num_tokens


@dataclass(frozen=True, slots=True)
class UniformLength:
    """Every integer from ``min_tokens`` to ``max_tokens`` equally often. S-LoRA's synthetic workloads use [8, 512]."""

    min_tokens: int
    """The shortest."""
    max_tokens: int
    """The longest."""

    def __post_init__(self) -> None:
        """Refuse empty ranges and less than one token."""
        require_count("min_tokens", self.min_tokens, 1, MAX_TOKENS)
        require_count("max_tokens", self.max_tokens, self.min_tokens, MAX_TOKENS)

    def draw(self, rng: random.Random) -> int:
        """Return one length."""
        return rng.randint(self.min_tokens, self.max_tokens)


@dataclass(frozen=True, slots=True)
class LognormalLength:
    """``shift_tokens + median_tokens * exp(sigma * N(0, 1))``, rounded down, then clipped to [min, max].

    Punica's text-generation script draws prompts with median 18, sigma 0.8, shift -1, clipped to [1, context - 2].
    """

    median_tokens: float
    """Half are shorter, but for the shift."""
    sigma: float
    """Spread: standard deviation of the logarithm."""
    max_tokens: int
    """Longer ones become this long."""
    min_tokens: int = 1
    """Shorter ones become this long."""
    shift_tokens: int = 0
    """Added to each."""

    def __post_init__(self) -> None:
        """Refuse empty ranges, less than one token, and a spread that is negative or not finite."""
        require_between("median_tokens", self.median_tokens, 1e-3, MAX_TOKENS)
        require("sigma", self.sigma, "between 0 and 10", ok=0.0 <= self.sigma <= 10.0)
        require_count("min_tokens", self.min_tokens, 1, MAX_TOKENS)
        require_count("max_tokens", self.max_tokens, self.min_tokens, MAX_TOKENS)

    def draw(self, rng: random.Random) -> int:
        """Return one length."""
        num_tokens = self.shift_tokens + int(self.median_tokens * rng.lognormvariate(0.0, self.sigma))
        return min(max(num_tokens, self.min_tokens), self.max_tokens)


Lengths = FixedLength | UniformLength | LognormalLength
