"""The compiled kernels against the reference, on every instruction set of this processor and on one and two threads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pomona.kernels.activation import silu_mul
from pomona.kernels.attention import write_kv
from pomona.kernels.cpu import binding
from pomona.kernels.dispatch import use_backend
from pomona.kernels.linear import Layout, pack, packed_linear, unpack
from pomona.kernels.norm import add_rms_norm, rms_norm
from pomona.kernels.rope import apply_rope
from pomona.kernels.sample import greedy
from support.kernel_cases import Segment, make_adapters, make_contexts, make_segments
from support.tolerances import assert_close

pytestmark = pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)

DTYPES = [torch.float32, torch.bfloat16]
NAN = float("nan")


SETUPS = [*((isa, 1) for isa in binding.available_isas()), *((isa, 2) for isa in binding.available_isas()[-1:])]
"""(instruction set, threads): all instruction sets on one thread, the best one on two as well."""


@contextmanager
def _setup(isa: str, num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with binding.use_isa(isa), use_backend("cpu"):
            yield
    finally:
        torch.set_num_threads(before)


def _check(run: Callable[[], Tensor], expected: Tensor) -> None:
    """Every setup's result is close to the expected one."""
    for isa, num_threads in SETUPS:
        with _setup(isa, num_threads):
            actual = run()
        try:
            assert_close(actual, expected)
        except AssertionError as error:
            raise AssertionError(f"{isa} on {num_threads} threads: {error}") from None


def _of_reference(run: Callable[[], Tensor]) -> Tensor:
    with use_backend("reference"):
        return run()


@pytest.mark.parametrize("rows_per_page", [1, 3, 4, 16])
def test_256_adapters_on_pages_of_any_size_share_a_batch(rows_per_page: int) -> None:
    ranks = [[(4, 8, 16, 5)[i % 4]] for i in range(256)]
    adapters = make_adapters(ranks, in_features=48, widths=[40], rows_per_page=rows_per_page)
    segments = make_segments(512, 256, "uniform", "some")
    x, out = torch.randn(512, 48), torch.randn(512, 40)
    _check(lambda: adapters.apply(x, out, segments), _of_reference(lambda: adapters.apply(x, out, segments)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 100, 700])
