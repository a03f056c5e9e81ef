"""Which point to measure next: the one that says most about the coefficients per second of measuring.

A point's leverage x' M^-1 x, M being the information of what was measured so far, is how much its prediction still
depends on chance; adding it raises log det M by log(1 + leverage) (D-optimal design, one point at a time: Fedorov,
1972). Rows are divided by the seconds they predict, because relative errors are what the fit minimises.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pomona.profiling.fit import Floats, design_row, design_terms
from pomona.profiling.points import Point
from pomona.sim.cost_model import LinearCost
from pomona.sim.step_work import StepWork

_PRIOR = 1e-6
"""Information assumed of each coefficient before anything is measured, so that M can be inverted."""


class Design:
    """Chooses among candidate points.

    Args:
        points: the candidates; each is chosen once.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = points
        self._terms = design_terms()
        self._works = [point.works() for point in points]
        self._rows = np.stack([design_row(works[-1], self._terms) for works in self._works])
        # Columns of one size, or the prior would weigh them differently.
        self._scale = np.maximum(self._rows.max(axis=0), 1e-12)
        self._is_left = np.ones(len(points), dtype=bool)

    @property
    def is_exhausted(self) -> bool:
        """True when every candidate has been taken."""
        return not self._is_left.any()

    def choose(self, measured: Sequence[StepWork], cost: LinearCost, max_seconds: float) -> Point | None:
        """The most telling point per second, and mark it as taken; None if none is left.

        Args:
            measured: what was measured so far.
            cost: the best prediction so far.
            max_seconds: points predicted to take longer are passed over.
        """
        seconds = self._seconds(cost)
        gain = np.log1p(self.leverages(measured, cost)) / np.maximum(seconds, 0.02)
        return self._take(gain, seconds <= max_seconds)

    def draw(self, cost: LinearCost, max_seconds: float) -> Point | None:
        """The next point as they were drawn, for what no leverage says: that the form is wrong."""
        return self._take(-np.arange(len(self._points), dtype=float), self._seconds(cost) <= max_seconds)

    def _seconds(self, cost: LinearCost) -> Floats:
        return np.array([sum(cost.seconds(work) for work in works) for works in self._works])

    def _take(self, gain: Floats, is_short: NDArray[np.bool_]) -> Point | None:
        allowed = self._is_left & is_short
        if not allowed.any():
            return None
        index = int(np.where(allowed, gain, -np.inf).argmax())
        self._is_left[index] = False
        return self._points[index]

    def leverages(self, measured: Sequence[StepWork], cost: LinearCost) -> Floats:
        """[num_points] leverage of every candidate."""
        rows = self._weighted(self._rows, [works[-1] for works in self._works], cost)
        known = self._weighted(np.stack([design_row(work, self._terms) for work in measured]), measured, cost)
        information = known.T @ known + _PRIOR * np.eye(rows.shape[1]) * float((rows**2).mean())
        return np.asarray(np.einsum("ij,ij->i", rows, np.linalg.solve(information, rows.T).T))

    def _weighted(self, rows: Floats, works: Sequence[StepWork], cost: LinearCost) -> Floats:
        predicted = np.array([max(cost.seconds(work), 1e-6) for work in works])
        return np.asarray(rows / self._scale / predicted[:, None])
