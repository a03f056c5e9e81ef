"""SwiGLU by the compiled kernels."""

import torch
from torch import Tensor

from pomona.kernels.cpu import binding
from pomona.kernels.reference import activation as reference


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ``kernels.activation.silu_mul``."""
    dtype = binding.DTYPES.get(gate_up.dtype)
    if dtype is None or gate_up.dim() != 2 or not gate_up.is_contiguous():
        return reference.silu_mul(gate_up)
    num_rows, width = gate_up.shape
    out = binding.empty((num_rows, width // 2), gate_up.dtype)
    binding.library().pomona_silu_mul(
        dtype, torch.get_num_threads(), gate_up.data_ptr(), out.data_ptr(), num_rows, width // 2, width
    )
    return out