@pytest.mark.parametrize("heads", [(6, 2, 64), (4, 4, 24), (7, 1, 80), (3, 3, 7)], ids=str)
def test_attention_agrees_with_the_reference(
    heads: tuple[int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    contexts = make_contexts([1, 1300, 64, 513, 40], heads=heads, dtype=dtype)
    rows = [(0, 0, 1), (1, 1299, 1300), (2, 0, 64), (3, 300, 513), (4, 39, 40)]
    expected = _of_reference(lambda: torch.cat(contexts.attend(rows, window)))
    _check(lambda: torch.cat(contexts.attend(rows, window)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features, out_features", [(64, 96), (37, 50), (1, 1), (4301, 33), (130, 1000)])
@pytest.mark.parametrize("num_rows", [1, 2, 9, 300])
def test_a_packed_layer_multiplies_as_the_weight_does(
    num_rows: int, in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    weight = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
    bias = torch.randn(out_features).to(dtype)
    whole = torch.randn(num_rows, in_features + 3).to(dtype)
    x = whole[:, 1 : in_features + 1]
    packed = pack(weight)
    assert packed.layout is Layout.GROUPED
    assert torch.equal(unpack(packed), weight)
    assert torch.equal(unpack(packed, slice(7, 40)), weight[7:40])
    expected = x.double() @ weight.double().T
    _check(lambda: packed_linear(x, packed), expected)
    _check(lambda: packed_linear(x, packed, bias), expected + bias.double())
    assert_close(_of_reference(lambda: packed_linear(x, packed, bias)), expected + bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows, features", [(1, 576), (33, 100), (700, 64), (5, 7)])
def test_row_kernels_agree_with_the_reference(num_rows: int, features: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(num_rows, features).to(dtype) for _ in range(2))
    weight, gate_up = torch.randn(features).to(dtype), (4 * torch.randn(num_rows, 2 * features)).to(dtype)

    def added(which: int) -> Tensor:
        return add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)[which]

    for run in (
        lambda: rms_norm(x, weight, 1e-5),
        lambda: silu_mul(gate_up),
        lambda: added(0),
        lambda: added(1),
    ):
        _check(run, _of_reference(run))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 10, 64])
def test_rope_and_the_kv_write_agree_with_the_reference(head_dim: int, dtype: torch.dtype) -> None:
    num_tokens, num_heads, num_kv_heads = 150, 5, 2
    fused = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    positions, cos_sin = torch.randint(0, 90, (num_tokens,)), torch.randn(90, head_dim)
    slots = torch.randperm(200)[:num_tokens]

    def run() -> Tensor:
        query, key, value = fused.clone().split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        caches = torch.zeros(20, 2, 10, num_kv_heads, head_dim, dtype=dtype)
        apply_rope(query, key, positions, cos_sin)
        write_kv(key, value, caches[:, 0], caches[:, 1], slots)
        return torch.cat((query.flatten(), caches.flatten()))

    _check(run, _of_reference(run))


@pytest.mark.parametrize("isa", binding.available_isas())
def test_values_that_are_not_numbers_stay_so_and_reach_no_other_row(isa: str) -> None:
    """A sequence whose numbers blow up must be found out, and its neighbours must not notice."""
    x = torch.randn(9, 64)
    x[4, 10] = NAN
    packed, weight = pack(torch.randn(40, 64)), torch.ones(64)
    contexts = make_contexts([30, 30])
    contexts.queries[0][29] = NAN
    with _setup(isa, 1):
        for result in (packed_linear(x, packed), rms_norm(x, weight, 1e-5), silu_mul(x)):
            is_bad = result.isnan().any(dim=1)
            assert is_bad.tolist() == [row == 4 for row in range(9)]
        bad, good = contexts.attend([(0, 29, 30), (1, 29, 30)])
    assert bad.isnan().all()
    assert good.isfinite().all()


@pytest.mark.parametrize("isa", binding.available_isas())
def test_no_bfloat16_that_is_not_a_number_becomes_one_by_rounding(isa: str) -> None:
    """Rounding adds to a float's bits, which must not carry a NaN's over to a zero's."""
    bits = torch.cat((torch.arange(0x7F81, 0x8000), torch.arange(0xFF81, 0x10000)))
    nans = bits.to(torch.int16).view(torch.bfloat16)[:, None].expand(-1, 16)
    assert nans.isnan().all()
    ones = torch.ones_like(nans)
    packed = pack(torch.eye(16, dtype=torch.bfloat16))
    with _setup(isa, 1):
        for with_nans, other in ((nans, ones), (ones, nans)):
            for result in add_rms_norm(with_nans.clone(), other.clone(), ones[0], 1e-5):
                assert result.isnan().all()
            assert silu_mul(torch.cat((with_nans, other), dim=1)).isnan().all()
        for num_rows in (1, 8, len(nans)):
            assert packed_linear(nans[:num_rows].contiguous(), packed).isnan().all()
            assert packed_linear(ones[:num_rows].contiguous(), packed, nans[-1].contiguous()).isnan().all()


@pytest.mark.parametrize("isa", binding.available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [5, 70])
def test_an_adapter_reads_no_further_than_its_rows(num_rows: int, dtype: torch.dtype, isa: str) -> None:
    """31 inputs end half a unit before a whole step of tile registers does."""
    adapters = make_adapters([[4], [4]], in_features=31, widths=[48], dtype=dtype)
    x = torch.randn(num_rows + 1, 31).to(dtype)
    x[num_rows] = NAN
    with _setup(isa, 1):
        out = adapters.apply(
            x, torch.zeros(num_rows + 1, 48, dtype=dtype), [Segment(0, num_rows, 0), Segment(num_rows, num_rows + 1, 1)]
        )
    assert out[:num_rows].isfinite().all()
    assert out[num_rows].isnan().all()


@pytest.mark.parametrize("num_rows, vocab_size", [(1, 1), (3, 100), (33, 5003)])
def test_greedy_takes_the_first_of_the_largest_and_notices_what_is_not_finite(num_rows: int, vocab_size: int) -> None:
    whole = torch.randint(-50, 50, (num_rows, vocab_size + 2)).float()  # ties, and negative maxima
    logits = whole[:, 1:-1]
    first = torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits])
    _check_equal(lambda: greedy(logits)[0], first)
    _check_equal(lambda: greedy(logits)[1], torch.ones(num_rows, dtype=torch.bool))
    for bad in (NAN, float("inf"), -float("inf")):
        logits[num_rows - 1, vocab_size // 2] = bad
        _check_equal(lambda: greedy(logits)[1], torch.arange(num_rows) < num_rows - 1)


def _check_equal(run: Callable[[], Tensor], expected: Tensor) -> None:
    for isa, num_threads in SETUPS:
        with _setup(isa, num_threads):
            assert torch.equal(run(), expected), f"{isa} on {num_threads} threads"
    assert torch.equal(_of_reference(run), expected)


def test_logits_are_not_rounded_to_bfloat16_on_the_way_out() -> None:
    x, weight = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)
    for isa, _ in SETUPS:
        with _setup(isa, 1):
            out = packed_linear(x, pack(weight), out_dtype=torch.float32)
        assert out.dtype == torch.float32
        assert out.item() == 1 + 2.0**-9


def test_half_precision_is_left_to_the_reference() -> None:
    x = torch.randn(3, 16, dtype=torch.float16)
    weight = torch.randn(8, 16, dtype=torch.float16)
    with use_backend("cpu"):
        packed = pack(weight)
        assert packed.layout is Layout.DENSE
        assert_close(packed_linear(x, packed), x.double() @ weight.double().T)


def test_no_rows_make_no_rows() -> None:
    with use_backend("cpu"):
        assert packed_linear(torch.randn(0, 16), pack(torch.randn(8, 16))).shape == (0, 8)
