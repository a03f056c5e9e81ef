"""Times every op of the backends for CPUs beside its floor: bytes / bandwidth or FLOPs / peak, whichever is longer.

    python -m benchmarks.kernels.bench_ops                                  # both shapes, all threads; 15 minutes
    python -m benchmarks.kernels.bench_ops --shape smollm2-135m --ops lora,attention --threads 2
    python -m benchmarks.kernels.bench_ops --quick                          # a tiny model, to see that it works

A row per op, case and backend. Ceilings are measured in the same run. With one thread the clock is the thread's own CPU
time, so that a busy neighbour costs little; with more it is wall-clock time. Each number is the least of many short
runs, with the median beside it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

from benchmarks import meter, results
from benchmarks.kernels.cases import (
    Case,
    adapted_cases,
    attention_cases,
    linear_cases,
    lora_cases,
    make_spec,
    row_cases,
)
from benchmarks.shapes import SHAPES, ModelShape
from pomona.cli.ceilings import ways_to_read
from pomona.kernels.cpu import binding
from pomona.kernels.dispatch import backends_of, use_backend
from pomona.kernels.linear import pack, packed_linear

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DECODE_SEGMENTS = {
    "decode 1 row": [1],
    "decode 8 distinct": [1] * 8,
    "decode 32 identical": [32],
    "decode 32 uniform": [6, 6, 5, 5, 5, 5],
    "decode 32 skewed": [11, 7, 5, 3, 2, 2, 1, 1],
    "decode 32 distinct": [1] * 32,
}
PREFILL_SEGMENTS = {"prefill 1024 identical": [1024], "prefill 1024 in 8": [128] * 8}
MIXES = {
    "decode 1, context 160": [(1, 160)],
    "decode 32, context 160": [(1, 160)] * 32,
    "decode 1, context 4096": [(1, 4096)],
    "decode 32, contexts 16 to 2048": [(1, 16 << (i % 8)) for i in range(32)],
    "prompts 8 x 128": [(128, 128)] * 8,
    "prompt 512": [(512, 512)],
    "chunk 512 of 4096": [(512, 4096)],
}

OPS = ("lora", "adapted", "attention", "linear", "rows")
MIN_RUNS = 3
MAX_ATTEMPTS = 3
"""A measurement that others disturbed is made again, so often at most; the last one counts."""


def measure(run: Callable[[], None], seconds: float, clock: Callable[[], float]) -> tuple[float, float]:
    """(least, median) seconds of one call of ``run``."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < MIN_RUNS:
        start = clock()
        run()
        times.append(clock() - start)
    return min(times), statistics.median(times)


def ceilings(dtype: torch.dtype, seconds: float, clock: Callable[[], float]) -> tuple[float, float]:
    """(bytes per second of reading memory, FLOPs per second of a large product), the best of torch's and our own."""
    big = torch.ones(64 << 20)
    bandwidth = big.nbytes / min(measure(read, seconds, clock)[0] for read in ways_to_read(big).values())
    x, weight = torch.randn(1024, 1024).to(dtype), torch.randn(2048, 1024).to(dtype)
    packed = pack(weight)
    runs = (lambda: packed_linear(x, packed), lambda: torch.nn.functional.linear(x, weight))
    return bandwidth, 2 * 1024 * 1024 * 2048 / min(measure(run, seconds, clock)[0] for run in runs)


def all_cases(ops: set[str], shape: ModelShape, dtype: torch.dtype) -> Iterator[Case]:
    """Cases of the chosen ops, made one after the other: their weights are large."""
    spec = make_spec(shape)
    if "lora" in ops:
        yield from lora_cases(spec, dtype, DECODE_SEGMENTS, ranks=[16] * 32)
        yield from lora_cases(spec, dtype, PREFILL_SEGMENTS, ranks=[16] * 8)
        yield from lora_cases(spec, dtype, {"decode 1 row": [1]}, ranks=[128])
        yield from lora_cases(spec, dtype, {"decode 32 distinct": [1] * 32}, ranks=[4] * 32)
        yield from lora_cases(spec, dtype, {"decode 32 distinct": [1] * 32}, ranks=[128] + [4] * 31)
    if "adapted" in ops:
        yield from adapted_cases(spec, dtype, DECODE_SEGMENTS | PREFILL_SEGMENTS, ranks=[16] * 32)
    if "attention" in ops:
        yield from attention_cases(spec, dtype, MIXES)
    if "linear" in ops:
        yield from linear_cases(spec, dtype, (1, 8, 32, 512, 2048))
    if "rows" in ops:
        yield from row_cases(spec, dtype, (1, 32, 512))


