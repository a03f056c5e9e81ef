"""Finds tile sizes for the Triton kernels on the GPU at hand and writes them into the package's configs.json.

    python benchmarks/kernels/tune_triton.py --dry-run         # what would be tried; needs no GPU
    python benchmarks/kernels/tune_triton.py --ops attention   # minutes to an hour, on an idle GPU

For every shape class each candidate is timed at the class's first shape, and the best of them at all its shapes; the
one with the least mean ratio to the configuration in use wins. Candidates that spill registers, ask for too much shared
memory or give other results than the configuration in use are left out. Times are of CUDA graphs that go over many
copies of the inputs, more than the L2 cache holds, as the layers of a model do: neither launches nor the cache count.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pomona.kernels.attention import AttentionBatch
from pomona.kernels.lora import LoraBatch, LoraRanks, LoraSlices
from pomona.kernels.triton.attention import attention_launches
from pomona.kernels.triton.configs import BOUNDS, DEFAULT, PATH, Config, config_for, gpu_name, parse_table, use_configs
from pomona.kernels.triton.launch import Launch
from pomona.kernels.triton.lora import plan_launches

DTYPE = torch.bfloat16
ROWS_PER_PAGE = 4
BLOCK_SIZE = 16
BYTES_TO_GO_OVER = 256 << 20
REPEATS = 20
FINALISTS = 8
TOLERANCE = 2e-2

SITES = {"qkv 4096": (4096, (4096, 1024, 1024)), "gate_up 4096": (4096, (11008, 11008)), "down": (11008, (4096,))}
"""name -> (in_features, widths)."""
HEADS = ((32, 8, 128), (14, 2, 64))
"""(num_heads, num_kv_heads, head_dim)."""


@dataclass(frozen=True)
class Problem:
    """One representative shape: makes the launches of one copy of its inputs, and what reads their result."""

    name: str
    build: Callable[[torch.device], tuple[list[Launch], Callable[[], Tensor]]]
    num_bytes: int
    """Moved by one copy, roughly: decides how many copies there are."""


@dataclass(frozen=True)
class Class:
    """A shape class of one op, or of ops that are tuned together."""

    up_to: dict[str, int]
    shape: dict[str, int]
    """A shape inside the class, by which the configuration in use is looked up."""
    candidates: tuple[dict[str, Config], ...]
    """op -> configuration."""
    problems: tuple[Problem, ...]


def _grid(**choices: tuple[int, ...]) -> list[Config]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _segments(num_rows: int, popularity: str) -> list[int]:
    if popularity == "identical":
        return [num_rows]
    if popularity == "distinct":
        return [1] * min(num_rows, 256)
    count = math.isqrt(num_rows - 1) + 1
    return [num_rows * (i + 1) // count - num_rows * i // count for i in range(count)]


def lora_problem(site: str, lora_rank: int, num_rows: int, popularity: str, half: int) -> Problem:
    """One half (0 shrink, 1 expand) of a site at one mix of adapters."""
    in_features, widths = SITES[site]
    lengths = _segments(num_rows, popularity)
    num_pages = -(-lora_rank // ROWS_PER_PAGE)
    moved = len(lengths) * lora_rank * (in_features * len(widths) if half == 0 else sum(widths))
    moved += sum(lengths) * (in_features if half == 0 else 2 * sum(widths))

    def build(device: torch.device) -> tuple[list[Launch], Callable[[], Tensor]]:
        total_pages = len(lengths) * num_pages

        def pages(features: int) -> Tensor:
            return torch.randn(total_pages, ROWS_PER_PAGE, features, dtype=DTYPE, device=device) / features**0.5

        ends = list(itertools.accumulate(lengths))
        rows = tuple((end - length, end) for end, length in zip(ends, lengths, strict=True))
        tables = torch.arange(total_pages, dtype=torch.int32).view(len(lengths), num_pages)
        batch = LoraBatch(
            starts=torch.tensor([start for start, _ in rows], dtype=torch.int32, device=device),
            ends=torch.tensor(ends, dtype=torch.int32, device=device),
            page_tables=tables.to(device),
            host_rows=rows,
            host_pages=tuple(map(tuple, tables.tolist())),
            max_rank=lora_rank,
        )
        shape = (len(widths), len(lengths))
        ranks = LoraRanks(
            ranks=torch.full(shape, lora_rank, dtype=torch.int32, device=device),
            scalings=torch.ones(shape, device=device),
            host_ranks=((lora_rank,) * len(lengths),) * len(widths),
            host_scalings=((1.0,) * len(lengths),) * len(widths),
        )
        slices = LoraSlices(a=tuple(pages(in_features) for _ in widths), b=tuple(map(pages, widths)))
        x = torch.randn(ends[-1], in_features, dtype=DTYPE, device=device)
        out = torch.zeros(ends[-1], sum(widths), dtype=DTYPE, device=device)
        launches = plan_launches(out, x, slices, ranks, batch)
        if half == 1 and device.type == "cuda":
            launches[0].run()  # what expand reads
        v = launches[0].args[1]
        return [launches[half]], (lambda: out) if half == 1 else (lambda: v.sum(0)[..., :lora_rank])

    return Problem(f"{site}, rank {lora_rank}, {num_rows} rows {popularity}", build, moved * DTYPE.itemsize)


def attention_problem(heads: tuple[int, int, int], num_seqs: int, query_len: int, context_len: int) -> Problem:
    """Equal sequences, all launches of a layer."""
    num_heads, num_kv_heads, head_dim = heads
    num_blocks = -(-context_len // BLOCK_SIZE)

    def build(device: torch.device) -> tuple[list[Launch], Callable[[], Tensor]]:
        cache_shape = (num_seqs * num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
        caches = tuple(torch.randn(cache_shape, dtype=DTYPE, device=device) for _ in range(2))
        num_tokens = num_seqs * query_len
        tables = torch.randperm(num_seqs * num_blocks).int().view(num_seqs, num_blocks)
        batch = AttentionBatch(
            query_starts=torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * query_len,
            context_lens=torch.full((num_seqs,), context_len, dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            host_query_lens=(query_len,) * num_seqs,
            host_context_lens=(context_len,) * num_seqs,
        )
        query = torch.randn(num_tokens, num_heads, head_dim, dtype=DTYPE, device=device)
        out = torch.empty_like(query)
        scale = head_dim**-0.5
        launches = attention_launches(query, (caches[0], caches[1]), out, batch, scale=scale, sliding_window=None)
        return launches, lambda: out

    moved = 2 * num_seqs * context_len * num_kv_heads * head_dim * DTYPE.itemsize
    return Problem(f"heads {heads}, {num_seqs} x {query_len} of {context_len}", build, moved)


def lora_classes(half: int) -> Iterator[Class]:
    """Rows of a batch, and rank; rows_per_chunk follows from the rows alone and is kept as it is."""
    op = ("lora_shrink", "lora_expand")[half]
    mixes = {
        256: ((32, "distinct"), (1, "identical"), (64, "uniform"), (256, "distinct")),
        1024: ((1024, "uniform"),),
        8192: ((4096, "uniform"), (4096, "identical")),
    }
    stages = (2, 3, 4) if half == 0 else (1, 2)
    common = {"max_block_r": (16, 32, 64), "num_warps": (2, 4, 8), "num_stages": stages}
    for num_tokens, lora_rank in itertools.product(mixes, (16, 64)):
        small = num_tokens <= 256
        grid = (
            _grid(block_k=(64, 128, 256), max_splits=(4, 8, 16) if small else (1, 2, 4), **common)
            if half == 0
            else _grid(block_n=(64, 128, 256), **common)
        )
        last = num_tokens == max(mixes)
        bounds = {"element_bytes": 2} | ({} if last else {"num_tokens": num_tokens})
        yield Class(
            up_to=bounds | ({"max_rank": 16} if lora_rank == 16 else {}),
            shape={
                "num_tokens": mixes[num_tokens][-1][0],
                "in_features": 4096,
                "out_features": 4096,
                "max_rank": lora_rank,
                "element_bytes": 2,
            },
            candidates=tuple({op: config} for config in grid if config["max_block_r"] <= max(16, lora_rank)),
            problems=tuple(
                lora_problem(site, lora_rank, num_rows, popularity, half)
                for site in SITES
                for num_rows, popularity in mixes[num_tokens]
            ),
        )


def attention_classes() -> Iterator[Class]:
    """Decodes, short chunks behind long contexts, prompts; each at two head sizes."""
    kinds = {
        16: ((16,), (256, 512, 1024), ((1, 1, 16384), (16, 1, 4096), (128, 1, 1024))),
        1024: ((32, 64, 128), (2048, 4096, 8192), ((2, 128, 16384), (8, 64, 2048))),
        1 << 20: ((64, 128), (0,), ((1, 4096, 4096), (4, 1024, 2048))),
    }
    for lanes, (block_m, split_tokens, shapes) in kinds.items():
        for heads in sorted(HEADS, key=lambda heads: heads[2]):
            group = heads[0] // heads[1]
            bounds = {"element_bytes": 2} | ({"query_lanes": lanes} if lanes <= 1024 else {})
            grid = _grid(
                block_m=block_m,
                block_n=(32, 64, 128),
                split_tokens=split_tokens,
                num_warps=(2, 4, 8),
                num_stages=(2, 3, 4),
            )
            yield Class(
                up_to=bounds | ({"head_dim": 64} if heads[2] == 64 else {}),
                shape={"query_lanes": min(lanes, shapes[0][1] * group), "head_dim": heads[2], "element_bytes": 2},
                candidates=tuple({"attention": config} for config in grid),
                problems=tuple(attention_problem(heads, *shape) for shape in shapes),
            )


SWEEPS: dict[str, Callable[[], Iterator[Class]]] = {
    "lora_shrink": lambda: lora_classes(0),
    "lora_expand": lambda: lora_classes(1),
    "attention": attention_classes,
}


def fits(launches: list[Launch], num_registers: int = 255) -> bool:
    """True if every kernel compiles, and keeps everything in registers."""
    from triton.runtime.errors import OutOfResources, PTXASError

    for launch in launches:
        try:
            program = launch.compile()
            program._init_handles()
        except (OutOfResources, PTXASError):
            return False
        if program.n_spills or program.n_regs > num_registers:
            return False
    return True


def time_us(problem: Problem, device: torch.device) -> tuple[float, Tensor] | None:
    """(median time of one copy, its result), or None if the configuration cannot be used."""
    copies = [problem.build(device)]
    if not fits(copies[0][0]):
        return None
    num_copies = max(2, min(64, BYTES_TO_GO_OVER // max(problem.num_bytes, 1)))
    copies += [problem.build(device) for _ in range(num_copies - 1)]
    launches = [launch for copy, _ in copies for launch in copy]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches:
            launch.run()
    stream.synchronize()
    result = copies[0][1]().float().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch.run()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / num_copies)
    return statistics.median(times), result


def measure(
    config: dict[str, Config], problems: tuple[Problem, ...], device: torch.device
) -> list[tuple[float, Tensor]] | None:
    """(time, result) per problem, of the same inputs for every configuration; None if it cannot be used."""
    measured = []
    for problem in problems:
        torch.manual_seed(0)
        with use_configs(**config):
            timed = time_us(problem, device)
        if timed is None:
            return None
        measured.append(timed)
    return measured


def ratio_to(usual: list[tuple[float, Tensor]], measured: list[tuple[float, Tensor]] | None) -> float:
    """Mean of new time over old; infinite for what cannot be used or gives other results."""
    if measured is None:
        return math.inf
    for (_, expected), (_, actual) in zip(usual, measured, strict=True):
        if not (actual - expected).norm() <= TOLERANCE * expected.norm():
            return math.inf
    return statistics.fmean(new / old for (old, _), (new, _) in zip(usual, measured, strict=False))


def tune_class(op: str, one: Class, device: torch.device) -> dict[str, object]:
    """The winning entry of a class; prints how it got there."""
    current = config_for(op, device, **{name: one.shape[name] for name in BOUNDS[op]})
    usual = measure({op: current}, one.problems, device)
    assert usual is not None, f"the configuration in use does not work here: {op}, {one.up_to}, {current}"
    ratios = []
    for index, candidate in enumerate(one.candidates):
        ratios.append(ratio_to(usual[:1], measure(candidate, one.problems[:1], device)))
        progress = f"{index + 1}/{len(one.candidates)}, best {min(ratios):.3f}"
        print(f"\r{op} {one.up_to}: {progress}", end="", file=sys.stderr)
    print(file=sys.stderr)
    order = sorted(range(len(ratios)), key=ratios.__getitem__)[:FINALISTS]
    finals = {i: ratio_to(usual, measure(one.candidates[i], one.problems, device)) for i in order if ratios[i] < 1.0}
    best, ratio = min(finals.items(), key=lambda final: final[1], default=(-1, 1.0))
    config = one.candidates[best][op] if ratio < 1.0 else current
    for problem, (time, _) in zip(one.problems, usual, strict=True):
        print(json.dumps({"op": op, "problem": problem.name, "before_us": round(time, 2)}))
    print(
        json.dumps({"op": op, "up_to": one.up_to, "config": dict(config), "ratio": round(min(ratio, 1.0), 4)}),
        flush=True,
    )
    return {"up_to": one.up_to, **config}


def merge_entries(raw: dict[str, Any], gpu: str, op: str, entries: list[dict[str, object]]) -> None:
    """Put a GPU's entries before the default's, which remain for what was not tuned (float32, larger ranks)."""
    raw.setdefault(gpu, {})[op] = [*entries, *raw[DEFAULT][op]]


def dump_table(raw: dict[str, Any]) -> str:
    """JSON with one entry per line."""
    gpus = []
    for gpu, ops in raw.items():
        lines = []
        for op, entries in ops.items():
            rows = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
            lines.append(f"    {json.dumps(op)}: [\n{rows}\n    ]")
        gpus.append(f"  {json.dumps(gpu)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(gpus) + "\n}\n"


def dry_run(ops: list[str], raw: dict[str, Any]) -> None:
    """Build every candidate's launches without a GPU, and the table that a run would write; change nothing."""
    meta = torch.device("meta")
    total = 0
    for op in ops:
        entries: list[dict[str, object]] = []
        for one in SWEEPS[op]():
            for candidate in one.candidates:
                with use_configs(**candidate):
                    one.problems[0].build(meta)
            for problem in one.problems:
                problem.build(meta)
            total += len(one.candidates) + (FINALISTS + 1) * len(one.problems)
            entries.append({"up_to": one.up_to, **one.candidates[0][op]})
            print(f"{op} {one.up_to}: {len(one.candidates)} candidates at {len(one.problems)} shapes")
        merge_entries(raw, "dry run", op, entries)
    parse_table(json.loads(dump_table(raw)))
    print(f"{total} measurements; about {total / 60:.0f} minutes. Nothing was measured or written.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(SWEEPS), help="which of %(default)s")
    parser.add_argument("--out", type=Path, default=PATH, help="table to read and to write")
    parser.add_argument("--dry-run", action="store_true", help="measure nothing, write nothing, need no GPU")
    args = parser.parse_args()
    ops = args.ops.split(",")
    unknown = set(ops) - set(SWEEPS)
    if unknown:
        parser.error(f"--ops: {', '.join(sorted(unknown))} cannot be tuned; there are {', '.join(SWEEPS)}")
    raw = json.loads(args.out.read_text())
    if args.dry_run:
        dry_run(ops, raw)
        return
    if not torch.cuda.is_available():
        parser.error("there is no GPU; --dry-run shows what would be tried")
    device = torch.device("cuda")
    for op in ops:
        entries = [tune_class(op, one, device) for one in SWEEPS[op]()]
        merge_entries(raw, gpu_name(device), op, entries)
        parse_table(raw)
        args.out.write_text(dump_table(raw))  # after every op: a sweep that is stopped keeps what it found


if __name__ == "__main__":
    main()
