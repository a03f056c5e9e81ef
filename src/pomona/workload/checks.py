"""Refusals that name the field: every workload dataclass checks itself with these when it is built."""

import math

from pomona.core.errors import ConfigError


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


def require_count(field: str, value: int, minimum: int = 1) -> None:
    """Refuse values below ``minimum``."""
    require(field, value, f"an integer, {minimum} or larger", ok=isinstance(value, int) and value >= minimum)
