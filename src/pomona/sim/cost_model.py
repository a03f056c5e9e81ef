"""What a step costs: the protocol, and the simplest model. Plain arithmetic, so that a simulation is exact and fast."""

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
