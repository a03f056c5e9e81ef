"""Host memory that goes back to the system when it is freed.

An allocator keeps what long-lived blocks of all sizes leave between them. What comes and goes for the life of a server,
and is held to a byte budget, is therefore mapped on its own.
"""

import math
import mmap

import torch
from torch import Tensor


def mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a mapping of their own, which ends with the last tensor that shows it. Taken when first written."""
    num_elements = math.prod(shape)
    if num_elements == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, num_elements * dtype.itemsize), dtype=dtype).view(shape)
