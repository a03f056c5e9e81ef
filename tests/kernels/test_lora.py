"""Segmented LoRA against a float64 loop over rows, with everything that must not be read or written poisoned."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pomona.kernels.dispatch import backends_of, use_backend
from pomona.kernels.lora import LoraBatch, LoraRanks, LoraSlices, lora, lora_expand, lora_shrink
from support.tolerances import TOLERANCES, assert_close

NAN = float("nan")
IN_FEATURES = 37
WIDTHS = (24, 8, 13)
ROWS_PER_PAGE = 4


@pytest.fixture(params=backends_of("lora"), autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


@dataclass
class Adapter:
    """Dense truth of one adapter: per slice A [rank, in], B [rank, out], scaling."""

    a: list[Tensor]
    b: list[Tensor]
    scalings: list[float]
    pages: list[int]


@dataclass
class Case:
    x: Tensor
    slices: LoraSlices
    ranks: LoraRanks
    batch: LoraBatch
    adapters: list[Adapter]
    adapter_of_row: list[int | None]

    def expected(self, out: Tensor) -> Tensor:
        """The contract's formula, row by row."""
        result = out.double().clone()
        for row, index in enumerate(self.adapter_of_row):
            if index is None:
                continue
            adapter, column = self.adapters[index], 0
            for a, b, scaling in zip(adapter.a, adapter.b, adapter.scalings, strict=True):
                shrunk = a.double() @ self.x[row].double()
                result[row, column : column + b.shape[1]] += scaling * (shrunk @ b.double())
                column += b.shape[1]
        return result


def _adapter_of_row(num_rows: int, popularity: str, base_rows: str, rng: random.Random) -> list[int | None]:
    """Which adapter each row uses, in runs; the last run of "skewed" returns to the first adapter."""
    if base_rows == "all":
        return [None] * num_rows
    number = {
        "identical": lambda row: 0,
        "distinct": lambda row: row,
        "uniform": lambda row: rng.randrange(6),
        "zipf": lambda row: min(int(rng.paretovariate(0.5)), 20) - 1,
        "skewed": lambda row: 0 if row != num_rows // 2 else 1,
    }[popularity]
    rows: list[int | None] = [number(row) for row in range(num_rows)]
    if popularity in ("uniform", "zipf"):
        rows.sort()
    if base_rows == "some":
        rows = [None if row % 3 == 1 or row == num_rows - 1 else index for row, index in enumerate(rows)]
    return rows


