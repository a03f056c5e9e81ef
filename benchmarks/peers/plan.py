"""What a comparison runs, in which order, what of it is done already, and how long the rest may take. Pure."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import results, workload
from benchmarks.peers.systems import System
from benchmarks.results import Row
from benchmarks.roofline import Ceilings, Job, job_floor_s
from benchmarks.shapes import SMOLLM2_135M, ModelShape
from benchmarks.workload import Cell

OURS = "pomona"
REPEAT_BELOW_S = 60.0

Key = tuple[int, str, str, str, str]
"""Repetition, shape, cell, system, settings."""


@dataclass(frozen=True, slots=True)
class Task:
    """One run to do."""

    repetition: int
    shape: ModelShape
    cell: Cell
    system: System

    @property
    def key(self) -> Key:
        """As found in a row."""
        settings = json.dumps(self.system.settings_for(self.cell.popularity), sort_keys=True)
        return self.repetition, self.shape.name, self.cell.name, self.system.name, settings


def plan(shapes: Sequence[ModelShape], cells: Sequence[Cell], systems: Sequence[System], repeats: int) -> list[Task]:
    """Everything to run, in order: systems take turns within a cell. Work that would only be repeated is left out."""
    return [
        Task(repetition, shape, cell, system)
        for repetition in range(repeats)
        for shape in shapes
        for cell in cells
        for system in systems
        if system.does(cell)
    ]


def done_runs(rows: Sequence[Row], program: str) -> dict[Key, float]:
    """Tasks that have a clean run -> how many seconds it took; of our own system, only runs of this program."""
    return {
        (
            *(row["repetition"], row["shape"], row["cell"], row["system"]),
            json.dumps(row["settings"], sort_keys=True),
        ): row["wall_s"]
        for row in results.of_kind(rows, "peer")
        if row["is_clean"] and (row["system"] != OURS or row.get("program") == program)
    }


def is_repeated(task: Task, done: Mapping[Key, float], repeat_below_s: float) -> bool:
    """False if an earlier repetition of the task took so long that it is not repeated."""
    earlier = [done.get((repetition, *task.key[1:]), 0.0) for repetition in range(task.repetition)]
    return max(earlier, default=0.0) <= repeat_below_s


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


_NOMINAL = Ceilings(flops_per_s=8e11, bytes_per_s=5e10)
"""A two-core server processor, for telling how long things may take."""
_OVERHEAD_S = 2.0
"""Per run: waiting for quiet, and the short warm-up of a popularity."""
_LONG_WARM_UP = 0.4
"""Of a run: once per batch and process, its prompts."""


def expected_s(task: Task, done: Mapping[Key, float]) -> float:
    """Seconds that a run may take: as long as another repetition's did, else by the system's usual pace."""
    known = [wall_s for key, wall_s in done.items() if key[1:] == task.key[1:]]
    if known:
        return max(known)
    cell = task.cell
    adapters = tuple(workload.assign(cell.popularity, cell.batch))
    ranks = (workload.LORA_RANK,) * workload.NUM_ADAPTERS
    floor_s = job_floor_s(task.shape, Job(cell.num_prompt_tokens, cell.num_output_tokens, adapters, ranks), _NOMINAL)
    return task.system.pace.run_s(floor_s, len(set(adapters) - {None}))


def expected_text(tasks: Sequence[Task], done: Mapping[Key, float], repeat_below_s: float = REPEAT_BELOW_S) -> str:
    """How long the tasks may take, by shape and repetition; long runs count in their first repetition only."""
    seconds: dict[tuple[str, int], float] = {}
    seen: set[tuple[object, ...]] = set()
    for task in tasks:
        key = task.shape.name, task.repetition
        run_s = expected_s(task, done)
        if task.repetition and run_s > repeat_below_s:
            continue
        process = (*key, task.system.name, task.cell.popularity == "base")
        batch = (*process, task.cell.name.partition("/")[0])
        start_s = task.system.pace.start_s * (task.shape.num_parameters / SMOLLM2_135M.num_parameters) ** 0.5
        seconds[key] = seconds.get(key, 0.0) + run_s + _OVERHEAD_S
        seconds[key] += (0.0 if process in seen else start_s) + (0.0 if batch in seen else _LONG_WARM_UP * run_s)
        seen |= {process, batch}
    lines = [f"{shape}, repetition {number + 1}: {_minutes(value)}" for (shape, number), value in seconds.items()]
    total = f"expected, on two quiet server cores: {_minutes(sum(seconds.values()))}"
    return "\n".join([total, *(f"  {line}" for line in lines)] if len(lines) > 1 else [total])


def _minutes(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"
