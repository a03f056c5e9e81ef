"""Rotary position embedding by the compiled kernels."""

import torch
from torch import Tensor

from pomona.kernels.cpu import binding
from pomona.kernels.reference import rope as reference


def apply_rope(query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """See ``kernels.rope.apply_rope``."""
    dtype = binding.DTYPES.get(query.dtype)
    num_tokens, num_heads, head_dim = query.shape
    query_strides, key_strides = query.stride(), key.stride()
    if dtype is None or query_strides[1:] != (head_dim, 1) or key_strides[1:] != (head_dim, 1):
        reference.apply_rope(query, key, positions, cos_sin)
        return
    assert key.dtype is query.dtype
    assert cos_sin.dtype is torch.float32
    assert cos_sin.is_contiguous()
    assert positions.dtype is torch.int64
    assert positions.is_contiguous()
    assert positions.shape[0] == num_tokens
    binding.library().pomona_rope(
        *(dtype, torch.get_num_threads(), query.data_ptr(), key.data_ptr(), None, None, None),
        *(positions.data_ptr(), None, cos_sin.data_ptr(), num_tokens, num_heads, key.shape[1], head_dim),
        *(query_strides[0], key_strides[0], 0, 0, 0, 1),
    )
