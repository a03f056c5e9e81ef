"""What a step costs: the protocol, and models that are plain sums. Arithmetic only, so that a simulation is exact and
fast; where the numbers come from is ``pomona.profiling`` (measured) or ``sim.roofline`` (computed).
"""

import math
from dataclasses import dataclass
from typing import Protocol

from pomona.sim.step_work import StepWork


class CostModel(Protocol):
    """A replica's speed: a pure function."""

    def seconds(self, work: StepWork) -> float:
        """How long the step takes on the device and its host, from the plan's making to the result; not negative."""
        ...


@dataclass(frozen=True, slots=True)
class PerTokenCost:
    """So much per step and so much per row: for tests and sketches."""

    step_s: float = 0.01
    row_s: float = 0.0

    def seconds(self, work: StepWork) -> float:
        """``step_s + row_s * rows``; nothing for a plan that only says what to forget."""
        return self.step_s + self.row_s * work.num_rows if work.num_rows else 0.0


@dataclass(frozen=True, slots=True)
class CostTerm:
    """Seconds in proportion to a quantity of the step, or to the part of it between two bounds.

    Two terms of one quantity make a roofline: ``max(a, b x) = a + b (x - a / b)+``, a flat part as long as reading
    weights hides the computing, and a slope above the knee.
    """

    quantity: str
    """Name of a field or property of StepWork."""
    seconds_each: float
    above: float = 0.0
    """What does not exceed this is free."""
    up_to: float = math.inf
    """What exceeds this is free."""
    beside_rows: float = math.inf
    """It is free in steps of more rows than this: what is read while that many are computed costs no time."""

    def amount(self, work: StepWork) -> float:
        """The quantity between the bounds."""
        if work.num_rows > self.beside_rows:
            return 0.0
        value: float = getattr(work, self.quantity)
        return min(value, self.up_to) - self.above if value > self.above else 0.0


@dataclass(frozen=True, slots=True)
class LinearCost:
    """``step_s`` plus a sum of terms: the form that profiles are fitted to."""

    step_s: float
    """Of every step that computes anything."""
    terms: tuple[CostTerm, ...]

    def seconds(self, work: StepWork) -> float:
        """The sum; nothing for a plan that only says what to forget."""
        if not work.num_rows:
            return 0.0
        total = self.step_s
        for term in self.terms:
            total += term.seconds_each * term.amount(work)
        return total
