"""Random inputs of the kernels' public ops, of any size, for comparing one backend or batch with another."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.kernels.attention import AttentionBatch, paged_attention
from pomona.kernels.lora import LoraBatch, LoraRanks, LoraSlices, lora

NAN = float("nan")


@dataclass(frozen=True)
class Segment:
    """A run of rows of one adapter."""

    start: int
    end: int
    adapter: int


@dataclass(frozen=True)
class Adapters:
    """A pool of adapters with their pages; everything that no adapter owns is NaN."""

    slices: LoraSlices
    ranks: tuple[tuple[int, ...], ...]
    """[adapter][slice]."""
    scalings: tuple[tuple[float, ...], ...]
    pages: tuple[tuple[int, ...], ...]

    def batch(self, segments: Sequence[Segment]) -> tuple[LoraBatch, LoraRanks]:
        """The inputs of a step of these segments."""
        pages = tuple(self.pages[segment.adapter] for segment in segments)
        tables = torch.zeros(len(segments), max((len(row) for row in pages), default=0) + 1, dtype=torch.int32)
        for row, ids in enumerate(pages):
            tables[row, : len(ids)] = torch.tensor(ids)
        num_slices = len(self.slices.a)
        ranks = tuple(tuple(self.ranks[segment.adapter][i] for segment in segments) for i in range(num_slices))
        scalings = tuple(tuple(self.scalings[segment.adapter][i] for segment in segments) for i in range(num_slices))
        batch = LoraBatch(
            starts=torch.tensor([segment.start for segment in segments], dtype=torch.int32),
            ends=torch.tensor([segment.end for segment in segments], dtype=torch.int32),
            page_tables=tables,
            host_rows=tuple((segment.start, segment.end) for segment in segments),
            host_pages=pages,
            max_rank=max((max(row, default=0) for row in ranks), default=0),
        )
        return batch, LoraRanks(
            ranks=torch.tensor(ranks, dtype=torch.int32),
            scalings=torch.tensor(scalings, dtype=torch.float32),
            host_ranks=ranks,
            host_scalings=scalings,
        )

    def expected(self, x: Tensor, out: Tensor, segments: Sequence[Segment]) -> Tensor:
        """The contract's formula in float64, segment by segment, page by page."""
        return self._add(lambda v, b: v @ b, x, out.double(), segments)

    def rounding(self, x: Tensor, out: Tensor, segments: Sequence[Segment]) -> Tensor:
        """How much ``expected`` may move, elementwise, when the shrunk inputs are rounded to x's dtype."""
        unit = torch.finfo(x.dtype).eps / 2
        moved = self._add(
            lambda v, b: unit * v.abs() @ b.abs(), x, torch.zeros(out.shape, dtype=torch.float64), segments
        )
        return moved.abs()

    def _add(
        self, expand: Callable[[Tensor, Tensor], Tensor], x: Tensor, result: Tensor, segments: Sequence[Segment]
    ) -> Tensor:
        for segment in segments:
            rows, pages, column = slice(segment.start, segment.end), list(self.pages[segment.adapter]), 0
            for i, (a, b) in enumerate(zip(self.slices.a, self.slices.b, strict=True)):
                lora_rank, width = self.ranks[segment.adapter][i], b.shape[2]
                dense_a, dense_b = (part[pages].flatten(0, 1)[:lora_rank].double() for part in (a, b))
                added = expand(x[rows].double() @ dense_a.T, dense_b)
                result[rows, column : column + width] += self.scalings[segment.adapter][i] * added
                column += width
        return result

    def apply(self, x: Tensor, out: Tensor, segments: Sequence[Segment]) -> Tensor:
        """``out`` after the adapters' part has been added to a copy of it."""
        batch, ranks = self.batch(segments)
        result = out.clone()
        lora(result, x, self.slices, ranks, batch)
        return result


