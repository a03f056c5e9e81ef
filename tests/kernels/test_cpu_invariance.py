"""What a row becomes does not depend on what shares its batch or on the number of threads: bit for bit.

It holds for dense layers, LoRA, attention (whatever the chunks of a prompt) and the row-wise ops, on each instruction
set; two instruction sets may differ in the last bit.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pomona.kernels.activation import silu_mul
from pomona.kernels.cpu import binding
from pomona.kernels.dispatch import use_backend
from pomona.kernels.linear import pack, packed_linear, quantize
from pomona.kernels.lora import adapted_linear
from pomona.kernels.norm import add_rms_norm, rms_norm
from pomona.kernels.rope import apply_rope
from pomona.kernels.sample import greedy
from support.kernel_cases import Segment, make_adapters, make_contexts
from support.tolerances import assert_close

pytestmark = pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=binding.available_isas(), autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with binding.use_isa(request.param), use_backend("cpu"):
        yield


def _on_threads(num_threads: int, run: Callable[[], Tensor]) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [96, 5001])
def test_a_row_through_a_dense_layer_is_the_same_in_any_batch(in_features: int, dtype: torch.dtype) -> None:
    packed = pack(torch.randn(200, in_features).to(dtype))
    x = torch.randn(300, in_features).to(dtype)
    together = packed_linear(x, packed)
    assert torch.equal(together, _on_threads(2, lambda: packed_linear(x, packed)))
    for start, end in ((0, 1), (7, 9), (250, 263), (40, 300)):
        assert torch.equal(packed_linear(x[start:end], packed), together[start:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows_per_page", [3, 4])
def test_a_row_with_an_adapter_is_the_same_in_any_batch(rows_per_page: int, dtype: torch.dtype) -> None:
    ranks = [[16, 5], [8, 8], [33, 0]]
    adapters = make_adapters(ranks, in_features=70, widths=[150, 40], rows_per_page=rows_per_page, dtype=dtype)
    x, out = torch.randn(90, 70).to(dtype), torch.randn(90, 190).to(dtype)
    expected = adapters.apply(x, out, [Segment(0, 90, 0)])
    runs = ((0, 1), (1, 3), (3, 10), (10, 19), (19, 88))
    apart = [Segment(start, end, 0) for start, end in runs]
    for segments in (apart, [*apart[::2], Segment(88, 90, 2)], [Segment(0, 19, 1), Segment(19, 88, 0)]):
        ordered = sorted(segments, key=lambda segment: segment.start)
        for num_threads in (1, 2):
            added = _on_threads(num_threads, lambda ordered=ordered: adapters.apply(x, out, ordered))
            for segment in ordered:
                if segment.adapter == 0:
                    assert torch.equal(added[segment.start : segment.end], expected[segment.start : segment.end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_waits_for_what_other_threads_still_shrink(dtype: torch.dtype) -> None:
    """Other inputs each time, so that what an earlier call shrunk is of no use."""
    adapters = make_adapters([[16]], in_features=4096, widths=[32], dtype=dtype)
    packed = pack(torch.randn(32, 4096).to(dtype))
    batch, of_segments = adapters.batch([Segment(0, 32, 0)])
    for _ in range(20):
        x = torch.randn(32, 4096).to(dtype)

        def run(x: Tensor = x) -> Tensor:
            return adapted_linear(x, packed, None, adapters.slices, of_segments, batch)

        # Two threads first: one alone would leave what they shrink where they look for it.
        on_two = _on_threads(2, run)
        assert torch.equal(on_two, _on_threads(1, run))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(("in_features", "widths"), [(70, [160, 48, 16]), (64, [150, 40]), (5000, [64])])
def test_a_product_with_adapters_is_the_product_and_then_the_adapters(
    in_features: int, widths: list[int], is_int8: bool, dtype: torch.dtype
) -> None:
    """Bit for bit, but where tile registers add both before they round."""
    ranks = [[16] * len(widths), [5, 0, 33][: len(widths)], [0, 8, 1][: len(widths)], [40, 3, 2][: len(widths)]]
    adapters = make_adapters(ranks, in_features=in_features, widths=widths, dtype=dtype)
    weight = torch.randn(sum(widths), in_features).to(dtype)
    packed = pack(quantize(weight) if is_int8 else weight)
    bias, x = torch.randn(sum(widths)).to(dtype), torch.randn(330, in_features).to(dtype)
    long_runs = [Segment(0, 36, 0), Segment(36, 45, 1), Segment(50, 300, 2), Segment(300, 320, 3)]
    short_runs = [Segment(index, index + 1, index % 4) for index in range(9, 17)]
    mixed = [Segment(0, 1, 3), Segment(3, 9, 0), Segment(9, 11, 1), Segment(13, 40, 0), Segment(45, 53, 2)]
    for num_rows, segments in ((330, long_runs), (20, short_runs), (60, mixed), (1, [Segment(0, 1, 0)]), (2, [])):
        batch, of_segments = adapters.batch(segments)
        for use_bias in (bias, None):
            base = packed_linear(x[:num_rows], packed, use_bias)
            expected = adapters.apply(x[:num_rows], base, segments)
            allowance: Tensor | None = None
            if binding.uses_tiles(binding.DTYPES[dtype]) and not is_int8:
                product = x[:num_rows].double() @ weight.double().T
                exact = product if use_bias is None else product + use_bias.double()
                expected = adapters.expected(x[:num_rows], exact, segments)
                allowance = adapters.rounding(x[:num_rows], exact, segments)
            for num_threads in (1, 2, 5):
                out = _on_threads(
                    num_threads,
                    lambda args=(x[:num_rows], packed, use_bias, adapters.slices, of_segments, batch): adapted_linear(
                        *args
                    ),
                )
                if allowance is None:
                    torch.testing.assert_close(out, expected, rtol=0, atol=0)
                else:
                    assert_close(out, expected, allowance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(("in_features", "widths"), [(70, [160, 48]), (64, [150, 40]), (1056, [64])])
def test_a_row_through_a_product_with_adapters_is_the_same_in_any_batch(
    in_features: int, widths: list[int], is_int8: bool, dtype: torch.dtype
) -> None:
    ranks = [[17, 40][: len(widths)], [8, 0][: len(widths)]]
    adapters = make_adapters(ranks, in_features=in_features, widths=widths, dtype=dtype)
    weight = torch.randn(sum(widths), in_features).to(dtype)
    packed = pack(quantize(weight) if is_int8 else weight)
    x = torch.randn(300, in_features).to(dtype)

    def run(start: int, segments: list[Segment], end: int) -> Tensor:
        moved = [Segment(segment.start - start, segment.end - start, segment.adapter) for segment in segments]
        batch, ranks = adapters.batch(moved)
        return adapted_linear(x[start:end], packed, None, adapters.slices, ranks, batch)

    bare, together = packed_linear(x, packed), run(0, [Segment(0, 300, 0)], 300)
    for segments in (
        [Segment(7, 8, 0)],
        [Segment(row, row + 1, 0) for row in range(40, 80)],
        [Segment(0, 1, 1), Segment(1, 3, 0), Segment(3, 10, 0), Segment(10, 33, 0), Segment(40, 190, 0)],
        [Segment(32, 96, 0), Segment(100, 300, 1)],
    ):
        start, end = segments[0].start, segments[-1].end
        for num_threads in (1, 2):
            out = _on_threads(num_threads, lambda args=(start, segments, end): run(*args))
            expected = bare.clone()
            for segment in segments:
                of_segment = slice(segment.start, segment.end)
                if segment.adapter == 0:
                    expected[of_segment] = together[of_segment]
                else:
                    expected[of_segment] = out[segment.start - start : segment.end - start]
            assert torch.equal(out, expected[start:end])


def test_more_threads_than_a_kernel_has_queues_do_every_item_once() -> None:
    adapters = make_adapters([[16], [3], [40]], in_features=64, widths=[4000], dtype=torch.bfloat16)
    weight, x = torch.randn(4000, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    segments = [Segment(row, row + 1, row % 3) for row in range(64)]
    batch, ranks = adapters.batch(segments)

    def run() -> Tensor:
        return adapted_linear(x, packed, None, adapters.slices, ranks, batch)

    packed = pack(weight)
    assert torch.equal(_on_threads(70, run), _on_threads(1, run))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [64, 201])
def test_a_row_through_a_row_wise_op_is_the_same_in_any_batch(features: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(70, features).to(dtype) for _ in range(2))
    weight, gate_up = torch.randn(features).to(dtype), torch.randn(70, 2 * features).to(dtype)
    heads, positions = torch.randn(70, 4, 16).to(dtype), torch.randint(0, 50, (70,))
    cos_sin = torch.randn(50, 16)

    def rotated(rows: slice) -> Tensor:
        fused = heads[rows].clone()
        apply_rope(fused[:, :3], fused[:, 3:], positions[rows], cos_sin)
        return fused

    ops: list[Callable[[slice], Tensor]] = [
        lambda rows: rms_norm(x[rows], weight, 1e-5),
        lambda rows: torch.cat(add_rms_norm(x[rows].clone(), residual[rows].clone(), weight, 1e-5), dim=1),
        lambda rows: silu_mul(gate_up[rows]),
        rotated,
        lambda rows: greedy(x[rows].float())[0],
    ]
    for op in ops:
        together = op(slice(0, 70))
        assert torch.equal(together, _on_threads(2, lambda op=op: op(slice(0, 70))))
        for start, end in ((0, 1), (33, 40), (69, 70)):
            assert torch.equal(op(slice(start, end)), together[start:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 130])
@pytest.mark.parametrize("heads", [(6, 2, 32), (14, 2, 64), (20, 20, 96)], ids=str)
def test_a_prompt_is_attended_to_the_same_whole_in_chunks_and_token_by_token(
    heads: tuple[int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    contexts = make_contexts([700, 90], heads=heads, dtype=dtype)
    [whole] = contexts.attend([(0, 0, 700)], window)
    cuts = [0, 1, 64, 65, 200, 203, 513, 699, 700]
    chunks = [contexts.attend([(1, 80, 90), (0, first, end)], window)[1] for first, end in pairwise(cuts)]
    assert torch.equal(torch.cat(chunks), whole)
    for position in (0, 63, 64, 511, 512, 699):
        [alone] = contexts.attend([(0, position, position + 1)], window)
        assert torch.equal(alone[0], whole[position])
        two_threads = _on_threads(2, lambda p=position: contexts.attend([(0, p, p + 1)], window)[0])
        assert torch.equal(two_threads, alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 8, 9, 40])
def test_a_long_context_shared_by_threads_is_attended_to_the_same(num_rows: int, dtype: torch.dtype) -> None:
    contexts = make_contexts([3000], heads=(2, 1, 64), dtype=dtype)
    first = 3000 - num_rows
    [one] = contexts.attend([(0, first, 3000)])
    for num_threads in (2, 3):
        assert torch.equal(one, _on_threads(num_threads, lambda: contexts.attend([(0, first, 3000)])[0]))
    [alone] = contexts.attend([(0, first, first + 1)])
    assert torch.equal(one[0], alone[0])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), window=st.none() | st.integers(1, 200))
def test_any_company_leaves_a_decode_as_it_is(data: st.DataObject, window: int | None) -> None:
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=5))
    contexts = make_contexts([100, *lengths], heads=(4, 2, 16), block_size=data.draw(st.sampled_from([1, 5, 16])))
    [alone] = contexts.attend([(0, 99, 100)], window)
    company = [(i + 1, data.draw(st.integers(0, length - 1)), length) for i, length in enumerate(lengths)]
    place = data.draw(st.integers(0, len(company)))
    together = contexts.attend([*company[:place], (0, 99, 100), *company[place:]], window)
    assert torch.equal(together[place], alone)
