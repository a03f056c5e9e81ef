"""Facts about this machine that several layers ask for."""

import os


def num_usable_cores() -> int:
    """Cores that this process may run on; all of the machine's where the system cannot say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
