"""Rotary position embedding (arXiv 2104.09864) in Hugging Face's half-split layout."""

from torch import Tensor

from pomona.kernels.dispatch import backend_for


def apply_rope(query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Semantics: ``h[:half], h[half:] = h[:half] * cos - h[half:] * sin, h[half:] * cos + h[:half] * sin``, in place.

    Args:
        query: [num_tokens, num_heads, head_dim], changed in place; the first stride is free, so it may be a part of a
            fused projection's output.
        key: [num_tokens, num_kv_heads, head_dim], changed in place, likewise.
        positions: int64 [num_tokens], each below num_positions.
        cos_sin: float32 [num_positions, head_dim]: head_dim / 2 cosines, then head_dim / 2 sines. The rotation is
            computed in float32.
    """
    backend_for("rope", query.device).apply_rope(query, key, positions, cos_sin)
