"""int8 weights: every backend against the dequantized weight in float64, and what quantizing does to a weight."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import isnan

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.kernels.cpu import binding
from pomona.kernels.dispatch import backends_of, use_backend
from pomona.kernels.linear import (
    GROUP,
    INT8_MAX,
    Layout,
    gather_rows,
    is_served_as,
    pack,
    packed_linear,
    quantize,
    unpack,
)
from support.tolerances import TOLERANCES, assert_close

DTYPES = list(TOLERANCES)
CPU_DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 7, 16, 133, 1024]
SHAPES = [(64, 96), (37, 50), (1, 1), (4301, 33), (576, 48), (8455, 20), (130, 1000)]
"""(in_features, out_features): whole tiles, odd numbers of inputs, one of each, many blocks of inputs, blocks of which
the last is short, more inputs than one pass takes, many groups."""
BLOCK = 256
"""Consecutive inputs that share a fixed point."""


def _weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different magnitude, and in each one weight far larger than the others."""
    weight = torch.randn(out_features, in_features) / in_features**0.5
    weight[:, in_features // 2] *= 5
    return (weight * torch.logspace(-1, 0, out_features).unsqueeze(1)).to(dtype)


def _expected(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = x.double() @ quantize(weight).dequantize().double().T
    return product if bias is None else product + bias.double()


@pytest.fixture(params=backends_of("linear"))
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


finite_rows = st.lists(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3) | st.just([0.0, 0.0, 0.0]),
    min_size=1,
    max_size=4,
)


@given(rows=finite_rows, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_weight_moves_by_more_than_half_its_scale(rows: list[list[float]], dtype: torch.dtype) -> None:
    weight = torch.tensor(rows).to(dtype)
    quantized = quantize(weight)
    error = (quantized.dequantize().double() - weight.double()).abs()
    allowed = quantized.scales.double().unsqueeze(1) / 2
    assert (error <= allowed * (1 + 1e-5)).all()
    assert quantized.values.abs().max() <= INT8_MAX


@given(rows=finite_rows)
def test_a_weight_that_int8_holds_is_kept_and_its_sign_only_changes_signs(rows: list[list[float]]) -> None:
    quantized = quantize(torch.tensor(rows))
    assert torch.equal(quantize(-torch.tensor(rows)).values, -quantized.values)
    again = quantize(quantized.dequantize())
    assert torch.equal(again.values, quantized.values)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features, out_features", SHAPES)
@pytest.mark.parametrize("num_rows", ROWS)
def test_a_quantized_layer_multiplies_as_its_dequantized_weight_does(
    num_rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    weight, bias = _weight(out_features, in_features, dtype), torch.randn(out_features).to(dtype)
    x = torch.randn(num_rows, in_features + 3).to(dtype)[:, 1 : in_features + 1]
    packed = pack(quantize(weight))
    out = packed_linear(x, packed)
    assert out.dtype is dtype
    assert_close(out, _expected(x, weight))
    assert_close(packed_linear(x, packed, bias), _expected(x, weight, bias))
    logits = packed_linear(x, packed, out_dtype=torch.float32)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits.double(), _expected(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("isa", binding.available_isas())
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_every_instruction_set_multiplies_the_same(dtype: torch.dtype, isa: str, num_threads: int) -> None:
    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.enter_context(use_backend("cpu"))
        stack.enter_context(binding.use_isa(isa))
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(num_threads)
        for in_features, out_features in SHAPES:
            weight, bias = _weight(out_features, in_features, dtype), torch.randn(out_features).to(dtype)
            packed = pack(quantize(weight))
            assert packed.layout is Layout.GROUPED
            for num_rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 300):
                x = torch.randn(num_rows, in_features).to(dtype)
                out = packed_linear(x, packed, bias)
                assert_close(out, _expected(x, weight, bias))
                with binding.use_isa("plain"):
                    assert torch.equal(out[:5], packed_linear(x[:5], packed, bias))


@pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)
@pytest.mark.parametrize("isa", binding.available_isas())
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [96, 577, 9001])
def test_a_row_is_the_same_bit_for_bit_in_any_batch(in_features: int, dtype: torch.dtype, isa: str) -> None:
    with use_backend("cpu"), binding.use_isa(isa):
        packed = pack(quantize(_weight(200, in_features, dtype)))
        x = torch.randn(300, in_features).to(dtype)
        together = packed_linear(x, packed)
        for start, end in ((0, 1), (7, 9), (250, 263), (40, 300), (290, 298)):
            assert torch.equal(packed_linear(x[start:end], packed), together[start:end])


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features, out_features", SHAPES)
def test_rows_and_the_whole_weight_come_back_dequantized(
    in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    weight = _weight(out_features, in_features, dtype)
    packed = pack(quantize(weight))
    assert torch.equal(unpack(packed), quantize(weight).dequantize())
    for rows in (slice(7, 12), slice(16, 48), slice(30, None), slice(out_features, None)):
        assert torch.equal(unpack(packed, rows), unpack(packed)[rows])
    row_ids = torch.randint(0, out_features, (9,))
    gathered = gather_rows(packed, row_ids)
    assert gathered.dtype is packed.dtype is dtype
    assert torch.equal(gathered, unpack(packed)[row_ids].to(dtype))
    assert is_served_as(weight, packed)
    assert not is_served_as(-weight, packed)


def _moved(x: Tensor) -> Tensor:
    """By how much each input may move when it becomes fixed point, float64."""
    part, share = (2.0**-15, 1 / 128) if x.dtype is torch.bfloat16 else (2.0**-30, 1 / 64)
    moved = []
    for block in x.double().abs().split(BLOCK, dim=1):
        largest = block.amax(1, keepdim=True).clamp(min=2.0**-96)
        moved.append(torch.where(block < largest * share, largest * part, 0.0))
    return torch.cat(moved, dim=1)


def _outliers(num_rows: int, in_features: int) -> Tensor:
    """One input in a hundred, and one of the first block always, a thousand times the others."""
    x = torch.randn(num_rows, in_features)
    is_outlier = torch.rand(num_rows, in_features) < 0.01
    is_outlier[:, 3] = True
    return torch.where(is_outlier, x * 1000, x)


def _close(num_rows: int, in_features: int) -> Tensor:
    """No input is less than 1/64 of another."""
    sign = torch.randint(0, 2, (num_rows, in_features)) * 2 - 1
    return (torch.rand(num_rows, in_features) * 62 + 1.5) * sign


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [5, 255, 300, 4301])
@pytest.mark.parametrize(
    "make", [torch.randn, _outliers, _close, lambda *shape: torch.randn(shape) * torch.logspace(-35, 30, shape[1])]
)
@pytest.mark.parametrize("num_rows", [1, 9])
def test_results_are_as_exact_as_stated(
    num_rows: int, make: Callable[[int, int], Tensor], in_features: int, dtype: torch.dtype
) -> None:
    x, quantized = make(num_rows, in_features).to(dtype), quantize(torch.randn(50, in_features).to(dtype))
    weight = quantized.dequantize().double()
    out = packed_linear(x, pack(quantized), out_dtype=torch.float32)
    sizes = x.double().abs() @ weight.abs().T
    in_float32 = 2.0**-24 * (in_features + 3)  # any order of products and sums, each rounded
    allowed = _moved(x) @ weight.abs().T + sizes * in_float32
    assert ((out.double() - x.double() @ weight.T).abs() <= allowed).all()


@pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)
def test_sums_of_a_block_are_exact() -> None:
    """Products that cancel but for one unit, which float32 sums of large ones would lose."""
    weight = torch.full((16, BLOCK), 127.0, dtype=torch.bfloat16)
    x = torch.full((3, BLOCK), 255.0, dtype=torch.bfloat16)
    x[:, BLOCK // 2 :] *= -1
    x[:, -1] = -253.0
    with use_backend("cpu"):
        out = packed_linear(x, pack(quantize(weight)), out_dtype=torch.float32)
    assert torch.equal(out, torch.full((3, 16), 254.0))


@pytest.mark.usefixtures("_backend")
def test_small_inputs_beside_large_ones_count() -> None:
    """One input a million times the others, which int8 inputs would round away."""
    packed = pack(quantize(torch.ones(32, 64)))
    x = torch.full((2, 64), 0.5)
    x[:, 7] = 2.0**19
    assert_close(packed_linear(x, packed), torch.full((2, 32), 2.0**19 + 63 * 0.5))


@pytest.mark.usefixtures("_backend")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in Triton's interpreter
@pytest.mark.parametrize("num_rows", [1, 20])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_values_that_are_not_numbers_stay_so_and_reach_nothing_else(
    dtype: torch.dtype, bad: float, num_rows: int
) -> None:
    weight = torch.randn(40, 601).to(dtype)
    weight[3, 5], weight[9, 5] = float("nan"), float("inf")
    x = torch.randn(num_rows, 601).to(dtype)
    is_bad = ~packed_linear(x, pack(quantize(weight))).isfinite().all(0)
    assert is_bad.nonzero().flatten().tolist() == [3, 9]
    packed = pack(quantize(torch.randn(40, 601).to(dtype)))
    before = packed_linear(x, packed)
    for column in (10, 600):
        broken = x.clone()
        broken[0, column] = bad
        out = packed_linear(broken, packed)
        assert not out[0].isfinite().any()
        assert torch.equal(out[1:], before[1:])
        assert out[0].isnan().all() or not isnan(bad)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_zeros_give_zeros(dtype: torch.dtype) -> None:
    weight = torch.randn(20, 300).to(dtype)
    weight[4] = 0
    x = torch.randn(3, 300).to(dtype)
    x[1, :] = 0
    out = packed_linear(x, pack(quantize(weight)))
    assert torch.equal(out[:, 4], torch.zeros(3, dtype=dtype))
    assert torch.equal(out[1], torch.zeros(20, dtype=dtype))
    x[0, :256] = 0
    assert_close(packed_linear(x, pack(quantize(weight))), _expected(x, weight))


@pytest.mark.usefixtures("_backend")
def test_no_rows_make_no_rows() -> None:
    assert packed_linear(torch.randn(0, 16), pack(quantize(torch.randn(8, 16)))).shape == (0, 8)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), dtype=st.sampled_from(CPU_DTYPES))
def test_any_shape_agrees_with_the_reference_and_every_output_is_written(
    data: st.DataObject, dtype: torch.dtype
) -> None:
    in_features, out_features = data.draw(st.integers(1, 700)), data.draw(st.integers(1, 130))
    num_rows, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(out_features, in_features, generator=generator) / in_features**0.5).to(dtype)
    x = torch.randn(num_rows, in_features, generator=generator).to(dtype)
    assert_close(packed_linear(x, pack(quantize(weight))), _expected(x, weight))


def test_a_quantized_weight_takes_a_byte_per_weight_and_four_per_output() -> None:
    packed = pack(quantize(torch.randn(10 * GROUP, 64, dtype=torch.bfloat16)))
    assert packed.num_bytes == 10 * GROUP * (64 + 4)


def test_large_weights_are_quantized_in_parts_as_small_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _weight(50, 20)
    whole = quantize(weight)
    monkeypatch.setattr("pomona.kernels.linear._ROWS_AT_ONCE", random.Random(0).randint(3, 9))
    parts = quantize(weight)
    assert torch.equal(parts.values, whole.values)
    assert torch.equal(parts.scales, whole.scales)
