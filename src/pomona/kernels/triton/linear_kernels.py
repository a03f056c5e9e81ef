"""Dense layers over int8 weights as two Triton kernels: one per row for a single row, one on tensor cores for many.

Weights are read as int8 and widened in registers, which float16 and bfloat16 do without rounding; inputs are never
quantized. The scale of an output multiplies its sum, once.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (kernels are written in Triton's language, whose arguments have no Python types)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from pomona.kernels.triton.numerics import dot, round_to, widen


@triton.jit
def _finish(sums, scales_ptr, bias_ptr, columns, is_column, HAS_BIAS: tl.constexpr):
    """Scale and bias of float32 sums whose last axis is ``columns``."""
    out = sums * tl.load(scales_ptr + columns, mask=is_column, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    return out


@triton.jit
def int8_row_kernel(
    x_ptr,  # [num_tokens, in_features], first stride free
    values_ptr,  # int8 [out_features, IN_FEATURES]
    scales_ptr,  # float32 [out_features]
    bias_ptr,  # [out_features], or anything without HAS_BIAS
    out_ptr,  # [num_tokens, out_features]
    out_features,
    x_stride,
    IN_FEATURES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Program (tile of outputs, row)."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    is_column = columns < out_features
    weights = values_ptr + columns.to(tl.int64)[:, None] * IN_FEATURES
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in range(0, IN_FEATURES, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        is_k = k < IN_FEATURES
        x = tl.load(x_ptr + row * x_stride + k, mask=is_k, other=0.0).to(tl.float32)
        values = tl.load(weights + k[None, :], mask=is_column[:, None] & is_k[None, :], other=0)
        acc += values.to(tl.float32) * x[None, :]
    out = _finish(tl.sum(acc, axis=1), scales_ptr, bias_ptr, columns, is_column, HAS_BIAS)
    tl.store(out_ptr + row * out_features + columns, round_to(out, out_ptr.dtype.element_ty), mask=is_column)


@triton.jit(do_not_specialize=("num_tokens",))
def int8_tile_kernel(
    x_ptr,  # [num_tokens, in_features], first stride free
    values_ptr,  # int8 [out_features, IN_FEATURES]
    scales_ptr,  # float32 [out_features]
    bias_ptr,  # [out_features], or anything without HAS_BIAS
    out_ptr,  # [num_tokens, out_features]
    num_tokens,
    out_features,
    x_stride,
    IN_FEATURES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of rows, tile of outputs): rows come first, so that programs of one weight tile run together."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = rows < num_tokens
    is_column = columns < out_features
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    weights = values_ptr + columns.to(tl.int64)[None, :] * IN_FEATURES
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, IN_FEATURES, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        if IN_FEATURES % BLOCK_K == 0:
            x = tl.load(x_rows + k[None, :], mask=is_row[:, None], other=0.0)
            values = tl.load(weights + k[:, None], mask=is_column[None, :], other=0)
        else:
            is_k = k < IN_FEATURES
            x = tl.load(x_rows + k[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
            values = tl.load(weights + k[:, None], mask=is_column[None, :] & is_k[:, None], other=0)
        acc = dot(x, widen(values, x.dtype), acc, PRECISION)
    out = _finish(acc, scales_ptr, bias_ptr, columns[None, :], is_column[None, :], HAS_BIAS)
    places = out_ptr + rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    tl.store(places, round_to(out, out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