def _make_adapter(rank_kind: int | str, free_pages: list[int], dtype: torch.dtype, rng: random.Random) -> Adapter:
    if rank_kind == "mixed":
        ranks = [rng.choice([0, 1, 3, 4, 8, 16, 64]) for _ in WIDTHS]
    else:
        ranks = [rank_kind] * len(WIDTHS)
    num_pages = -(-max(ranks) // ROWS_PER_PAGE)
    pages = [free_pages.pop() for _ in range(num_pages)]
    if rng.random() < 0.5:
        pages.sort()
    return Adapter(
        a=[(torch.randn(r, IN_FEATURES) / IN_FEATURES**0.5).to(dtype) for r in ranks],
        b=[(torch.randn(r, width) / max(r, 1) ** 0.5).to(dtype) for r, width in zip(ranks, WIDTHS, strict=True)],
        scalings=[rng.choice([0.25, 1.0, 2.0, -1.5]) for _ in ranks],
        pages=pages,
    )


def _fill_pool(adapters: list[Adapter], num_pages: int, dtype: torch.dtype) -> LoraSlices:
    """A NaN pool with gaps between slices and between pages, and the adapters' rank rows in it."""
    page_elems = ROWS_PER_PAGE * (len(WIDTHS) * IN_FEATURES + sum(WIDTHS)) + 11
    pool = torch.full((num_pages, page_elems), NAN, dtype=dtype)
    views: list[list[Tensor]] = [[], []]
    offset = 3
    for width in WIDTHS:
        for side, features in enumerate((IN_FEATURES, width)):
            shape = (num_pages, ROWS_PER_PAGE, features)
            views[side].append(pool.as_strided(shape, (page_elems, features, 1), offset))
            offset += ROWS_PER_PAGE * features
    for adapter in adapters:
        for side, matrices in enumerate((adapter.a, adapter.b)):
            for view, matrix in zip(views[side], matrices, strict=True):
                for row, values in enumerate(matrix):
                    view[adapter.pages[row // ROWS_PER_PAGE], row % ROWS_PER_PAGE] = values
    return LoraSlices(a=tuple(views[0]), b=tuple(views[1]))


def make_case(
    *,
    dtype: torch.dtype = torch.float32,
    rank_kind: int | str = 8,
    num_rows: int = 7,
    popularity: str = "uniform",
    base_rows: str = "some",
) -> Case:
    rng = random.Random(f"{rank_kind} {num_rows} {popularity} {base_rows}")
    adapter_of_row = _adapter_of_row(num_rows, popularity, base_rows, rng)
    num_adapters = max((index + 1 for index in adapter_of_row if index is not None), default=0)
    num_pages = 17 * num_adapters + 3
    # Page 0 stays poisoned: it is what the padding of page tables points at. Neighbours make runs of adjacent pages.
    free_pages = list(range(num_pages - 1, 0, -1))
    adapters = []
    for _ in range(num_adapters):
        if rng.random() < 0.5:
            rng.shuffle(free_pages)
        adapters.append(_make_adapter(rank_kind, free_pages, dtype, rng))
    segments: list[tuple[int, int, int]] = []
    for row, index in enumerate(adapter_of_row):
        if index is None:
            continue
        if segments and segments[-1][2] == index and segments[-1][1] == row:
            segments[-1] = (segments[-1][0], row + 1, index)
        else:
            segments.append((row, row + 1, index))
    used = [adapters[index] for _, _, index in segments]
    tables = torch.zeros(len(segments), max((len(adapter.pages) for adapter in used), default=0) + 1, dtype=torch.int32)
    for row, adapter in enumerate(used):
        tables[row, : len(adapter.pages)] = torch.tensor(adapter.pages)
    host_ranks = tuple(tuple(adapter.a[i].shape[0] for adapter in used) for i in range(len(WIDTHS)))
    host_scalings = tuple(tuple(adapter.scalings[i] for adapter in used) for i in range(len(WIDTHS)))
    batch = LoraBatch(
        starts=torch.tensor([start for start, _, _ in segments], dtype=torch.int32),
        ends=torch.tensor([end for _, end, _ in segments], dtype=torch.int32),
        page_tables=tables,
        host_rows=tuple((start, end) for start, end, _ in segments),
        host_pages=tuple(tuple(adapter.pages) for adapter in used),
        max_rank=max((max(of_slice, default=0) for of_slice in host_ranks), default=0),
    )
    ranks = LoraRanks(
        ranks=torch.tensor(host_ranks, dtype=torch.int32),
        scalings=torch.tensor(host_scalings, dtype=torch.float32),
        host_ranks=host_ranks,
        host_scalings=host_scalings,
    )
    x = torch.randn(num_rows, IN_FEATURES).to(dtype)
    # Rows without an adapter must not even be read.
    x[[row for row, index in enumerate(adapter_of_row) if index is None]] = NAN
    return Case(x, _fill_pool(adapters, num_pages, dtype), ranks, batch, adapters, adapter_of_row)


def _guarded_out(num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(whole buffer, the part that is ``out``): rows before and after and columns behind are guards."""
    whole = torch.randn(num_rows + 2, sum(WIDTHS) + 5).to(dtype)
    return whole, whole[1 : num_rows + 1, : sum(WIDTHS)]


@pytest.mark.parametrize(
    "num_rows, popularity",
    [
        (1, "identical"),
        (2, "distinct"),
        (7, "uniform"),
        (16, "zipf"),
        (16, "distinct"),
        (133, "skewed"),
        (133, "uniform"),
    ],
)
@pytest.mark.parametrize("base_rows", ["none", "some", "all"])
@pytest.mark.parametrize("rank_kind", [1, 4, 8, 16, 64, "mixed"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_each_row_gets_its_own_adapter_at_its_own_rank_and_nothing_else_changes(
    dtype: torch.dtype, rank_kind: int | str, base_rows: str, num_rows: int, popularity: str
) -> None:
    case = make_case(dtype=dtype, rank_kind=rank_kind, num_rows=num_rows, popularity=popularity, base_rows=base_rows)
    whole, out = _guarded_out(num_rows, dtype)
    before, expected = whole.clone(), case.expected(out)
    lora(out, case.x, case.slices, case.ranks, case.batch)
    assert_close(out, expected)
    untouched = torch.ones_like(whole, dtype=torch.bool)
    for row, index in enumerate(case.adapter_of_row):
        column = 0
        for i, width in enumerate(WIDTHS):
            is_adapted = index is not None and case.adapters[index].a[i].shape[0] > 0
            untouched[row + 1, column : column + width] = not is_adapted
            column += width
    assert torch.equal(whole[untouched], before[untouched])


def test_expand_reads_no_unspecified_entry_of_the_intermediate() -> None:
    case = make_case(rank_kind="mixed", num_rows=16, popularity="distinct")
    v = lora_shrink(case.x, case.slices, case.ranks, case.batch)
    assert v.dtype == torch.float32
    assert v.shape == (3, 16, case.batch.max_rank)
    for i, of_slice in enumerate(case.ranks.host_ranks):
        specified = torch.zeros_like(v[i], dtype=torch.bool)
        for (start, end), lora_rank in zip(case.batch.host_rows, of_slice, strict=True):
            specified[start:end, :lora_rank] = True
        v[i][~specified] = NAN
    out = torch.randn(16, sum(WIDTHS))
    expected = case.expected(out)
    lora_expand(v, case.slices, case.ranks, case.batch, out)
    assert_close(out, expected)


def test_pages_are_followed_one_by_one_even_if_the_first_and_last_look_adjacent() -> None:
    case = make_case(rank_kind=12, num_rows=1, popularity="identical", base_rows="none")
    adapter = case.adapters[0]
    adapter.pages = [5, 9, 7]
    slices = _fill_pool(case.adapters, 12, torch.float32)
    tables = torch.tensor([[5, 9, 7, 0]], dtype=torch.int32)
    out = torch.randn(1, sum(WIDTHS))
    expected = case.expected(out)
    lora(out, case.x, slices, case.ranks, replace(case.batch, host_pages=((5, 9, 7),), page_tables=tables))
    assert_close(out, expected)


def test_sums_are_not_rounded_to_half_precision_before_the_end() -> None:
    """v is (1, 2**-9): bfloat16 holds both, but neither 1 + 2**-9, of which the second's sum and the last one start."""
    case = make_case(dtype=torch.bfloat16, rank_kind=2, num_rows=1, popularity="identical", base_rows="none")
    case.x.fill_(0)
    case.x[0, :3] = torch.tensor([1.0, 2.0**-9, -1.0])
    for a, b in zip(case.slices.a, case.slices.b, strict=True):
        page = case.batch.host_pages[0][0]
        a[page, :2, :3] = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
        b[page, :2] = 1.0
    ones = tuple(tuple(1.0 for _ in of_slice) for of_slice in case.ranks.host_scalings)
    ranks = LoraRanks(case.ranks.ranks, torch.ones_like(case.ranks.scalings), case.ranks.host_ranks, ones)
    out = -torch.ones(1, sum(WIDTHS), dtype=torch.bfloat16)
    lora(out, case.x, case.slices, ranks, case.batch)
    assert torch.equal(out, torch.full_like(out, 2.0**-9))
