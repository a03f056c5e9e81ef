"""A small sample of a large grid in which every two values of two different axes meet at least once.

Most mistakes need one or two particular values to show (Kuhn, Wallace, Gallo, IEEE TSE 2004); a pairwise sample of six
axes has some fifty cases where the grid has thousands.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value per axis that cover all pairs: greedy, and the same every time.

    Args:
        axes: the values of each; none empty.
    """
    rng = random.Random(0)
    indices = [range(len(axis)) for axis in axes]
    open_pairs = {
        (first, i, second, j)
        for first, second in itertools.combinations(range(len(axes)), 2)
        for i, j in itertools.product(indices[first], indices[second])
    }
    chosen: list[tuple[int, ...]] = []
    while open_pairs:
        first, i, second, j = min(open_pairs)
        candidates = []
        for _ in range(30):
            row = [rng.choice(axis) for axis in indices]
            row[first], row[second] = i, j
            candidates.append(tuple(row))
        best = max(candidates, key=lambda row: len(_pairs(row) & open_pairs))
        open_pairs -= _pairs(best)
        chosen.append(best)
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in chosen]


def _pairs(row: Sequence[int]) -> set[tuple[int, int, int, int]]:
    return {(first, row[first], second, row[second]) for first, second in itertools.combinations(range(len(row)), 2)}
