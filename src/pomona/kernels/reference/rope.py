"""Rotary position embedding in plain torch."""

from torch import Tensor


def apply_rope(query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """See ``kernels.rope.apply_rope``."""
    cos, sin = cos_sin.index_select(0, positions).unsqueeze(1).chunk(2, dim=-1)  # [num_tokens, 1, head_dim / 2]
    for heads in (query, key):
        low, high = heads.chunk(2, dim=-1)
        rotated_low = low * cos - high * sin
        rotated_high = high * cos + low * sin
        low.copy_(rotated_low)
        high.copy_(rotated_high)
