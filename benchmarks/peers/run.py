"""Runs the comparison: every cell on every system in turn (A B C D, A B C D, ...), every repetition in new processes.

    python -m benchmarks.peers.run --dry-run                         # what would be run, and how long it would take
    python -m benchmarks.peers.run                                   # all of it: hours
    python -m benchmarks.peers.run --shape smollm2-135m --repeats 1  # one repetition of one model
    python -m benchmarks.peers.run --shape qwen2.5-0.5b --cells 'b32-128-64/*' --cells 'b1-*'
    python -m benchmarks.peers.run --system pomona --system vllm --cells '*/base' --cells '*/distinct'
    python -m benchmarks.peers.run --quick                           # a tiny model, to see that it works

A repetition starts each system once without adapters and once with all of them; all cells run in these two processes.
While one system runs, the others are stopped. A run that other processes or the hypervisor disturbed is kept in the
file, marked, and repeated; a run longer than --repeat-below-s is long enough to be its own average and comes once.
Started again with the same --output it goes on where it was; when the program has changed (src/pomona, setup.py, its
dependencies; not docs, tests or reports), Pomona's own runs are done again. For ratios of one run, give --output a new
file: then all take turns. Needs ``python -m benchmarks.peers.setup`` first; Linux.
"""

import argparse
import fnmatch
import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import assets, meter, results, workload
from benchmarks.peers.plan import REPEAT_BELOW_S, Key, Task, by_cell, done_runs, expected_text, is_repeated, plan
from benchmarks.peers.process import SystemFailedError, SystemProcess, key_of
from benchmarks.peers.setup import make_gguf, works
from benchmarks.peers.systems import LLAMA_CPP, SYSTEMS
from benchmarks.results import Row
from benchmarks.shapes import SHAPES
from benchmarks.workload import Cell

REFERENCE = "transformers"
"""Whose tokens the others' are compared with."""
MAX_ATTEMPTS = 4


def summarize(run: Row, cell: Cell) -> Row:
    """A run's times in the project's definitions. TPOT: time per output token after a request's first."""
    num_tokens = cell.batch * cell.num_output_tokens
    spans = zip(run["first_token_s"], run["finish_s"], strict=True)
    return {
        "wall_s": run["wall_s"],
        "output_tokens_per_s": num_tokens / run["wall_s"],
        "ttft_mean_s": statistics.fmean(run["first_token_s"]),
        "tpot_mean_ms": 1e3 * statistics.fmean((end - first) / (cell.num_output_tokens - 1) for first, end in spans),
        "e2e_mean_s": statistics.fmean(run["finish_s"]),
        "token_digest": hashlib.sha256(json.dumps(run["token_ids"]).encode()).hexdigest()[:16],
    }


