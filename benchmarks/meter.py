"""Was the machine ours while something ran? Reads /proc (Linux): CPU time of a process tree, of all others, and what
the hypervisor took. Standard library only.
"""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

MAX_OTHER_PCT = 6.0
MAX_STEAL_PCT = 4.0
"""A run counts as clean when other processes and the hypervisor took no more than this of the machine."""

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """The first line of /proc/stat, in ticks summed over processors."""

    busy: int
    steal: int
    total: int

    @classmethod
    def parse(cls, line: str) -> "CpuTimes":
        """Read a line such as ``cpu 10 0 5 80 1 0 2 2 0 0``."""
        user, nice, system, idle, iowait, irq, softirq, steal = (int(field) for field in line.split()[1:9])
        busy = user + nice + system + irq + softirq
        return cls(busy=busy, steal=steal, total=busy + idle + iowait + steal)


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Shares of the machine's CPU time, percent."""

    own_pct: float
    other_pct: float
    steal_pct: float

    @property
    def is_clean(self) -> bool:
        """True if nobody else took enough to matter."""
        return self.other_pct <= MAX_OTHER_PCT and self.steal_pct <= MAX_STEAL_PCT

    @classmethod
    def between(cls, before: CpuTimes, after: CpuTimes, own_ticks: float) -> "Disturbance":
        """What happened between two readings, ``own_ticks`` of it by the process tree that was measured."""
        total = max(1, after.total - before.total)
        other = max(0.0, after.busy - before.busy - own_ticks)
        return cls(100.0 * own_ticks / total, 100.0 * other / total, 100.0 * (after.steal - before.steal) / total)


def cpu_times() -> CpuTimes:
    """The machine's counters now."""
    return CpuTimes.parse((_PROC / "stat").read_text().partition("\n")[0])


def process_tree(pid: int) -> list[int]:
    """A process and all its living descendants."""
    found, pending = [], [pid]
    while pending:
        found.append(pending.pop())
        for children in (_PROC / str(found[-1]) / "task").glob("*/children"):
            try:
                pending.extend(int(child) for child in children.read_text().split())
            except OSError:
                continue  # the thread has just ended
    return found


def process_ticks(pid: int) -> int:
    """CPU time of a process and of its descendants that have ended and were awaited, in ticks; 0 if it is gone."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(int(field) for field in fields[11:15])


def tree_ticks(pid: int) -> int:
    """CPU time of a process tree, in ticks."""
    return sum(process_ticks(member) for member in process_tree(pid))


def process_cpu_s(pid: int) -> float:
    """CPU time of the living threads of a process, to the nanosecond; 0 if it is gone."""
    total_ns = 0
    for task in (_PROC / str(pid) / "task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has just ended
            total_ns += int(task.read_text().split()[0])
    return total_ns / 1e9


def tree_cpu_s(pid: int) -> float:
    """CPU time of the living threads of a process tree."""
    return sum(process_cpu_s(member) for member in process_tree(pid))


def tree_memory_mib(pid: int) -> float:
    """Memory of a process tree now: proportional set size, so that shared pages count once."""
    kib = 0
    for member in process_tree(pid):
        try:
            lines = (_PROC / str(member) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kib / 1024


class Meter:
    """Context manager: wall time and disturbance while its block ran.

    Args:
        pids: processes whose trees are what is measured; this process's own tree holds them all by default.
    """

    def __init__(self, *pids: int) -> None:
        self._pids = pids or (os.getpid(),)
        self.wall_s = 0.0
        self.disturbance = Disturbance(0.0, 0.0, 0.0)

    def _own_ticks(self) -> int:
        return sum(tree_ticks(pid) for pid in self._pids)

    def __enter__(self) -> "Meter":
        self._own, self._before, self._start_s = self._own_ticks(), cpu_times(), time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wall_s = time.perf_counter() - self._start_s
        self.disturbance = Disturbance.between(self._before, cpu_times(), self._own_ticks() - self._own)


def wait_until_quiet(
    limit_s: float = 120.0, window_s: float = 1.0, report: Callable[[float], None] = lambda other_pct: None
) -> bool:
    """Wait until other processes leave the machine alone; give up after ``limit_s``. Returns whether it is quiet."""
    give_up_s = time.monotonic() + limit_s
    while True:
        with Meter() as meter:
            time.sleep(window_s)
        if meter.disturbance.is_clean:
            return True
        report(meter.disturbance.other_pct + meter.disturbance.steal_pct)
        if time.monotonic() >= give_up_s:
            return False
