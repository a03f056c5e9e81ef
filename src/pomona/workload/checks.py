"""Refusals that name the field: every workload dataclass checks itself with these when it is built."""

import math

from pomona.core.errors import ConfigError

MAX_TOKENS = 10_000_000
"""Most tokens of a prompt or an answer; prompts of a simulation are held in memory."""
MAX_SECONDS = 1e9
"""Longest time: thirty years. A simulation looks at its fleet every few seconds, whether anything comes or not."""
MAX_COUNT = 10**12
"""Most of anything that is only counted, such as requests."""


def require(field: str, value: object, allowed: str, *, ok: bool) -> None:
    """Raise unless ``ok``.

    Raises:
        ConfigError: ``field is value: must be allowed``.
    """
    if not ok:
        raise ConfigError(f"{field} is {value!r}: must be {allowed}")


def require_positive(field: str, value: float) -> None:
    """Refuse zero, negative, infinite and NaN values."""
    require(field, value, "positive and finite", ok=math.isfinite(value) and value > 0)


def require_between(field: str, value: float, low: float, high: float) -> None:
    """Refuse values outside [low, high], and NaN."""
    require(field, value, f"between {low:g} and {high:g}", ok=low <= value <= high)


def require_count(field: str, value: int, minimum: int = 1, maximum: int = MAX_COUNT) -> None:
    """Refuse values below ``minimum`` and above ``maximum``."""
    is_low = isinstance(value, int) and value <= maximum
    allowed = f"an integer, {minimum} or larger" if is_low else f"an integer between {minimum} and {maximum}"
    require(field, value, allowed, ok=is_low and value >= minimum)
