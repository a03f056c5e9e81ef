"""Products and rounding inside kernels, the same compiled and interpreted.

Triton's interpreter keeps a bfloat16 as its bits: it would multiply those, and it cuts off where a GPU rounds.
"""

# ruff: noqa: ANN001, ANN201 (kernels are written in Triton's language, whose arguments have no Python types)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 ``x`` as ``dtype``, to the nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, nearest.to(tl.uint32).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def widen(values, dtype: tl.constexpr):
    """int8 ``values`` as ``dtype``, exactly; compiled, that has a short way to bfloat16 which the interpreter lacks."""
    if _INTERPRETED:
        return round_to(values.to(tl.float32), dtype)
    else:  # noqa: RET505 (what is constant must be a branch, or both sides are compiled)
        return values.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``. PRECISION says what becomes of float32 operands ("tf32", "tf32x3", "ieee")."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def dot_wide(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` for a float32 ``a`` that must not be rounded to the dtype of ``b``.

    With a bfloat16 ``b``, ``a`` goes in as two bfloat16 parts (16 bits of significand), so that ``b`` feeds the tensor
    cores as it is. float16 has too narrow a range for that: there both are tf32, which holds a float16 exactly.
    """
    if b.dtype == tl.bfloat16:
        high = round_to(a, tl.bfloat16)
        low = round_to(a - high.to(tl.float32), tl.bfloat16)
        acc = dot(low, b, acc, PRECISION)
        acc = dot(high, b, acc, PRECISION)
    else:
        acc = dot(a, b.to(tl.float32), acc, PRECISION)
    return acc
