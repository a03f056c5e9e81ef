"""Host memory with wishes to the system: on huge pages, taken early, given back at once.

All of it is advice: where the system does not follow, everything works as well and a little slower.
"""

import ctypes
import math
import mmap
import sys

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 * 2**20
_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23


def mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a mapping of their own, which ends with the last tensor that shows it. Memory is taken when first
    written, and goes back to the system: an allocator keeps what blocks of all sizes leave between them."""
    num_elements = math.prod(shape)
    if num_elements == 0:
        return torch.zeros(shape, dtype=dtype)
    # Private: memory shared with children would be on no huge pages.
    memory = mmap.mmap(-1, num_elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def new_on_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialized memory on huge pages: weights are read from end to end."""
    tensor = torch.empty(shape, dtype=dtype)
    prefer_huge_pages(tensor)
    return tensor


def prefer_huge_pages(tensor: Tensor) -> None:
    """Have a large contiguous CPU tensor, not yet touched, backed with huge pages."""
    _advise(tensor, _MADV_HUGEPAGE, -(-tensor.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES)


def take_memory(tensor: Tensor) -> bool:
    """Have the system give a contiguous CPU tensor its memory now, not at the first write; what it holds stays. Other
    threads go on meanwhile. False where the system cannot (Linux before 5.14)."""
    return _advise(tensor, _MADV_POPULATE_WRITE, tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE)


def _advise(tensor: Tensor, advice: int, start: int) -> bool:
    """madvise from the address ``start`` to the tensor's end."""
    num_bytes = tensor.data_ptr() + tensor.numel() * tensor.element_size() - start
    if sys.platform != "linux" or num_bytes <= 0:
        return False
    madvise = ctypes.CDLL(None).madvise
    return bool(madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), advice) == 0)
