"""Profiling: measure point after point until predictions no longer get better, then fit and write down."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pomona.core.errors import ConfigError
from pomona.profiling.design import Design
from pomona.profiling.fit import Fit, Sample, fit
from pomona.profiling.measure import PointMeter
from pomona.profiling.points import Point, seeds

_MIN_POINTS = 100
"""Some five per coefficient: steps of one kind differ by ten percent and more."""
_WINDOW = 20
"""The expected error, averaged over so many points, must be less than over as many before."""
_MIN_IMPROVEMENT = 0.03


@dataclass(frozen=True, slots=True)
class ProfileLimits:
    """When to stop at the latest.

    Raises:
        ConfigError: a limit is too low.
    """

    max_points: int = 300
    """At least 2: a point is predicted from others."""
    max_seconds: float = 300.0
    min_seconds: float = 30.0
    """Measure at least this long, unless a limit comes first: machines have slow moments."""

    def __post_init__(self) -> None:
        """Check both."""
        if self.max_points < 2:
            raise ConfigError(f"max_points is {self.max_points}: must be at least 2, so that one is held out")
        if not self.max_seconds > 0.0:
            raise ConfigError(f"max_seconds is {self.max_seconds}: must be positive")


@dataclass(frozen=True, slots=True)
class ProfileProgress:
    """How far a profile is."""

    num_points: int
    num_samples: int
    elapsed_s: float
    expected_error: float | None
    """Of predictions anywhere in the candidates' range; None at first."""
    point: Point
    """The one measured last."""


@dataclass(frozen=True, slots=True)
class ProfileOutcome:
    """What was measured, and what became of it."""

    fit: Fit
    samples: tuple[Sample, ...]
    num_points: int
    elapsed_s: float
    reason: str
    """Why it stopped, for people."""


def run_profile(
    meter: PointMeter, points: Sequence[Point], limits: ProfileLimits, report: Callable[[ProfileProgress], bool]
) -> ProfileOutcome:
    """Measure until the expected error no longer falls, or a limit is reached.

    Args:
        meter: measures.
        points: what may be measured.
        limits: when to stop at the latest.
        report: called after every point; True if that is enough. The time it takes does not count.
    """
    start_s = time.monotonic()
    design = Design(points)
    samples: list[Sample] = []
    errors: list[float] = []
    waiting = seeds(meter.config)
    meter.warm_up(waiting, limits.max_seconds / 10)
    num_points, reason = 0, f"{limits.max_points} points"
    current: Fit | None = None
    while num_points < limits.max_points:
        elapsed_s = time.monotonic() - start_s
        if waiting:
            point = waiting.pop(0)
        else:
            current = fit(samples, is_rough=True)
            errors.append(_expected_error(design, samples, current))
            report_s = time.monotonic()
            is_enough = report(ProfileProgress(num_points, len(samples), elapsed_s, errors[-1], point))
            start_s += time.monotonic() - report_s
            if is_enough:
                reason = "enough"
                break
            if elapsed_s >= limits.min_seconds and _has_settled(errors, num_points):
                reason = "predictions no longer get better"
                break
            left_s = limits.max_seconds - elapsed_s
            works = [sample.work for sample in samples]
            # Every other point is drawn: leverage is of a form, which may be wrong where it says that all is known.
            is_drawn = num_points % 2 == 0
            chosen = None
            if left_s > 0 and is_drawn:
                chosen = design.draw(current.cost, left_s / 2)
            elif left_s > 0:
                chosen = design.choose(works, current.cost, left_s / 2)
            if chosen is None:
                reason = "no other batch to measure" if design.is_exhausted else f"{limits.max_seconds:g} s"
                break
            point = chosen
        samples.extend(meter.measure(point, num_points))
        num_points += 1
    return ProfileOutcome(fit(samples), tuple(samples), num_points, time.monotonic() - start_s, reason)


def _expected_error(design: Design, samples: Sequence[Sample], current: Fit) -> float:
    """Typical relative error of a prediction at a candidate: residuals as found by cross-validation, and more of it
    the larger the candidate's leverage."""
    leverages = design.leverages([sample.work for sample in samples], current.cost)
    return float(current.error.p50 * np.sqrt(1.0 + np.minimum(leverages, 1e4)).mean())


def _has_settled(errors: Sequence[float], num_points: int) -> bool:
    if num_points < _MIN_POINTS or len(errors) < 2 * _WINDOW:
        return False
    latest, before = sum(errors[-_WINDOW:]), sum(errors[-2 * _WINDOW : -_WINDOW])
    return latest > (1.0 - _MIN_IMPROVEMENT) * before
