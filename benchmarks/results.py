"""Rows of results: one JSON object per line, each with all it takes to know what was measured, and where.

Files are dated and only appended to: benchmarks/results/YYYY-MM-DD-WHAT.jsonl.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


def today() -> str:
    """UTC date, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def commit() -> str:
    """The commit of this checkout, with ``-dirty`` if the program (src, benchmarks) has changed since."""
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py", "setup.py"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "unknown")


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, vector extensions that matter, GPUs."""
    flags = _cpuinfo("flags").split()
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = [line for gpu in gpus for line in gpu.read_text().splitlines() if line.startswith("Model")]
    return {
        "cpu": f"{_cpuinfo('model name')} (family {_cpuinfo('cpu family')}, model {_cpuinfo('model')})",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "isa": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if flag in flags],
        "gpus": [line.partition(":")[2].strip() for line in models],
    }


def _command() -> str:
    """The command line, without where this checkout and home happen to be."""
    words = " ".join(["python", *sys.orig_argv[1:]])
    return words.replace(f"{ROOT}/", "").replace(str(Path.home()), "~")


def setup(**settings: Any) -> Row:
    """What every row of one invocation shares: when, which commit, on what, by which command."""
    return {
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "command": _command(),
        **settings,
    }


def default_file(what: str) -> Path:
    """Today's file of a kind of results."""
    return RESULTS / f"{today()}-{what}.jsonl"


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row; it is on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """All rows of a file; none if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def latest(what: str, folder: Path = RESULTS) -> Path | None:
    """The newest file of a kind of results."""
    return max(folder.glob(f"????-??-??-{what}.jsonl"), default=None)


def of_kind(rows: Iterable[Row], kind: str) -> Iterator[Row]:
    """The rows whose ``kind`` is this."""
    return (row for row in rows if row.get("kind") == kind)
