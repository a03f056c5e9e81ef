"""Where a result was measured: hardware and commit, as strings for the report. Reads files; asks no network."""

import os
import platform
import subprocess
from pathlib import Path

import pomona
from pomona.core.machine import num_usable_cores


def _first_value(path: Path, key: str) -> str | None:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def describe_hardware() -> str:
    """Return processor, usable cores, memory and NVIDIA GPUs of this machine."""
    processor = _first_value(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = [_first_value(gpu, "Model") or "NVIDIA GPU" for gpu in gpus]
    return ", ".join([processor, f"{num_usable_cores()} cores", f"{memory_gib:.0f} GiB", *names])


def find_commit() -> str | None:
    """Return the commit of the source tree this package runs from, ``-dirty`` if changed; None if it is installed."""
    package = Path(pomona.__file__).resolve().parent
    root = package.parent.parent
    if not (root / ".git").exists():
        return None
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(root),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
