"""The ceilings that floors are computed from: those of the newest ``pomona bench ceilings`` on this machine.

python -m benchmarks.ceilings            # measures and appends to benchmarks/results/YYYY-MM-DD-ceilings.jsonl
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import meter, results
from benchmarks.roofline import Ceilings
from pomona.cli.ceilings import CeilingsConfig, measure, render, ways_to_read
from pomona.kernels.linear import pack, packed_linear


def run(output: Path, console: Console, *, is_small: bool) -> dict[str, Any]:
    """Measure with a progress bar, append the row with how far others disturbed it, and show it."""
    config = CeilingsConfig(num_runs=1, run_s=0.01, is_small=True) if is_small else CeilingsConfig()
    with Progress(console=console) as progress, meter.Meter() as clock:
        task = progress.add_task("ceilings", total=None)
        report = measure(config, lambda name, done, total: progress.update(task, completed=done, total=total))
    noise = clock.disturbance
    setup = results.setup(other_pct=noise.other_pct, steal_pct=noise.steal_pct, is_clean=noise.is_clean)
    row = {**report, **setup}
    results.append(output, row)
    console.print(render(row))
    return row


def from_row(row: dict[str, Any], dtype: str = "bfloat16") -> Ceilings:
    """The two numbers that floors need."""
    peaks = row["peaks"]
    return Ceilings(flops_per_s=1e9 * peaks[f"{dtype}_gflop_per_s"], bytes_per_s=1e9 * peaks["read_gb_per_s"])


def current(console: Console, *, is_quick: bool = False) -> Ceilings:
    """Ceilings of this machine: from the newest results file if it is of the same hardware, else measured now.

    Args:
        console: told when they must be measured.
        is_quick: tiny sizes suffice.
    """
    path = results.latest("ceilings")
    rows = [row for row in results.read(path) if row["hardware"] == results.hardware()] if path else []
    clean = [row for row in rows if row["is_clean"]] or rows
    if clean:
        return from_row(clean[-1])
    console.print("no ceilings of this machine in benchmarks/results: measuring them, for this run only")
    small = CeilingsConfig(num_runs=1, run_s=0.01, is_small=True)
    return from_row(measure(small if is_quick else CeilingsConfig(num_runs=1, run_s=0.05)))


class Probe:
    """The two numbers of this very moment. On a shared host, memory gives a program between half and all it can,
    depending on the neighbours; floors for a ratio come from beside what is timed.

    Args:
        is_quick: tiny sizes suffice.
    """

    _NUM_ROWS = 512

    def __init__(self, *, is_quick: bool = False) -> None:
        in_features, out_features, count = (64, 64, 1) if is_quick else (896, 9728, 8)
        self._weights = [pack(torch.randn(out_features, in_features).bfloat16()) for _ in range(count)]
        self._rows = torch.randn(self._NUM_ROWS, in_features).bfloat16()
        self._buffer = torch.ones((1 if is_quick else 32) << 20)

    def measure(self) -> Ceilings:
        """Takes about a tenth of a second: reads in torch's two ways and by a packed product with one row, the best of
        them; and products with many rows."""
        row, weight = self._rows[:1], self._weights[0]
        num_bytes = sum(weight.num_bytes for weight in self._weights)
        flops = 2 * self._NUM_ROWS * weight.in_features * weight.out_features
        read = max(
            *(self._buffer.nbytes / _median_s(read) for read in ways_to_read(self._buffer).values()),
            num_bytes / _median_s(lambda: [packed_linear(row, weight) for weight in self._weights]),
        )
        return Ceilings(flops / _median_s(lambda: packed_linear(self._rows, weight)), read)


def _median_s(call: Callable[[], object]) -> float:
    times_s = []
    for _ in range(5):
        start_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


def mean(measured: Sequence[Ceilings]) -> Ceilings:
    """Ceilings of what ran while these were measured."""
    return Ceilings(
        statistics.fmean(limits.flops_per_s for limits in measured),
        statistics.fmean(limits.bytes_per_s for limits in measured),
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser, "ceilings", repeats=None)
    arguments = results.parse(parser, "ceilings", words)
    console = Console()
    if not arguments.accept_noise:
        meter.wait_until_quiet()
    run(arguments.output, console, is_small=arguments.quick)


if __name__ == "__main__":
    main()
