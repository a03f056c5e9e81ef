"""Facts about this machine that several layers ask for: how much of it this process may use, also in a container.

A container finds its limits in files: those of cgroup version 2 in one folder, of version 1 in a folder for each kind.
"""

import os
from pathlib import Path

MAX_THREADS = 1024
"""Of a step: the processors that glibc's sets have room for. OpenMP keeps a record of each on the caller's stack, and
where it cannot start one, or its records find no room, the process is gone without a word to anybody.
"""
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat", ""),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
)
"""Limit, use, and of what that is made up, with what its names begin with; for either version."""


def num_usable_cores() -> int:
    """Cores that this process may keep busy: those it may run on, all of the machine's where the system cannot say
    (macOS); fewer if a container's share of time is less, as threads beyond that would be stopped again and again.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _words("cpu.max") or _words("cpu/cpu.cfs_quota_us") + _words("cpu/cpu.cfs_period_us")
    if share and all(word.isdigit() for word in share):  # no limit is "max", or -1
        quota_us, period_us = map(int, share)
        num_cores = min(num_cores, max(1, -(-quota_us // period_us)))
    return num_cores


def host_bytes() -> int:
    """Memory of this machine, or of this container if that is less."""
    num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([num_bytes, *(limit for limit, _ in _container_bytes())])


def available_host_bytes() -> int:
    """Free memory of this machine, or of this container if that is less."""
    available = host_bytes()
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    return min([available, *(max(limit - used, 0) for limit, used in _container_bytes())])


def _container_bytes() -> list[tuple[int, int]]:
    """The container's limit and what counts as used, if it has a limit."""
    found = []
    for limit_file, used_file, stat_file, prefix in _MEMORY_FILES:
        limit = "".join(_words(limit_file))
        if limit.isdigit():
            # Files that were read, such as the checkpoint, stay in memory that counts as used until somebody wants it.
            stat = _words(stat_file)
            counts = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
            used = int(_words(used_file)[0]) - counts[f"{prefix}inactive_file"] - counts[f"{prefix}active_file"]
            found.append((int(limit), used))
    return found


def _words(name: str) -> list[str]:
    """What one of the container's files says; nothing if there is no such file."""
    path = _CGROUP / name
    return path.read_text().split() if path.is_file() else []
