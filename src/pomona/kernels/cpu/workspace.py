"""Memory that kernels' results share from step to step, on huge pages.

An allocator gives large memory back to the system when it is freed: the next step would take it again page by page, and
rows that lie a page or more apart would each need a translation of their own.
"""

import bisect
import ctypes
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pomona.kernels.cpu import binding
from pomona.kernels.host_memory import new_on_huge_pages

_ALIGNMENT = 64
_FIRST_REGION_BYTES = 1 << 20
_LARGE_BYTES = 1 << 20
"""Smaller results are as well off with an ordinary allocator, which is quicker at finding memory."""


class RegionFullError(RuntimeError):
    """The workspace has to grow before it can lend so much."""


class Workspace:
    """Memory for what kernels return. All recordings made with one workspace overlap in it: a result of theirs lives
    until the next replay of any of them."""

    def __init__(self) -> None:
        self.region = new_on_huge_pages((_FIRST_REGION_BYTES,), torch.uint8)
        self._lent: list[tuple[int, int]] = []
        """[start, end) of what is in use, in order."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor in the lowest gap that holds it; the gap is free again when its storage is gone.

        Raises:
            RegionFullError: no gap holds it.
        """
        num_elems = math.prod(shape)
        if num_elems == 0:
            return torch.empty(shape, dtype=dtype)
        num_bytes = -(-num_elems * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        start = 0
        for used_start, used_end in [*self._lent, (self.region.numel(), 0)]:
            if start + num_bytes <= used_start:
                break
            start = used_end
        else:
            raise RegionFullError
        span = (start, start + num_bytes)
        # Its place is found only now: any moment may collect garbage, and what that gives back moves the others.
        bisect.insort(self._lent, span)
        memory = (ctypes.c_uint8 * num_bytes).from_address(self.region.data_ptr() + start)
        weakref.finalize(memory, _give_back, self._lent, span, self.region)
        return torch.frombuffer(memory, dtype=dtype, count=num_elems).view(*shape)

    def grow(self, num_bytes: int = 0) -> None:
        """Take a region of twice the size, or of so many bytes more. What was lent keeps the one that it is in."""
        size = self.region.numel()
        self.region = new_on_huge_pages((size + max(size, num_bytes),), torch.uint8)
        self._lent = []


class Activations:
    """Memory for the large results of steps that are computed as they come: those of prompts."""

    def __init__(self) -> None:
        self._workspace = Workspace()
        self._num_missing_bytes = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Kernels' results on this thread lie here while the context lasts, and for as long as somebody has them."""
        if self._num_missing_bytes:
            self._workspace.grow(self._num_missing_bytes)
            self._num_missing_bytes = 0
        with binding.allocate_with(self._empty):
            yield

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < _LARGE_BYTES:
            return torch.empty(shape, dtype=dtype)
        try:
            return self._workspace.empty(shape, dtype)
        except RegionFullError:  # one of the next steps finds room
            self._num_missing_bytes = max(self._num_missing_bytes, num_bytes)
            return torch.empty(shape, dtype=dtype)


def _give_back(lent: list[tuple[int, int]], span: tuple[int, int], _region: Tensor) -> None:
    """The region, which lives as long as what was lent of it, is not used here."""
    lent.remove(span)