def make_adapters(
    ranks: Sequence[Sequence[int]],
    *,
    in_features: int,
    widths: Sequence[int],
    rows_per_page: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Adapters:
    """Adapters of the given ranks, [adapter][slice], on shuffled pages of a poisoned pool."""
    rng = random.Random(str(ranks))
    num_pages_of = [-(-max(of_adapter) // rows_per_page) for of_adapter in ranks]
    free = list(range(1, sum(num_pages_of) + 3))  # page 0, where padding points, stays poisoned
    rng.shuffle(free)
    page_elems = rows_per_page * (len(widths) * in_features + sum(widths)) + 5
    pool = torch.full((len(free) + 1, page_elems), NAN, dtype=dtype)
    a: list[Tensor] = []
    b: list[Tensor] = []
    offset = 2
    for width in widths:
        for views, features in ((a, in_features), (b, width)):
            shape = (pool.shape[0], rows_per_page, features)
            views.append(pool.as_strided(shape, (page_elems, features, 1), offset))
            offset += rows_per_page * features
    pages = []
    for of_adapter, count in zip(ranks, num_pages_of, strict=True):
        pages.append(tuple(free.pop() for _ in range(count)))
        for views, spread in ((a, in_features), (b, max(of_adapter))):
            for view, lora_rank in zip(views, of_adapter, strict=True):
                values = (torch.randn(lora_rank, view.shape[2]) / max(spread, 1) ** 0.5).to(dtype)
                for page, part in zip(pages[-1], torch.split(values, rows_per_page), strict=False):
                    view[page, : part.shape[0]] = part
    scalings = tuple(tuple(rng.choice([0.25, 1.0, 2.0, -1.5]) for _ in widths) for _ in ranks)
    return Adapters(LoraSlices(tuple(a), tuple(b)), tuple(map(tuple, ranks)), scalings, tuple(pages))


def make_segments(num_rows: int, num_adapters: int, popularity: str, base_rows: str) -> list[Segment]:
    """Runs of rows: "identical", "distinct", "uniform", "zipf" or "skewed"; base rows "none", "some" or "all"."""
    rng = random.Random(f"{num_rows} {num_adapters} {popularity} {base_rows}")
    if base_rows == "all":
        return []
    draws: dict[str, Callable[[int], int]] = {
        "identical": lambda row: 0,
        "distinct": lambda row: row % num_adapters,
        "uniform": lambda row: rng.randrange(num_adapters),
        "zipf": lambda row: min(int(rng.paretovariate(0.5)), num_adapters) - 1,
        "skewed": lambda row: 1 % num_adapters if row == num_rows // 2 else 0,
    }
    draw = draws[popularity]
    rows = [draw(row) for row in range(num_rows)]
    if popularity in ("uniform", "zipf"):
        rows.sort()
    is_base = [base_rows == "some" and (row % 5 == 2 or row == num_rows - 1) for row in range(num_rows)]
    segments: list[Segment] = []
    for row, adapter in enumerate(rows):
        if is_base[row]:
            continue
        if segments and segments[-1].end == row and segments[-1].adapter == adapter:
            segments[-1] = Segment(segments[-1].start, row + 1, adapter)
        else:
            segments.append(Segment(row, row + 1, adapter))
    return segments


@dataclass(frozen=True)
class Contexts:
    """The keys, values and queries of whole sequences, in a paged cache whose unused part is NaN."""

    queries: tuple[Tensor, ...]
    """Per sequence [num_tokens, num_heads, head_dim]."""
    key_cache: Tensor
    value_cache: Tensor
    tables: Tensor

    def batch(self, rows: Sequence[tuple[int, int, int]]) -> tuple[AttentionBatch, Tensor]:
        """The inputs of a step of rows ``(sequence, first position, end position)``, and its queries."""
        query_lens = tuple(end - first for _, first, end in rows)
        starts = [sum(query_lens[:i]) for i in range(len(rows) + 1)]
        batch = AttentionBatch(
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor([end for _, _, end in rows], dtype=torch.int32),
            block_tables=self.tables[[sequence for sequence, _, _ in rows]],
            slot_mapping=torch.zeros(starts[-1], dtype=torch.int64),
            host_query_lens=query_lens,
            host_context_lens=tuple(end for _, _, end in rows),
        )
        return batch, torch.cat([self.queries[sequence][first:end] for sequence, first, end in rows])

    def attend(self, rows: Sequence[tuple[int, int, int]], window: int | None = None) -> list[Tensor]:
        """Attention of rows ``(sequence, first position, end position)``, all in one batch; one result per entry."""
        batch, query = self.batch(rows)
        scale = query.shape[2] ** -0.5
        attended = paged_attention(query, self.key_cache, self.value_cache, batch, scale=scale, sliding_window=window)
        return list(torch.split(attended, list(batch.host_query_lens)))


def make_contexts(
    lengths: Sequence[int],
    *,
    heads: tuple[int, int, int] = (6, 2, 16),
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Contexts:
    """Sequences of the given lengths on shuffled blocks; ``heads`` is (query heads, kv heads, head_dim)."""
    num_heads, num_kv_heads, head_dim = heads
    counts = [-(-length // block_size) for length in lengths]
    shape = (sum(counts) + 2, block_size, num_kv_heads, head_dim)
    key_cache, value_cache = torch.full(shape, NAN, dtype=dtype), torch.full(shape, NAN, dtype=dtype)
    free = (torch.randperm(shape[0] - 1) + 1).int()
    tables = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    queries, used = [], 0
    for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[sequence, :count] = free[used : used + count]
        used += count
        positions = torch.arange(length)
        blocks, offsets = tables[sequence, positions // block_size].long(), positions % block_size
        key_cache[blocks, offsets] = (2 * torch.randn(length, num_kv_heads, head_dim)).to(dtype)
        value_cache[blocks, offsets] = torch.randn(length, num_kv_heads, head_dim).to(dtype)
        queries.append(torch.randn(length, num_heads, head_dim).to(dtype))
    return Contexts(tuple(queries), key_cache, value_cache, tables)
