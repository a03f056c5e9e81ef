"""Pace: how long steps take, learnt from when they were planned, and how much may be in one for it to end in time.

Pure: time comes in with each step. A step of s sequences and n rows in all is taken to last ``step + seq*s + row*n``
seconds. The three coefficients are followed by a Kalman filter: directions in which the steps of late do not differ
(only decodes: s = n) keep what was learnt of them before, where least squares over a window would forget it.
"""

import math
from dataclasses import dataclass

_MIN_STEPS = 8
"""Steps to see before any is held to a limit."""
_NOISE = 0.2
"""Standard deviation of a step's time, relative to itself."""
_DRIFT = 0.01
"""Standard deviation of a coefficient's change from one step to the next, relative to itself."""
_MAX_FACTOR = 8.0
"""A step that takes this many times what was expected, and what is not known of it, is an accident (a page fault, a
sleeping machine) and counts as this many times."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What may be in a step."""

    num_rows: int
    rows_per_seq: int = 0
    """Each sequence counts as so many rows besides its own."""


class Pace:
    """The speed of one replica.

    Args:
        max_rows: the token budget of a step, however long it takes.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._coefficients = [0.0, 0.0, 0.0]
        self._covariance = [[0.0] * 3 for _ in range(3)]
        self._num_seen = 0
        self._last: tuple[float, tuple[float, float, float]] | None = None

    def observe(self, now_s: float, num_seqs: int, num_rows: int) -> None:
        """Note that a step is planned now. The time since the one before is how long that one took, unless nothing was
        computed in it."""
        if self._last is not None:
            last_s, work = self._last
            self._learn(work, now_s - last_s)
        self._last = (now_s, (1.0, float(num_seqs), float(num_rows))) if num_rows else None

    def within(self, limit_s: float | None) -> Allowance:
        """What a step may hold to end within ``limit_s`` seconds.

        A limit that would leave more than half of every step to its fixed cost is not kept that far: everybody would
        wait longer for it. As long as that cost is not known well, smaller steps are tried, which makes it known.
        """
        if limit_s is None or self._num_seen < _MIN_STEPS:
            return Allowance(self._max_rows)
        step_s, seq_s, row_s = (max(0.0, value) for value in self._coefficients)
        row_s = max(row_s, 1e-12)
        room_s = max(limit_s - step_s, step_s - 2.0 * math.sqrt(max(0.0, self._covariance[0][0])), 0.0)
        return Allowance(max(1, min(self._max_rows, int(room_s / row_s))), min(self._max_rows, int(seq_s / row_s)))

    def seconds(self, num_seqs: int, num_rows: int, num_steps: int = 1) -> float:
        """How long so many sequences and rows take, summed over so many steps; 0 until a step has been seen."""
        step_s, seq_s, row_s = (max(0.0, value) for value in self._coefficients)
        return step_s * num_steps + seq_s * num_seqs + row_s * num_rows

    def _learn(self, work: tuple[float, float, float], measured_s: float) -> None:
        if self._num_seen == 0:
            for index, amount in enumerate(work):
                self._covariance[index][index] = (measured_s / amount) ** 2
        expected_s = sum(value * amount for value, amount in zip(self._coefficients, work, strict=True))
        covariance = self._covariance
        for index, value in enumerate(self._coefficients):
            covariance[index][index] += (_DRIFT * value) ** 2
        spread = [sum(value * amount for value, amount in zip(row, work, strict=True)) for row in covariance]
        variance = sum(value * amount for value, amount in zip(spread, work, strict=True))
        if self._num_seen >= _MIN_STEPS:
            # Cut to nothing, what was not known would be learnt as certain, and for ever.
            measured_s = min(measured_s, _MAX_FACTOR * (max(expected_s, 0.0) + math.sqrt(max(variance, 0.0))))
        self._num_seen += 1
        variance += (_NOISE * max(measured_s, 1e-9)) ** 2
        error_s = measured_s - expected_s
        for row, gain_of_row in enumerate(spread):
            self._coefficients[row] += gain_of_row / variance * error_s
            for column, gain_of_column in enumerate(spread):
                covariance[row][column] -= gain_of_row * gain_of_column / variance
