"""Times every op of every backend beside its floor: bytes / bandwidth or FLOPs / peak, whichever is longer.

    python benchmarks/kernels/bench_ops.py --model smol --ops lora,attention --threads 2

One JSON line per op, shape and backend; a table on stderr. Ceilings are measured in the same run. With one thread the
clock is the thread's own CPU time, so that a busy neighbour costs little; with more it is wall-clock time. Each number
is the least of many short runs, with the median beside it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from cases import Case, attention_cases, linear_cases, lora_cases, make_spec, row_cases

from pomona.kernels.cpu import binding
from pomona.kernels.dispatch import backends_of, use_backend

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


def measure(run: Callable[[], None], seconds: float, clock: Callable[[], float]) -> tuple[float, float]:
    """(least, median) seconds of one call of ``run``."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = clock()
        run()
        times.append(clock() - start)
    return min(times), statistics.median(times)


def ceilings(dtype: torch.dtype, seconds: float, clock: Callable[[], float]) -> tuple[float, float]:
    """(bytes per second of reading memory, FLOPs per second of a large product), the best of torch's and our own."""
    from pomona.kernels.linear import pack, packed_linear

    big = torch.ones(64 << 20)
    bandwidth = big.numel() * 4 / measure(lambda: big.sum(), seconds, clock)[0]
    x, weight = torch.randn(1024, 1024).to(dtype), torch.randn(2048, 1024).to(dtype)
    packed = pack(weight)
    runs = (lambda: packed_linear(x, packed), lambda: torch.nn.functional.linear(x, weight))
    return bandwidth, 2 * 1024 * 1024 * 2048 / min(measure(run, seconds, clock)[0] for run in runs)


def all_cases(ops: set[str], model: str, dtype: torch.dtype) -> Iterator[Case]:
    """Cases of the chosen ops, made one after the other: their weights are large."""
    spec = make_spec(model)
    if "lora" in ops:
        yield from lora_cases(spec, dtype, DECODE_SEGMENTS, lora_rank=16)
        yield from lora_cases(spec, dtype, PREFILL_SEGMENTS, lora_rank=16)
        yield from lora_cases(spec, dtype, {"decode 1 row": [1]}, lora_rank=128)
    if "attention" in ops:
        yield from attention_cases(spec, dtype, MIXES)
    if "linear" in ops:
        yield from linear_cases(spec, dtype, (1, 8, 32, 512, 2048))
    if "rows" in ops:
        yield from row_cases(spec, dtype, (1, 32, 512))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smol", "qwen"), default="smol")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--ops", default="lora,attention,linear,rows")
    parser.add_argument("--backends", default="", help="comma-separated; all by default")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=binding.ISAS, default=None, help="instruction set of the cpu backend")
    parser.add_argument("--seconds", type=float, default=0.3, help="per measurement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    dtype = DTYPES[args.dtype]
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    with binding.use_isa(args.isa) if args.isa else nullcontext():
        bandwidth, peak = ceilings(dtype, args.seconds, clock)
        setup = {
            "model": args.model,
            "dtype": args.dtype,
            "threads": args.threads,
            "clock": clock.__name__,
            "isa": args.isa or (binding.available_isas() or ("none",))[-1],
            "bandwidth_gb_s": round(bandwidth / 1e9, 1),
            "peak_gflop_s": round(peak / 1e9, 1),
            "torch": torch.__version__,
            "commit": commit.stdout.strip(),
            "date": time.strftime("%Y-%m-%d"),
        }
        print(json.dumps(setup), file=sys.stderr)
        for case in all_cases(set(args.ops.split(",")), args.model, dtype):
            if args.only not in case.name:
                continue
            floor_us = 1e6 * max(case.num_bytes / bandwidth, case.flops / peak)
            names = [name for name in args.backends.split(",") if name] or list(backends_of("lora"))
            runs = {name: case.run for name in names if not (case.op == "linear" and name == "reference")}
            if case.before is not None and "reference" in names:
                runs["reference"] = case.before
            for name, run in runs.items():
                with use_backend(name):
                    least, median = measure(run, args.seconds, clock)
                us, median_us = 1e6 * least / case.num_calls, 1e6 * median / case.num_calls
                row = {"op": case.op, "case": case.name, "backend": name, "us": round(us, 2)}
                row |= {"median_us": round(median_us, 2), "floor_us": round(floor_us, 2)}
                row |= {"bytes": case.num_bytes, "flops": case.flops, **setup}
                print(json.dumps(row), flush=True)
                ratio = f"{us / floor_us:8.2f} x floor" if floor_us else ""
                line = f"{case.op:12} {case.name:40} {name:9} {us:10.1f} us (median {median_us:10.1f}) {ratio}"
                print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
