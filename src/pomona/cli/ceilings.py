"""``pomona bench ceilings``: what this machine can do at most, so that measured times can be held against a floor.

Dense products in bfloat16 and float32 (large, and at the shapes of models), reading memory with all threads; with a GPU
also copies and the cost of a launch. Every number is the median of several runs, each run the median of its calls; runs
of all tests take turns, so that a disturbed moment falls on none of them alone.
"""

import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional

import pomona
from pomona.bench.machine import describe_hardware, find_commit
from pomona.bench.report import check_writable
from pomona.core.errors import ConfigError
from pomona.core.machine import MAX_THREADS, available_host_bytes, num_usable_cores
from pomona.kernels.linear import PackedWeight, pack, packed_linear

LARGE = 4096
MODEL_SHAPES = {
    "135M gate_up": (576, 3072),
    "135M down": (1536, 576),
    "0.5B gate_up": (896, 9728),
    "0.5B down": (4864, 896),
}
"""(in_features, out_features) of the widest products of SmolLM2-135M and Qwen2.5-0.5B."""
MODEL_ROWS = (1, 8, 32, 2048)
_COLD_BYTES = 128 << 20
"""Weights of a model-shape test together: more than caches hold, as in a model whose layers follow each other."""
_READ_BYTES = 1 << 30
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class CeilingsConfig:
    """What to measure, and for how long."""

    device: str = "auto"
    """auto, cpu or cuda."""
    num_threads: int | None = None
    """None takes the cores this process may use."""
    num_runs: int = 5
    run_s: float = 0.3
    is_small: bool = False
    """Small sizes: shows that everything works, measures nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for name in ("num_threads", "num_runs", "run_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}: must be more than 0, and finite")
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ConfigError(f"num_threads is {self.num_threads}: must be at most {MAX_THREADS}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device is {self.device!r}: must be auto, cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda' but PyTorch finds no CUDA device")


@dataclass(frozen=True, slots=True)
class Test:
    """One thing to measure."""

    group: str
    """gemm, read, copy or launch."""
    name: str
    unit: str
    amount: float
    """Work of one call in units times seconds; 0 if the unit is a time."""
    call: Callable[[], object]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A measured test."""

    group: str
    name: str
    unit: str
    median: float
    worst: float
    """Of the runs' medians."""
    best: float
    facts: dict[str, Any]


def run_ceilings(config: CeilingsConfig, output: Path | None) -> None:
    """Measure, print a table to stderr and one JSON line to stdout, and append that line to ``output``.

    Raises:
        ConfigError: ``output`` cannot be written; nothing is measured.
    """
    if output is not None:
        check_writable(output)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=None)
        report = measure(config, lambda name, done, all_: progress.update(task, completed=done, total=all_))
    Console(stderr=True).print(render(report))
    line = json.dumps(report)
    sys.stdout.write(line + "\n")
    if output is not None:
        with output.open("a") as file:
            file.write(line + "\n")


def measure(
    config: CeilingsConfig, report_progress: Callable[[str, int, int], None] = lambda name, done, total: None
) -> dict[str, Any]:
    """Run all tests.

    Args:
        config: what to measure.
        report_progress: told the test's name, how many runs are done, and how many there are.

    Returns:
        A JSON-ready row: setup, ``ceilings`` in order, and ``peaks``, the best medians by kind.
    """
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device
    device = "cpu" if device == "auto" else device
    torch.set_num_threads(config.num_threads or num_usable_cores())
    with torch.inference_mode():
        tests = list(_tests(device, is_small=config.is_small))
        rates: list[list[float]] = [[] for _ in tests]
        total = config.num_runs * len(tests)
        for run in range(config.num_runs):
            for index, test in enumerate(tests):
                report_progress(test.name, run * len(tests) + index, total)
                rates[index].append(_run(test, config.run_s, device))
        report_progress("done", total, total)
    ceilings = [_summarize(test, values) for test, values in zip(tests, rates, strict=True)]
    return {
        "kind": "ceilings",
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": find_commit(),
        "hardware": describe_hardware(),
        "pomona": pomona.__version__,
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "num_runs": config.num_runs,
        "run_s": config.run_s,
        "is_small": config.is_small,
        "peaks": _peaks(ceilings),
        "ceilings": [asdict(ceiling) for ceiling in ceilings],
    }


def _run(test: Test, run_s: float, device: str) -> float:
    """One run: calls for ``run_s`` seconds after one to warm up; the rate (or time) of the median call."""
    _timed(test.call, device)
    durations: list[float] = []
    end_s = time.perf_counter() + run_s
    while not durations or time.perf_counter() < end_s:
        durations.append(_timed(test.call, device))
    median_s = statistics.median(durations)
    return test.amount / median_s if test.amount else median_s / test.facts["num_calls"] * 1e6


def _timed(call: Callable[[], object], device: str) -> float:
    start_s = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def _summarize(test: Test, values: Sequence[float]) -> Ceiling:
    is_time = not test.amount
    return Ceiling(
        group=test.group,
        name=test.name,
        unit=test.unit,
        median=statistics.median(values),
        worst=max(values) if is_time else min(values),
        best=min(values) if is_time else max(values),
        facts=test.facts,
    )


def _peaks(ceilings: Sequence[Ceiling]) -> dict[str, float]:
    """The best median of each kind: what floors are computed from."""
    peaks = {}
    for dtype in _DTYPES:
        found = [item.median for item in ceilings if item.group == "gemm" and item.facts["dtype"] == dtype]
        peaks[f"{dtype}_gflop_per_s"] = max(found)
    peaks["read_gb_per_s"] = max(item.median for item in ceilings if item.group == "read")
    return peaks


