"""Another build of the compiled CPU kernels against this one: what a change to them is worth on this machine.

    git worktree add /tmp/before HEAD~1
    (cd /tmp/before && python setup.py build_ext --inplace)
    python -m benchmarks.kernels.compare_builds /tmp/before/src/pomona/kernels/cpu/_native*.so --ops adapted,attention

Both are loaded into one process and take turns, call by call: on a machine that others use too, what a call takes may
double from one minute to the next, and the ratio of neighbouring calls stays. Shown are medians, and the middle half of
the ratios. Calls are replayed from a recording, as in the engine's decode steps, so that no Python is in between. Both
builds have to have the same interface and pack weights alike.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from ctypes import CDLL
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import results
from benchmarks.kernels.bench_ops import DTYPES, MIN_RUNS, OPS, all_cases, check_isa, check_names
from benchmarks.kernels.cases import Case
from benchmarks.shapes import SHAPES
from pomona.kernels.cpu import binding
from pomona.kernels.cpu.recording import Recording, record
from pomona.kernels.cpu.workspace import Workspace


def compare(case: Case, builds: Sequence[CDLL], seconds: float) -> tuple[list[list[float]], list[float]]:
    """Seconds of one call with each build, and for each turn the last one's part of the first one's.

    Args:
        case: what to run.
        builds: two.
        seconds: how long to go on.
    """
    recordings: list[Recording] = []
    for build in builds:
        with binding.use_library(build):
            recordings.append(record(case.run, Workspace())[0])
    times: list[list[float]] = [[] for _ in builds]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < MIN_RUNS:
        for build, recording, of_build in zip(builds, recordings, times, strict=True):
            with binding.use_library(build):
                start = time.perf_counter()
                recording.replay()
                of_build.append((time.perf_counter() - start) / case.num_calls)
    return times, [after / before for before, after in zip(times[0], times[-1], strict=True)]


def main(words: Sequence[str] | None = None) -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other build's library; it comes first in ratios")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--ops", default="lora,adapted,attention,linear,rows", help="some of these")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--threads", type=results.positive, default=results.hardware()["cores"], help="default: all")
    parser.add_argument("--isa", choices=binding.ISAS, default=None, help="instruction set; default: the best")
    parser.add_argument("--seconds", type=float, default=5.0, help="per case; default: 5")
    arguments = parser.parse_args(words)
    console = Console(soft_wrap=True)
    check_names(parser, "--ops", arguments.ops, OPS)
    check_isa(parser, arguments.isa)
    try:
        builds = (binding.load(arguments.other), binding.library())
    except OSError as error:
        parser.error(str(error))
    isa = arguments.isa or binding.available_isas()[-1]
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    for build in builds:
        build.pomona_set_isa(binding.ISAS.index(isa))
    try:
        for case in all_cases(set(arguments.ops.split(",")), SHAPES[arguments.shape], DTYPES[arguments.dtype]):
            if arguments.only not in case.name:
                continue
            with torch.inference_mode():
                times, ratios = compare(case, builds, arguments.seconds)
            low, middle, high = statistics.quantiles(ratios, n=4)
            console.print(
                f"{case.op:10} {case.name:44} {1e6 * statistics.median(times[0]):9.1f} us -> "
                f"{1e6 * statistics.median(times[1]):9.1f} us   ratio {middle:.3f} ({low:.3f} to {high:.3f})",
                highlight=False,
            )
    finally:
        torch.set_num_threads(before)
        for build in builds:
            build.pomona_set_isa(build.pomona_best_isa())


if __name__ == "__main__":
    main()
