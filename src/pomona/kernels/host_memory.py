"""Host memory that goes back to the system when it is freed.

An allocator keeps what long-lived blocks of all sizes leave between them. What comes and goes for the life of a server,
and is held to a byte budget, is therefore mapped on its own.
"""

import ctypes
import math
import mmap
import sys

import torch
from torch import Tensor

_MADV_POPULATE_WRITE = 23


def mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a mapping of their own, which ends with the last tensor that shows it. Taken when first written."""
    num_elements = math.prod(shape)
    if num_elements == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, num_elements * dtype.itemsize), dtype=dtype).view(shape)


def take_memory(tensor: Tensor) -> bool:
    """Have the system give a contiguous CPU tensor its memory now, not at the first write; what it holds stays.

    Other threads go on meanwhile. False where the system cannot (Linux before 5.14).
    """
    if sys.platform != "linux":
        return False
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    num_bytes = tensor.data_ptr() + tensor.numel() * tensor.element_size() - start
    madvise = ctypes.CDLL(None).madvise
    return bool(madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE) == 0)
