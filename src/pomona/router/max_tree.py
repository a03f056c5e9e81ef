"""MaxTree: one number per index, and which index comes first or last among those with a large enough number.

A complete binary tree of maxima over an array, so that every operation takes time logarithmic in the number of
indices. ``LevelIndex`` keeps one tree per load, which answers "the least (or most) loaded replica that still has room".
"""

import math
import sys

ABSENT = -math.inf
"""The number of an index that is not there."""
ANY = -sys.float_info.max
"""The bound that every index that is there meets."""


class MaxTree:
    """Indices from 0 up, each with a finite number or none."""

    def __init__(self) -> None:
        self._num_leaves = 1
        self._tree = [ABSENT, ABSENT]

    @property
    def largest(self) -> float:
        """The largest number; ``ABSENT`` if there is none."""
        return self._tree[1]

    def put(self, index: int, value: float) -> None:
        """Set an index's number; ``ABSENT`` takes the index out."""
        while index >= self._num_leaves:
            self._grow()
        tree = self._tree
        node = index + self._num_leaves
        tree[node] = value
        node >>= 1
        while node:
            left, right = tree[2 * node], tree[2 * node + 1]
            largest = left if left >= right else right
            if tree[node] == largest:
                return
            tree[node] = largest
            node >>= 1

    def first(self, at_least: float) -> int | None:
        """The lowest index with such a number; ``at_least`` is finite."""
        tree, node = self._tree, 1
        if tree[1] < at_least:
            return None
        while node < self._num_leaves:
            node *= 2
            if tree[node] < at_least:
                node += 1
        return node - self._num_leaves

    def last(self, at_least: float) -> int | None:
        """The highest index with such a number; ``at_least`` is finite."""
        tree, node = self._tree, 1
        if tree[1] < at_least:
            return None
        while node < self._num_leaves:
            node = 2 * node + 1
            if tree[node] < at_least:
                node -= 1
        return node - self._num_leaves

    def _grow(self) -> None:
        leaves = self._tree[self._num_leaves :]
        self._num_leaves *= 2
        leaves += [ABSENT] * (self._num_leaves - len(leaves))
        levels = [leaves]
        while len(levels[-1]) > 1:
            below = levels[-1]
            levels.append([max(below[k], below[k + 1]) for k in range(0, len(below), 2)])
        self._tree = [ABSENT, *(value for level in reversed(levels) for value in level)]


class LevelIndex:
    """Indices sorted into whole-numbered levels (loads), each index with a number (room) in its level."""

    def __init__(self) -> None:
        self._level_of: dict[int, int] = {}
        self._trees: list[MaxTree] = []
        self._lowest = 0

    def put(self, index: int, level: int, value: float) -> None:
        """Place an index, from wherever it was."""
        before = self._level_of.get(index)
        if before is not None and before != level:
            self._trees[before].put(index, ABSENT)
        self._level_of[index] = level
        while level >= len(self._trees):
            self._trees.append(MaxTree())
        self._trees[level].put(index, value)
        if level < self._lowest:
            self._lowest = level

    def drop(self, index: int) -> None:
        """Take an index out, if it is there."""
        level = self._level_of.pop(index, None)
        if level is not None:
            self._trees[level].put(index, ABSENT)

    def first_of_lowest(self, at_least: float) -> int | None:
        """The lowest index of the lowest level that has one with such a number."""
        trees = self._trees
        # Levels empty from below are passed once, until something is put there again.
        while self._lowest < len(trees) and trees[self._lowest].largest == ABSENT:
            self._lowest += 1
        for level in range(self._lowest, len(trees)):
            index = trees[level].first(at_least)
            if index is not None:
                return index
        return None

    def last_of_highest(self, at_least: float, below_level: int) -> int | None:
        """The highest index of the highest level under ``below_level`` that has one with such a number."""
        for level in range(min(below_level, len(self._trees)) - 1, -1, -1):
            index = self._trees[level].last(at_least)
            if index is not None:
                return index
        return None
