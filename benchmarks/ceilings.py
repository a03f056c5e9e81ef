"""The ceilings that floors are computed from: those of the newest ``pomona bench ceilings`` on this machine.

python -m benchmarks.ceilings            # measures and appends to benchmarks/results/YYYY-MM-DD-ceilings.jsonl
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import meter, results
from benchmarks.roofline import Ceilings


def run(output: Path, console: Console, *, is_small: bool) -> dict[str, Any]:
    """Measure with a progress bar, append the row with how far others disturbed it, and show it."""
    from pomona.cli.ceilings import CeilingsConfig, measure, render

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
    from pomona.cli.ceilings import CeilingsConfig, measure

    console.print("no ceilings of this machine in benchmarks/results: measuring them, for this run only")
    small = CeilingsConfig(num_runs=1, run_s=0.01, is_small=True)
    return from_row(measure(small if is_quick else CeilingsConfig(num_runs=1, run_s=0.05)))


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
