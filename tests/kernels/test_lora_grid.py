"""Segmented LoRA over the whole grid: dtype, rank, rows, popularity, base rows, sizes, adapters, on every backend.

By default a sample in which every two values of two axes meet (``support.pairwise``), on every instruction set of the
CPU kernels and, with few rows, under Triton's interpreter. ``-m slow`` runs the full product, in one test per backend,
dtype, rank and number of rows. The truth is the formula in float64. Pages that no adapter owns, rows of x without an
adapter and everything around ``out`` are NaN.
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from pomona.kernels.cpu import binding
from pomona.kernels.dispatch import backends_of, use_backend
from pomona.kernels.lora import lora
from support.kernel_cases import NAN, Segment, make_adapters, make_segments
from support.pairwise import pairwise
from support.tolerances import TOLERANCES, assert_close

DTYPES = list(TOLERANCES)
RANKS = [1, 4, 8, 16, 64, 128, "mixed"]
ROWS = [1, 2, 7, 16, 133, 1024]
POPULARITIES = ["identical", "distinct", "uniform", "zipf", "skewed"]
BASE_ROWS = ["none", "some", "all"]
SHAPES = [(64, (96, 32, 32)), (37, (24, 8, 13)), (130, (65,)), (1, (1, 3))]
"""(in_features, widths): multiples of every tile, and of none."""
ADAPTERS = [1, 2, 33, 256]
FEW_ROWS = [1, 2, 7, 16]

VARIANTS = ["reference", *(f"cpu {isa}" for isa in binding.available_isas())]
if "triton" in backends_of("lora"):
    VARIANTS.append("triton")

Case = tuple[torch.dtype, int | str, int, str, str, tuple[int, tuple[int, ...]], int]
SAMPLE: list[Case] = pairwise(DTYPES, RANKS, ROWS, POPULARITIES, BASE_ROWS, SHAPES, ADAPTERS)
FEW_ROWS_SAMPLE: list[Case] = pairwise(
    DTYPES, [1, 4, 16, "mixed"], FEW_ROWS, POPULARITIES, BASE_ROWS, SHAPES[1:3], [33]
)


@contextmanager
def _variant(name: str) -> Iterator[None]:
    backend, _, isa = name.partition(" ")
    with use_backend(backend):
        if isa:
            with binding.use_isa(isa):
                yield
        else:
            yield


def _poisoned(num_rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(whole buffer, the part that is ``out``): rows before and after and columns behind are NaN."""
    whole = torch.full((num_rows + 2, width + 5), NAN, dtype=dtype)
    out = whole[1 : num_rows + 1, :width]
    out.copy_(torch.randn(num_rows, width))
    return whole, out


def _is_adapted(num_rows: int, segments: list[Segment], ranks: list[list[int]], widths: tuple[int, ...]) -> Tensor:
    """[num_rows, sum of widths]: what the adapters of the rows change."""
    adapted = torch.zeros(num_rows, sum(widths), dtype=torch.bool)
    for segment in segments:
        columns = torch.tensor([rank > 0 for rank in ranks[segment.adapter]]).repeat_interleave(torch.tensor(widths))
        adapted[segment.start : segment.end] = columns
    return adapted


def check(variant: str, case: Case) -> None:
    """Run one point of the grid."""
    dtype, rank_kind, num_rows, popularity, base_rows, (in_features, widths), num_adapters = case
    torch.manual_seed(0)
    rng = random.Random(0)
    num_adapters = 1 if popularity == "identical" else min(num_adapters, num_rows)
    ranks = [
        [rng.choice([0, 1, 3, 4, 16, 64, 128]) if rank_kind == "mixed" else int(rank_kind) for _ in widths]
        for _ in range(num_adapters)
    ]
    adapters = make_adapters(ranks, in_features=in_features, widths=widths, dtype=dtype)
    segments = make_segments(num_rows, num_adapters, popularity, base_rows)
    adapted = _is_adapted(num_rows, segments, ranks, widths)
    x = torch.randn(num_rows, in_features).to(dtype)
    in_segment = torch.zeros(num_rows, dtype=torch.bool)
    for segment in segments:
        in_segment[segment.start : segment.end] = True
    x[~in_segment] = NAN
    whole, out = _poisoned(num_rows, sum(widths), dtype)
    before, expected = whole.clone(), adapters.expected(x, out, segments)
    allowance = adapters.rounding(x, out, segments) if variant.startswith("cpu") and dtype is torch.bfloat16 else None
    batch, rank_table = adapters.batch(segments)
    with _variant(variant):
        lora(out, x, adapters.slices, rank_table, batch)
    assert_close(out, expected, allowance)
    whole[1 : num_rows + 1, : sum(widths)][adapted] = before[1 : num_rows + 1, : sum(widths)][adapted]
    torch.testing.assert_close(whole, before, rtol=0, atol=0, equal_nan=True)


def _check_all(variant: str, cases: list[Case]) -> None:
    for case in cases:
        try:
            check(variant, case)
        except AssertionError as error:
            raise AssertionError(f"{variant}, {case}: {error}") from None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "triton"])
def test_every_pair_of_values_of_the_grid(variant: str, dtype: torch.dtype) -> None:
    if dtype not in binding.DTYPES and variant.startswith("cpu") and not variant.endswith(binding.available_isas()[-1]):
        pytest.skip("the kernels leave this dtype to the reference, on any instruction set")
    _check_all(variant, [case for case in SAMPLE if case[0] is dtype])


@pytest.mark.skipif("triton" not in VARIANTS, reason="no Triton here")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["triton"])
def test_every_pair_of_values_with_few_rows_under_triton(variant: str, dtype: torch.dtype) -> None:
    _check_all(variant, [case for case in FEW_ROWS_SAMPLE if case[0] is dtype])


@pytest.mark.slow
@pytest.mark.skipif("triton" not in VARIANTS, reason="no Triton here")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["triton"])
def test_every_pair_of_values_under_triton(variant: str, dtype: torch.dtype) -> None:
    _check_all(variant, [case for case in SAMPLE if case[0] is dtype])


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("rank_kind", RANKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "triton"])
def test_the_full_grid(variant: str, dtype: torch.dtype, rank_kind: int | str, num_rows: int) -> None:
    rest = itertools.product(POPULARITIES, BASE_ROWS, SHAPES, ADAPTERS)
    cases: list[Case] = [(dtype, rank_kind, num_rows, *point) for point in rest]
    _check_all(variant, cases)


def test_the_sample_has_every_pair_and_is_small() -> None:
    axes = (DTYPES, RANKS, ROWS, POPULARITIES, BASE_ROWS, SHAPES, ADAPTERS)
    for first, second in itertools.combinations(range(len(axes)), 2):
        met = {(case[first], case[second]) for case in SAMPLE}
        assert met == set(itertools.product(axes[first], axes[second]))
    assert len(SAMPLE) < 80
