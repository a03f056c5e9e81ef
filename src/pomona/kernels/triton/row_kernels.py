"""Kernels that work on each row by itself: RMS norm, rotary embedding, SwiGLU."""

# ruff: noqa: ANN001, ANN201 (kernels are written in Triton's language, whose arguments have no Python types)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from pomona.kernels.triton.numerics import round_to


@triton.jit(do_not_specialize=("num_inner",))
def rms_norm_kernel(
    x_ptr,  # [num_outer, num_inner, FEATURES], outer and inner stride free
    residual_ptr,  # [num_outer, FEATURES]; changed to x + residual
    weight_ptr,  # [FEATURES]
    out_ptr,  # [num_outer * num_inner, FEATURES]; may be x
    num_inner,
    outer_stride,
    inner_stride,
    eps,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Program (row)."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK)
    is_f = f < FEATURES
    x = tl.load(x_ptr + row // num_inner * outer_stride + row % num_inner * inner_stride + f, mask=is_f, other=0.0)
    dtype = out_ptr.dtype.element_ty
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * FEATURES + f, mask=is_f, other=0.0)
        x = round_to(x.to(tl.float32) + residual.to(tl.float32), dtype)
        tl.store(residual_ptr + row * FEATURES + f, x, mask=is_f)
    wide = x.to(tl.float32)
    normed = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / FEATURES + eps))
    weight = tl.load(weight_ptr + f, mask=is_f, other=0.0).to(tl.float32)
    # Rounded before the weight is applied, as the contract says.
    tl.store(out_ptr + row * FEATURES + f, round_to(weight * round_to(normed, dtype).to(tl.float32), dtype), mask=is_f)


@triton.jit(do_not_specialize_on_alignment=("positions_ptr",))
def rope_kernel(
    query_ptr,  # [num_tokens, num_heads, 2 * HALF], first stride free
    key_ptr,  # [num_tokens, num_kv_heads, 2 * HALF], first stride free
    positions_ptr,  # int64 [num_tokens]
    cos_sin_ptr,  # float32 [num_positions, 2 * HALF]
    query_stride,
    key_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (token, tile of heads): tiles of query heads come first, then tiles of key heads."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    num_query_tiles = tl.cdiv(NUM_HEADS, BLOCK_H)
    first_ptr = query_ptr + row * query_stride
    first_head = tile * BLOCK_H
    num_heads = tile * 0 + NUM_HEADS
    if tile >= num_query_tiles:
        first_ptr = key_ptr + row * key_stride
        first_head = (tile - num_query_tiles) * BLOCK_H
        num_heads = tile * 0 + NUM_KV_HEADS
    d = tl.arange(0, BLOCK_D)
    is_d = d < HALF
    angles = cos_sin_ptr + tl.load(positions_ptr + row) * (2 * HALF) + d
    cos = tl.load(angles, mask=is_d, other=0.0)
    sin = tl.load(angles + HALF, mask=is_d, other=0.0)
    heads = first_head + tl.arange(0, BLOCK_H)
    lows = first_ptr + heads[:, None] * (2 * HALF) + d[None, :]
    is_low = (heads < num_heads)[:, None] & is_d[None, :]
    low = tl.load(lows, mask=is_low, other=0.0).to(tl.float32)
    high = tl.load(lows + HALF, mask=is_low, other=0.0).to(tl.float32)
    dtype = query_ptr.dtype.element_ty
    tl.store(lows, round_to(low * cos[None, :] - high * sin[None, :], dtype), mask=is_low)
    tl.store(lows + HALF, round_to(high * cos[None, :] + low * sin[None, :], dtype), mask=is_low)


@triton.jit
def silu_mul_kernel(
    gate_up_ptr,  # [num_tokens, 2 * features], first stride free
    out_ptr,  # [num_tokens, features]
    features,
    stride,
    BLOCK: tl.constexpr,
):
    """Program (token, tile of features). One rounding, at the end."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_f = f < features
    gate = tl.load(gate_up_ptr + row * stride + f, mask=is_f, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + features + f, mask=is_f, other=0.0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * features + f, round_to(gated, out_ptr.dtype.element_ty), mask=is_f)