def _tests(device: str, *, is_small: bool) -> Iterator[Test]:
    yield from _gemm_tests(device, is_small=is_small)
    yield from _read_tests(device, is_small=is_small)
    if device == "cuda":
        yield from _copy_tests()
        yield from _launch_tests()


def _gemm_tests(device: str, *, is_small: bool) -> Iterator[Test]:
    """Large products, then those of models, each through PyTorch and through Pomona's packed weights."""
    large = 64 if is_small else LARGE
    for dtype in _DTYPES:
        weights = _Weights.make(dtype, large, large, 1, device)
        yield from weights.tests(f"{large} x {large} x {large}", large, device)
    for name, (in_features, out_features) in MODEL_SHAPES.items():
        num_weights = 1 if is_small else -(-_COLD_BYTES // (in_features * out_features * 2))
        weights = _Weights.make("bfloat16", in_features, out_features, num_weights, device)
        for num_rows in (1, 4) if is_small else MODEL_ROWS:
            yield from weights.tests(f"{name}, {num_rows} rows", num_rows, device)


@dataclass(frozen=True, slots=True)
class _Weights:
    """Different weights of one shape, together more than a cache holds: in a step they come from memory, too."""

    dtype: str
    in_features: int
    out_features: int
    plain: list[Tensor]
    packed: list[PackedWeight]

    @classmethod
    def make(cls, dtype: str, in_features: int, out_features: int, count: int, device: str) -> "_Weights":
        plain = [torch.randn(out_features, in_features, device=device).to(_DTYPES[dtype]) for _ in range(count)]
        return cls(dtype, in_features, out_features, plain, [pack(weight) for weight in plain])

    def tests(self, name: str, num_rows: int, device: str) -> Iterator[Test]:
        """One call of a test multiplies by every weight once."""
        x = torch.randn(num_rows, self.in_features, device=device).to(_DTYPES[self.dtype])

        def multiply() -> None:
            for weight in self.plain:
                functional.linear(x, weight)

        def multiply_packed() -> None:
            for weight in self.packed:
                packed_linear(x, weight)

        facts = {"dtype": self.dtype, "rows": num_rows, "in": self.in_features, "out": self.out_features}
        amount = 2e-9 * num_rows * self.in_features * self.out_features * len(self.plain)
        for method, call in (("torch", multiply), ("packed", multiply_packed)):
            yield Test("gemm", name, "GFLOP/s", amount, call, {**facts, "method": method})


def _read_tests(device: str, *, is_small: bool) -> Iterator[Test]:
    """What reads a large buffer once and writes next to nothing."""
    num_bytes = 1 << 20 if is_small else min(_READ_BYTES, available_host_bytes() // 8)
    buffer = torch.ones(num_bytes // 4, device=device)
    for name, call in ways_to_read(buffer).items():
        yield Test("read", name, "GB/s", buffer.nbytes / 1e9, call, {"bytes": buffer.nbytes})


def ways_to_read(buffer: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Two ways to read a large buffer from end to end: from one place on, and several rows of a matrix at once, which
    memory may answer sooner.

    Args:
        buffer: [elems], float32.
    """
    matrix = buffer[: buffer.numel() // LARGE * LARGE].view(-1, LARGE)
    vector = torch.ones(LARGE, device=buffer.device)
    return {"sum": buffer.sum, "matrix x vector": lambda: torch.mv(matrix, vector)}


def _copy_tests() -> Iterator[Test]:
    """Host to device, device to host (pinned), and within the device, where bytes count as read and written."""
    num_bytes = 256 << 20
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    device, other = (torch.empty(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    pairs = {"host to device": (device, host, 1), "device to host": (host, device, 1), "on device": (other, device, 2)}
    for name, (target, source, factor) in pairs.items():
        call = _copy(target, source)
        yield Test("copy", name, "GB/s", factor * num_bytes / 1e9, call, {"bytes": num_bytes})


def _copy(target: Tensor, source: Tensor) -> Callable[[], Tensor]:
    return lambda: target.copy_(source, non_blocking=True)


def _launch_tests() -> Iterator[Test]:
    """Microseconds per small kernel: launched one by one, replayed from a graph, and one launch that is waited for."""
    num_calls = 1000
    with torch.inference_mode(mode=False):  # a graph is captured outside, where nothing else may be changed in place
        x = torch.zeros(1, device="cuda")

    def add_many() -> None:
        for _ in range(num_calls):
            x.add_(1.0)

    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(mode=False), torch.cuda.graph(graph):
        add_many()
    yield Test("launch", "kernel after kernel", "us", 0.0, add_many, {"num_calls": num_calls})
    yield Test("launch", "kernels of a graph", "us", 0.0, graph.replay, {"num_calls": num_calls})
    yield Test("launch", "one kernel, waited for", "us", 0.0, lambda: x.add_(1.0), {"num_calls": 1})


def render(report: dict[str, Any]) -> Table:
    """The report as a table."""
    title = f"{report['hardware']}\n{report['device']}, {report['threads']} threads, torch {report['torch']}"
    table = Table("what", "kind", "median", "worst to best", "weights", title=title)
    for item in report["ceilings"]:
        facts = item["facts"]
        kind, weights = "", ""
        if item["group"] == "gemm":
            kind = f"{facts['dtype']}, {facts['method']}"
            rate = item["median"] * _DTYPES[facts["dtype"]].itemsize / (2 * facts["rows"])
            weights = f"{rate:.1f} GB/s" if facts["rows"] < facts["in"] else ""
        spread = f"{item['worst']:.1f} to {item['best']:.1f}"
        table.add_row(f"{item['group']}: {item['name']}", kind, f"{item['median']:.1f} {item['unit']}", spread, weights)
    return table