def default_backends() -> list[str]:
    """Those for CPUs, where the cases' tensors are."""
    return [name for name in backends_of("lora") if name != "triton"]


def check_names(parser: argparse.ArgumentParser, option: str, given: str, known: Sequence[str]) -> None:
    """Exit with a message if an option's comma-separated names are not all known."""
    for name in given.split(",") if given else ():
        if name not in known:
            parser.error(f"{option} {name}: must be some of {', '.join(known)}")


def check_isa(parser: argparse.ArgumentParser, isa: str | None) -> None:
    """Exit with a message if this machine does not have an instruction set."""
    if isa is not None and isa not in binding.available_isas():
        parser.error(f"--isa {isa}: this machine has {', '.join(binding.available_isas())}")


def runs_of(case: Case, backends: Sequence[str]) -> dict[str, Callable[[], None]]:
    """What to time for a case, by backend. The reference of a dense layer is torch on the weight as it was given."""
    runs = {name: case.run for name in backends if not (case.op == "linear" and name == "reference")}
    if case.before is not None and "reference" in backends:
        runs["reference"] = case.before
    return runs


def row_of(case: Case, backend: str, seconds: tuple[float, float], limits: tuple[float, float]) -> dict[str, Any]:
    """Measured and least possible time of one call.

    Args:
        case: what ran.
        backend: which implementation.
        seconds: (least, median) of all its calls.
        limits: (bytes per second, FLOPs per second).
    """
    least_us, median_us = (1e6 * value / case.num_calls for value in seconds)
    return {
        "kind": "op",
        "op": case.op,
        "case": case.name,
        "backend": backend,
        "us": least_us,
        "median_us": median_us,
        "floor_us": 1e6 * max(case.num_bytes / limits[0], case.flops / limits[1]),
        "bytes": case.num_bytes,
        "flops": case.flops,
    }


def run_shape(shape: ModelShape, arguments: argparse.Namespace, console: Console) -> None:
    """Time all cases of a shape."""
    dtype = DTYPES[arguments.dtype]
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter
    if not arguments.accept_noise:
        meter.wait_until_quiet()
    limits = ceilings(dtype, arguments.seconds, clock)
    setup = results.setup(
        shape=shape.name,
        dtype=arguments.dtype,
        threads=arguments.threads,
        clock=clock.__name__,
        isa=arguments.isa or (binding.available_isas() or ("none",))[-1],
        bandwidth_gb_per_s=limits[0] / 1e9,
        peak_gflop_per_s=limits[1] / 1e9,
        torch=torch.__version__,
    )
    backends = [name for name in arguments.backends.split(",") if name] or default_backends()
    for case in all_cases(set(arguments.ops.split(",")), shape, dtype):
        for name, run in runs_of(case, backends).items() if arguments.only in case.name else ():
            for _ in range(1 if arguments.accept_noise else MAX_ATTEMPTS):
                with use_backend(name), meter.Meter() as others:
                    seconds = measure(run, arguments.seconds, clock)
                noise = others.disturbance
                if noise.is_clean:
                    break
            row = {**row_of(case, name, seconds, limits), **asdict(noise), "is_clean": noise.is_clean}
            results.append(arguments.output, {**setup, **row})
            ratio = f"{row['us'] / row['floor_us']:8.2f} x floor" if row["floor_us"] else ""
            console.print(
                f"{'ok ' if noise.is_clean else 'BAD'} {shape.name} {case.op:12} {case.name:40} {name:9} "
                f"{row['us']:10.1f} us (median {row['median_us']:10.1f}) {ratio}",
                highlight=False,
            )


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: the two of the comparison")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--ops", default="lora,attention,linear,rows", help="of these, and adapted: products with LoRA")
    parser.add_argument("--backends", default="", help="comma-separated; default: all that run here")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--threads", type=results.positive, default=results.hardware()["cores"], help="default: all")
    parser.add_argument("--isa", choices=binding.ISAS, default=None, help="instruction set of the cpu backend")
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement; default: 0.3")
    results.add_arguments(parser, "ops", repeats=None)
    arguments = results.parse(parser, "ops", words)
    check_names(parser, "--ops", arguments.ops, OPS)
    check_names(parser, "--backends", arguments.backends, default_backends())
    check_isa(parser, arguments.isa)
    if arguments.quick:
        arguments.seconds, arguments.backends = 0.001, arguments.backends or "cpu,reference"
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        with torch.inference_mode(), binding.use_isa(arguments.isa) if arguments.isa else nullcontext():
            for name in arguments.shape or ("smollm2-135m", "qwen2.5-0.5b"):
                run_shape(SHAPES[name], arguments, Console(soft_wrap=True))
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
