"""Runs the comparison: every cell on every system in turn (A B C D, A B C D, ...), every repetition in new processes.

    python -m benchmarks.peers.run                                   # all of it: hours
    python -m benchmarks.peers.run --shape smollm2-135m --cells 'b32-128-64/*'
    python -m benchmarks.peers.run --shape tiny --repeats 1 --accept-noise --output /tmp/try.jsonl

While one system runs, the others are stopped. A run that other processes or the hypervisor disturbed is kept in the
file, marked, and repeated. Started again with the same --output it goes on where it was; after a
commit, Pomona's own runs are done again. For ratios of one run, give --output a new file: then all take turns.
Needs ``python -m benchmarks.peers.setup`` first; Linux.
"""

import argparse
import fnmatch
import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import meter, results, workload
from benchmarks.peers.process import SystemFailedError, SystemProcess, key_of
from benchmarks.peers.systems import SYSTEMS, System
from benchmarks.results import Row
from benchmarks.shapes import SHAPES, ModelShape
from benchmarks.workload import Cell

OURS = "pomona"
REFERENCE = "transformers"
"""Whose tokens the others' are compared with."""
WARM_UP_TOKENS = 4
MAX_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Task:
    """One run to do."""

    repetition: int
    shape: ModelShape
    cell: Cell
    system: System

    @property
    def key(self) -> tuple[int, str, str, str]:
        """As found in a row."""
        return self.repetition, self.shape.name, self.cell.name, self.system.name


def plan(shapes: Sequence[ModelShape], cells: Sequence[Cell], systems: Sequence[System], repeats: int) -> list[Task]:
    """Everything to run, in order: systems take turns within a cell."""
    return [
        Task(repetition, shape, cell, system)
        for repetition in range(repeats)
        for shape in shapes
        for cell in cells
        for system in systems
    ]


def done_keys(rows: Sequence[Row], commit: str) -> set[tuple[int, str, str, str]]:
    """Keys of the tasks that have a clean run; of our own system, one of this commit."""
    return {
        (row["repetition"], row["shape"], row["cell"], row["system"])
        for row in results.of_kind(rows, "peer")
        if row["is_clean"] and (row["system"] != OURS or row["commit"] == commit)
    }


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
        """Run a task until a repetition is clean, or enough were tried."""
        try:
            process = self._process(task)
            if task.cell.name not in process.warmed_cells:
                process.run(task.cell.name, WARM_UP_TOKENS)
                process.warmed_cells.add(task.cell.name)
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
            results.append(self.output, {"utc": self.setup["utc"], **found})
        self._tokens.clear()


def by_cell(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """The tasks of one repetition of one cell at a time."""
    group: list[Task] = []
    for task in tasks:
        if group and group[0].key[:3] != task.key[:3]:
            yield group
            group = []
        group.append(task)
    if group:
        yield group


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


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: the two of the comparison")
    parser.add_argument("--cells", action="append", help="glob such as 'b32-128-64/*'; repeatable; default: all")
    parser.add_argument("--system", choices=SYSTEMS, action="append", help="repeatable; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=results.default_file("peers"))
    parser.add_argument("--quiet-limit-s", type=float, default=120.0, help="longest wait for a quiet machine")
    parser.add_argument("--accept-noise", action="store_true", help="do not wait or repeat; for trying things out")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    console = Console()
    shapes = [SHAPES[name] for name in arguments.shape or ("smollm2-135m", "qwen2.5-0.5b")]
    globs = arguments.cells or ["*"]
    cells = [cell for cell in workload.cells() if any(fnmatch.fnmatch(cell.name, glob) for glob in globs)]
    names = arguments.system or list(SYSTEMS)
    for shape in shapes:
        workload.write(shape)
    setup = results.setup()
    if setup["commit"].endswith("-dirty"):
        console.print(
            "the checkout has changes that are not committed: these rows cannot be reproduced", style="yellow"
        )
    done = done_keys(results.read(arguments.output), setup["commit"])
    tasks = plan(shapes, cells, [SYSTEMS[name] for name in names], arguments.repeats)
    left = [task for task in tasks if task.key not in done]
    console.print(f"{len(left)} of {len(tasks)} runs to do; rows go to {arguments.output}")
    comparison = Comparison(
        arguments.output,
        setup,
        console,
        accept_noise=arguments.accept_noise,
        quiet_limit_s=arguments.quiet_limit_s,
    )
    execute(left, comparison, console)


if __name__ == "__main__":
    main()
