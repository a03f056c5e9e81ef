"""RMS norm, rotary embedding and SwiGLU against float64 formulas."""

from collections.abc import Iterator

import pytest
import torch

from pomona.kernels.activation import silu_mul
from pomona.kernels.dispatch import backends_of, use_backend
from pomona.kernels.norm import add_rms_norm, rms_norm
from pomona.kernels.rope import apply_rope
from support.tolerances import TOLERANCES, assert_close

DTYPES = list(TOLERANCES)
SHAPES = [(1, 1), (2, 7), (7, 64), (133, 96)]


@pytest.fixture(params=backends_of("norm"), autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


def _expected_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return torch.stack([weight * row / ((row * row).mean() + eps) ** 0.5 for row in x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, features", SHAPES)
def test_rms_norm_of_each_row_follows_the_formula(rows: int, features: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, features).to(dtype), torch.randn(features).to(dtype)
    before = x.clone()
    normed = rms_norm(x, weight, 1e-3)
    assert normed.dtype == dtype
    assert_close(normed, _expected_norm(x, weight, 1e-3))
    assert torch.equal(x, before)


def test_rms_norm_reads_heads_inside_a_fused_projection() -> None:
    fused = torch.randn(5, 70)
    heads = fused[:, 10:58].view(5, 3, 16)
    weight = torch.randn(16)
    normed = rms_norm(heads, weight, 1e-6)
    assert normed.is_contiguous()
    assert_close(normed.view(15, 16), _expected_norm(heads.reshape(15, 16), weight, 1e-6))


def test_rms_norm_of_large_half_precision_values_does_not_overflow() -> None:
    x = torch.full((2, 64), 60000.0, dtype=torch.float16)
    assert_close(rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6), torch.ones(2, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, features", SHAPES)
def test_add_rms_norm_normalizes_the_sum_and_returns_it(rows: int, features: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(rows, features).to(dtype), torch.randn(rows, features).to(dtype)
    weight = torch.randn(features).to(dtype)
    total = x + residual
    normed, new_residual = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(new_residual, total)
    assert_close(normed, _expected_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, features", SHAPES)
def test_silu_mul_gates_the_second_half_with_the_first(rows: int, features: int, dtype: torch.dtype) -> None:
    gate_up = (3 * torch.randn(rows, 2 * features)).to(dtype)
    before = gate_up.clone()
    gate, up = gate_up.double()[:, :features], gate_up.double()[:, features:]
    gated = silu_mul(gate_up)
    assert gated.dtype == dtype
    assert_close(gated, gate / (1 + torch.exp(-gate)) * up)
    assert torch.equal(gate_up, before)


def _rotated(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotation as multiplication of complex numbers (low, high) by exp(i * angle)."""
    low, high = heads.double().chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_heads, num_kv_heads, head_dim", [(4, 2, 16), (1, 1, 2), (3, 3, 10), (5, 1, 64)])
def test_rope_rotates_queries_and_keys_inside_the_fused_projection_and_nothing_else(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    positions = torch.tensor([0, 5, 6, 99, 5])
    angles = torch.rand(100, head_dim // 2, dtype=torch.float64) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
    fused = torch.randn(5, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    before = fused.clone()
    query, key, value = fused.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    apply_rope(query, key, positions, cos_sin)
    assert_close(query, _rotated(before[:, :num_heads], angles[positions]))
    assert_close(key, _rotated(before[:, num_heads : num_heads + num_kv_heads], angles[positions]))
    assert torch.equal(value, before[:, num_heads + num_kv_heads :])
