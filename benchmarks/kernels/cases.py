"""What bench_ops measures: each op at the shapes of one decoder layer, over as many layers as a model has.

Weights and caches of all layers are distinct, so that they come from memory as in a real step and not from a cache; and
they lie on huge pages, as a real engine's do.
Bytes and FLOPs are what the op must move and compute, from the formulas, not what a backend happens to do.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.shapes import ModelShape
from pomona.kernels.activation import silu_mul
from pomona.kernels.attention import AttentionBatch, paged_attention, write_kv
from pomona.kernels.host_memory import new_on_huge_pages
from pomona.kernels.linear import pack, packed_linear
from pomona.kernels.lora import LoraBatch, LoraRanks, LoraSlices, adapted_linear, lora
from pomona.kernels.norm import add_rms_norm
from pomona.kernels.rope import apply_rope
from pomona.model.lora import PageLayout
from pomona.model.spec import ModelSpec, RopeSpec, Site, Target

BLOCK_SIZE = 16
ROWS_PER_PAGE = 4
_MOST_WEIGHT_BYTES = 1 << 30


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str
    name: str
    run: Callable[[], None]
    """All ``num_calls`` calls."""
    num_calls: int
    num_bytes: int
    """Per call."""
    flops: int
    """Per call."""
    before: Callable[[], None] | None = None
    """Weights read straight from memory instead: what a backend without preparation would call. Linear only."""


def make_spec(shape: ModelShape) -> ModelSpec:
    """A shape's dimensions as the model's code takes them."""
    return ModelSpec(
        architecture=shape.architecture,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        rms_norm_eps=shape.rms_norm_eps,
        rope=RopeSpec(),
        is_tied=shape.is_tied,
        sliding_windows=(None,) * shape.num_layers,
    )


def linear_cases(spec: ModelSpec, dtype: torch.dtype, rows: tuple[int, ...]) -> Iterator[Case]:
    """The four products of a layer, and the language model head."""
    sites = {site.name.lower(): [spec.target_shape(target) for target in site.value] for site in Site}
    shapes = {name: (parts[0][0], sum(part[1] for part in parts)) for name, parts in sites.items()}
    shapes["lm_head"] = (spec.hidden_size, spec.vocab_size)
    for name, (in_features, out_features) in shapes.items():
        copies = 2 if name == "lm_head" else min(spec.num_layers, -(-(96 << 20) // (in_features * out_features * 2)))
        weights = [torch.randn(out_features, in_features).to(dtype) for _ in range(copies)]
        packed = [pack(weight) for weight in weights]
        for num_rows in rows:
            if name == "lm_head" and num_rows > 64:
                continue
            x = torch.randn(num_rows, in_features).to(dtype)
            used = copies if num_rows <= 64 else 2

            def run(x: Tensor = x, used: int = used, packed: list[object] = packed) -> None:
                for weight in packed[:used]:
                    packed_linear(x, weight)

            def plain(x: Tensor = x, used: int = used, weights: list[Tensor] = weights) -> None:
                for weight in weights[:used]:
                    torch.nn.functional.linear(x, weight)

            moved = in_features * out_features + num_rows * (in_features + out_features)
            flops = 2 * num_rows * in_features * out_features
            label = f"{name} {in_features}x{out_features} rows={num_rows}"
            yield Case("linear", label, run, used, moved * dtype.itemsize, flops, plain)


@dataclass(frozen=True)
class _LoraStep:
    """One step's segments and inputs, and the adapters' pages of all layers."""

    label: str
    batch: LoraBatch
    ranks: dict[Site, LoraRanks]
    slices: dict[tuple[int, Site], LoraSlices]
    x: dict[Site, Tensor]
    adapter_elems: int
    """Of a layer."""
    flops: int
    """Of a layer's adapters."""


