"""Rotary position embedding on a GPU: queries and keys of all rows in one launch, in place."""

from torch import Tensor

from pomona.kernels.reference import rope as reference
from pomona.kernels.triton.configs import config_for
from pomona.kernels.triton.launch import Launch
from pomona.kernels.triton.row_kernels import rope_kernel


def rope_launch(query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor) -> Launch:
    """See ``kernels.rope.apply_rope``; heads must be dense."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    assert cos_sin.is_contiguous()
    assert positions.is_contiguous()
    config = config_for("rope", query.device, head_dim=head_dim)
    block_h = min(config["block_heads"], 1 << (num_heads - 1).bit_length())
    half = head_dim // 2
    return Launch(
        kernel=rope_kernel,
        grid=(num_tokens, -(-num_heads // block_h) + -(-num_kv_heads // block_h)),
        args=(query, key, positions, cos_sin, query.stride(0), key.stride(0)),
        constants={
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HALF": half,
            "BLOCK_H": block_h,
            "BLOCK_D": 1 << (half - 1).bit_length(),
        },
        num_warps=config["num_warps"],
        num_stages=1,
    )


def apply_rope(query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """See ``kernels.rope.apply_rope``."""
    dense = (query.shape[2], 1)
    if query.stride()[1:] != dense or key.stride()[1:] != dense or query.dtype is not key.dtype:
        reference.apply_rope(query, key, positions, cos_sin)
        return
    rope_launch(query, key, positions, cos_sin).run()