def agreement(token_ids: list[list[int]], reference: list[list[int]]) -> tuple[float, float]:
    """(share of requests with the same first token, mean number of leading tokens that are the same)."""
    prefixes = [
        next((index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
        for ours, theirs in zip(token_ids, reference, strict=True)
    ]
    return statistics.fmean(prefix > 0 for prefix in prefixes), statistics.fmean(prefixes)


@dataclass
class Comparison:
    """Carries out tasks and writes rows."""

    output: Path
    setup: Row
    console: Console
    accept_noise: bool = False
    quiet_limit_s: float = 120.0
    repeat_below_s: float = REPEAT_BELOW_S
    done: dict[Key, float] = field(default_factory=dict)
    """As ``done_runs`` found them; runs are added."""
    _processes: dict[str, SystemProcess] = field(default_factory=dict)
    _tokens: dict[str, list[list[int]]] = field(default_factory=dict)

    def _process(self, task: Task) -> SystemProcess:
        """The running process for a task; others of the same system are ended first."""
        key = key_of(task.system, task.shape, task.cell.popularity)
        process = self._processes.get(task.system.name)
        if process is not None and process.key == key:
            process.resume()
            return process
        if process is not None:
            del self._processes[task.system.name]
            process.close()
        process = SystemProcess(task.system, task.shape, task.cell.popularity)
        self._processes[task.system.name] = process
        return process

    def close(self) -> None:
        """End all processes."""
        while self._processes:
            self._processes.popitem()[1].close()

    def run(self, task: Task) -> None:
        """Run a task until a repetition is clean, or enough were tried; nothing if it is long and was run before."""
        if not is_repeated(task, self.done, self.repeat_below_s):
            return
        try:
            process = self._process(task)
            process.warm_up(task.cell)
            for attempt in range(MAX_ATTEMPTS):
                if self._attempt(task, process, attempt):
                    break
            process.pause()
        except SystemFailedError as error:
            self.console.print(f"[red]failed[/] {task.cell.name} {error}", markup=True)
            failure = {"kind": "peer_failure", **self._where(task), "message": str(error)}
            results.append(self.output, {**self.setup, **failure})
            if broken := self._processes.pop(task.system.name, None):
                broken.close()

    def _where(self, task: Task) -> Row:
        return {
            "repetition": task.repetition,
            "shape": task.shape.name,
            "cell": task.cell.name,
            "system": task.system.name,
        }

    def _attempt(self, task: Task, process: SystemProcess, attempt: int) -> bool:
        """Measure once. Returns whether that was enough."""
        if not self.accept_noise:
            meter.wait_until_quiet(
                self.quiet_limit_s,
                report=lambda pct: self.console.print(f"waiting: others take {pct:.0f} % of the machine", style="dim"),
            )
        with meter.Meter(process.pid) as clock:
            run = process.run(task.cell.name)
        is_clean = clock.disturbance.is_clean
        row = {
            "kind": "peer",
            **self._where(task),
            "attempt": attempt,
            **{name: value for name, value in asdict(task.cell).items()},
            "num_distinct": len(workload.counts(task.cell.popularity, task.cell.batch)),
            "num_loaded": process.num_loaded,
            "settings": process.settings,
            "versions": process.versions,
            "load_s": process.load_s,
            **summarize(run, task.cell),
            "memory_mib": meter.tree_memory_mib(process.pid),
            **asdict(clock.disturbance),
            "is_clean": is_clean,
            "is_noise_accepted": self.accept_noise,
        }
        results.append(self.output, {**self.setup, **row})
        self._tokens[task.system.name] = run["token_ids"]
        if is_clean or self.accept_noise:
            self.done[task.key] = run["wall_s"]
        self.console.print(
            f"{'ok ' if is_clean else 'BAD'} {task.shape.name} {task.cell.name:22} {task.system.name:13} "
            f"{row['output_tokens_per_s']:8.1f} tok/s  ttft {row['ttft_mean_s']:6.2f} s  "
            f"tpot {row['tpot_mean_ms']:7.1f} ms  "
            f"others {clock.disturbance.other_pct:4.1f} %  stolen {clock.disturbance.steal_pct:3.1f} %",
            highlight=False,
            soft_wrap=True,
        )
        return is_clean or self.accept_noise

    def compare_tokens(self, task: Task) -> None:
        """Write how far the systems' tokens of the cell just run agree with the reference's; forget them."""
        reference = self._tokens.get(REFERENCE)
        for name, token_ids in self._tokens.items() if reference is not None else ():
            first, prefix = agreement(token_ids, reference or [])
            where = {**self._where(task), "system": name, "reference": REFERENCE}
            found = {"kind": "agreement", **where, "same_first_token": first, "mean_common_prefix": prefix}
            results.append(self.output, {**self.setup, **found})
        self._tokens.clear()


def execute(tasks: Sequence[Task], comparison: Comparison, console: Console) -> None:
    """Run all tasks with a progress bar; processes are new in every repetition."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("runs", total=len(tasks))
        repetition = None
        try:
            for group in by_cell(tasks):
                if group[0].repetition != repetition:
                    comparison.close()
                    repetition = group[0].repetition
                for task in group:
                    progress.update(bar, description=f"{task.shape.name} {task.cell.name} {task.system.name}")
                    comparison.run(task)
                    progress.advance(bar)
                comparison.compare_tokens(group[0])
        finally:
            comparison.close()


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=SHAPES, action="append", help="repeatable; default: the two of the comparison"
    )
    parser.add_argument("--cells", action="append", help="glob such as 'b32-128-64/*'; repeatable; default: all")
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="repeatable; default: all")
    parser.add_argument(
        "--repeat-below-s", type=float, default=REPEAT_BELOW_S, help="longer runs come once; default: 60"
    )
    parser.add_argument("--quiet-limit-s", type=float, default=120.0, help="longest wait for a quiet machine")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run, and how long it would take")
    results.add_arguments(parser, "peers", repeats=3)
    arguments = results.parse(parser, "peers", words)
    if arguments.quick:
        arguments.cells = arguments.cells or ["b8-128-64/*"]
        arguments.system = arguments.system or [system.name for system in SYSTEMS.values() if system.is_installed]
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    console = Console(soft_wrap=True)
    shapes = [SHAPES[name] for name in arguments.shape or ("smollm2-135m", "qwen2.5-0.5b")]
    globs = arguments.cells or ["*"]
    cells = [cell for cell in workload.cells() if any(fnmatch.fnmatch(cell.name, glob) for glob in globs)]
    setup = results.setup()
    if setup["program"].endswith("-dirty"):
        console.print("src has changes that are not committed: these rows cannot be reproduced", style="yellow")
    done = done_runs(results.read(arguments.output), setup["program"])
    systems = [SYSTEMS[name] for name in arguments.system or SYSTEMS]
    tasks = plan(shapes, cells, systems, arguments.repeats)
    left = [task for task in tasks if task.key not in done and is_repeated(task, done, arguments.repeat_below_s)]
    console.print(f"{len(left)} of {len(tasks)} runs to do; rows go to {arguments.output}")
    console.print(expected_text(left, done, arguments.repeat_below_s), highlight=False)
    if arguments.dry_run:
        return
    if missing := [system.name for system in systems if not system.is_installed]:
        raise SystemExit(
            f"not installed: {', '.join(missing)}; run `python -m benchmarks.peers.setup`, or name others by --system"
        )
    for shape in shapes:
        if arguments.quick:
            assets.make(shape)
        workload.write(shape)
        if arguments.quick and works(LLAMA_CPP):
            make_gguf(shape.name)
    comparison = Comparison(
        arguments.output,
        setup,
        console,
        accept_noise=arguments.accept_noise,
        quiet_limit_s=arguments.quiet_limit_s,
        repeat_below_s=arguments.repeat_below_s,
        done=done,
    )
    start_s = time.monotonic()
    execute(left, comparison, console)
    console.print(f"took {(time.monotonic() - start_s) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