def _lora_steps(
    spec: ModelSpec, dtype: torch.dtype, segments: dict[str, list[int]], ranks: list[int]
) -> Iterator[_LoraStep]:
    layout = PageLayout(spec, ROWS_PER_PAGE)
    num_pages = [-(-lora_rank // ROWS_PER_PAGE) for lora_rank in ranks]
    pool = new_on_huge_pages((sum(num_pages), layout.page_elems), dtype).uniform_(-0.05, 0.05)
    order = torch.randperm(sum(num_pages), generator=torch.Generator().manual_seed(0)).int()
    pages = [tuple(part.tolist()) for part in order.split(num_pages)]
    slices = {(layer, site): layout.slices(pool, layer, site) for layer in range(spec.num_layers) for site in Site}
    elems = sum(sum(spec.target_shape(target)) for target in Target)
    for name, runs in segments.items():
        ends = [sum(runs[: i + 1]) for i in range(len(runs))]
        bounds = [(end - run, end) for run, end in zip(runs, ends, strict=True)]
        used = ranks[: len(runs)]
        tables = torch.zeros(len(runs), max(num_pages[: len(runs)]), dtype=torch.int32)
        for table, of_adapter in zip(tables, pages, strict=False):
            table[: len(of_adapter)] = torch.tensor(of_adapter)
        batch = LoraBatch(
            starts=torch.tensor([start for start, _ in bounds], dtype=torch.int32),
            ends=torch.tensor(ends, dtype=torch.int32),
            page_tables=tables,
            host_rows=tuple(bounds),
            host_pages=tuple(pages[: len(runs)]),
            max_rank=max(used),
        )
        yield _LoraStep(
            label=f"{name}, rank {ranks_text(used)}",
            batch=batch,
            ranks={site: _same_in_all_slices(len(site.value), used) for site in Site},
            slices=slices,
            x={site: torch.randn(sum(runs), spec.target_shape(site.value[0])[0]).to(dtype) for site in Site},
            adapter_elems=sum(used) * elems,
            flops=2 * sum(lora_rank * rows for lora_rank, rows in zip(used, runs, strict=True)) * elems,
        )


def _out_features(spec: ModelSpec, site: Site) -> int:
    return sum(spec.target_shape(target)[1] for target in site.value)


def lora_cases(spec: ModelSpec, dtype: torch.dtype, segments: dict[str, list[int]], ranks: list[int]) -> Iterator[Case]:
    """All four sites of every layer.

    Args:
        spec: the model.
        dtype: of everything.
        segments: name -> rows of each adapter's run.
        ranks: of each adapter, at least as many as there are runs.
    """
    for step in _lora_steps(spec, dtype, segments, ranks):
        out = {site: torch.zeros(len(x), _out_features(spec, site), dtype=dtype) for site, x in step.x.items()}

        def run(step: _LoraStep = step, out: dict[Site, Tensor] = out) -> None:
            for (_, site), weights in step.slices.items():
                lora(out[site], step.x[site], weights, step.ranks[site], step.batch)

        activations = sum(step.x[site].numel() + 2 * out[site].numel() for site in Site)
        moved = (step.adapter_elems + activations) * dtype.itemsize
        yield Case("lora", f"layer of 4 sites, {step.label}", run, spec.num_layers, moved, step.flops)


def adapted_cases(
    spec: ModelSpec, dtype: torch.dtype, segments: dict[str, list[int]], ranks: list[int]
) -> Iterator[Case]:
    """The four products of every layer with their adapters, in the order of a step, and without any first.

    Args:
        spec: the model; of a large one, as many layers as have weights of a gigabyte.
        dtype: of everything.
        segments: name -> rows of each adapter's run.
        ranks: of each adapter, at least as many as there are runs.
    """
    shapes = {site: (spec.target_shape(site.value[0])[0], _out_features(spec, site)) for site in Site}
    weight_elems = sum(in_features * out_features for in_features, out_features in shapes.values())
    num_layers = max(1, min(spec.num_layers, _MOST_WEIGHT_BYTES // (weight_elems * dtype.itemsize)))
    spec = replace(spec, num_layers=num_layers, sliding_windows=spec.sliding_windows[:num_layers])
    packed = {
        (layer, site): pack(torch.randn(out_features, in_features).to(dtype))
        for layer in range(num_layers)
        for site, (in_features, out_features) in shapes.items()
    }
    num_bases: set[int] = set()
    for step in _lora_steps(spec, dtype, segments, ranks):
        num_rows = len(step.x[Site.QKV])

        def base(step: _LoraStep = step) -> None:
            for (_, site), weight in packed.items():
                packed_linear(step.x[site], weight)

        def run(step: _LoraStep = step) -> None:
            for at, weight in packed.items():
                site = at[1]
                adapted_linear(step.x[site], weight, None, step.slices[at], step.ranks[site], step.batch)

        moved = (weight_elems + num_rows * sum(sum(shape) for shape in shapes.values())) * dtype.itemsize
        flops = 2 * num_rows * weight_elems
        if num_rows not in num_bases:
            num_bases.add(num_rows)
            yield Case("adapted", f"layer of 4 products, {num_rows} rows, no adapter", base, num_layers, moved, flops)
        moved += step.adapter_elems * dtype.itemsize
        yield Case("adapted", f"layer of 4 products, {step.label}", run, num_layers, moved, flops + step.flops)


def ranks_text(ranks: list[int]) -> str:
    """Such as "16", or "128 beside 31 of 4"."""
    first, others = ranks[0], ranks[1:]
    return str(first) if set(others) <= {first} else f"{first} beside {len(others)} of {others[0]}"


def _same_in_all_slices(num_slices: int, ranks: list[int]) -> LoraRanks:
    return LoraRanks(
        ranks=torch.tensor([ranks] * num_slices, dtype=torch.int32),
        scalings=torch.ones(num_slices, len(ranks)),
        host_ranks=(tuple(ranks),) * num_slices,
        host_scalings=((1.0,) * len(ranks),) * num_slices,
    )


def attention_cases(spec: ModelSpec, dtype: torch.dtype, mixes: dict[str, list[tuple[int, int]]]) -> Iterator[Case]:
    """Attention of every layer. ``mixes`` maps a name to (rows, context length) of each sequence."""
    for name, seqs in mixes.items():
        blocks_of = [-(-context // BLOCK_SIZE) for _, context in seqs]
        num_blocks = sum(blocks_of)
        shape = (spec.num_layers, 2, num_blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)
        caches = new_on_huge_pages(shape, dtype).uniform_(-1, 1)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).int()
        tables = torch.zeros(len(seqs), max(blocks_of), dtype=torch.int32)
        slots, used = [], 0
        for seq, (rows, context) in enumerate(seqs):
            tables[seq, : blocks_of[seq]] = order[used : used + blocks_of[seq]]
            used += blocks_of[seq]
            positions = torch.arange(context - rows, context)
            slots.append(tables[seq, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE)
        query_lens = [rows for rows, _ in seqs]
        batch = AttentionBatch(
            query_starts=torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32),
            context_lens=torch.tensor([context for _, context in seqs], dtype=torch.int32),
            block_tables=tables,
            slot_mapping=torch.cat(slots),
            host_query_lens=tuple(query_lens),
            host_context_lens=tuple(context for _, context in seqs),
        )
        query = torch.randn(sum(query_lens), spec.num_heads, spec.head_dim).to(dtype)

        def run(batch: AttentionBatch = batch, query: Tensor = query, caches: Tensor = caches) -> None:
            for layer in caches:
                paged_attention(query, layer[0], layer[1], batch, scale=0.125)

        pairs = sum(rows * context - rows * (rows - 1) // 2 for rows, context in seqs)
        contexts = sum(context for _, context in seqs)
        moved = (2 * contexts * spec.kv_size + 2 * query.numel()) * dtype.itemsize
        yield Case("attention", name, run, spec.num_layers, moved, 4 * pairs * spec.q_size)


def row_cases(spec: ModelSpec, dtype: torch.dtype, rows: tuple[int, ...]) -> Iterator[Case]:
    """The element-wise ops of a layer. Their inputs were just written, so the floor counts no bytes from memory."""
    for num_rows in rows:
        x, residual = (torch.randn(num_rows, spec.hidden_size).to(dtype) for _ in range(2))
        weight = torch.ones(spec.hidden_size, dtype=dtype)
        gate_up = torch.randn(num_rows, 2 * spec.intermediate_size).to(dtype)
        heads = torch.randn(num_rows, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim).to(dtype)
        query, key, value = heads.split([spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        positions = torch.arange(num_rows) % 512
        cos_sin = torch.rand(512, spec.head_dim)
        cache = torch.zeros(2, -(-num_rows // BLOCK_SIZE), BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, dtype=dtype)
        slots = torch.randperm(cache.shape[1] * BLOCK_SIZE)[:num_rows]
        ops: dict[str, Callable[[], object]] = {
            "add_rms_norm": lambda x=x, r=residual, w=weight: add_rms_norm(x, r, w, 1e-5),
            "silu_mul": lambda g=gate_up: silu_mul(g),
            "apply_rope": lambda q=query, k=key, p=positions, c=cos_sin: apply_rope(q, k, p, c),
            "write_kv": lambda k=key, v=value, c=cache, s=slots: write_kv(k, v, c[0], c[1], s),
        }
        for name, op in ops.items():

            def run(op: Callable[[], object] = op) -> None:
                for _ in range(20):
                    op()

            yield Case(name, f"rows={num_rows}", run, 20, 0, 0)
