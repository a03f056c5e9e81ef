"""Rows of results: one JSON object per line, each with all it takes to know what was measured, and where.

Files are dated and only appended to: benchmarks/results/YYYY-MM-DD-WHAT.jsonl.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]

_SAME = ("program", "hardware", "settings", "dtype", "threads", "isa")
"""What has to be the same in rows that are repetitions of each other."""


def today() -> str:
    """UTC date, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _git(*words: str) -> str:
    """What a git command says; raises OSError or SubprocessError."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _is_dirty(*paths: str) -> bool:
    return bool(_git("status", "--porcelain", "--untracked-files=no", "--", *paths))


def commit() -> str:
    """The commit of this checkout, with ``-dirty`` if the program (src, benchmarks) has changed since."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}-dirty" if _is_dirty("src", "benchmarks/*.py", "setup.py") else head
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def program() -> str:
    """What was measured, by content: digest of the package, how it is built, and what it depends on.

    Rows of one program belong together even if commits to docs, tests or reports lie between them. With ``-dirty`` if
    there are changes that are not committed.
    """
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    try:
        trees = _git("rev-parse", "HEAD:src/pomona", "HEAD:setup.py")
        mark = "-dirty" if _is_dirty("src/pomona", "setup.py") else ""
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return hashlib.sha256(f"{trees} {dependencies}".encode()).hexdigest()[:16] + mark


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
    """The command line as a shell takes it, without where this checkout and home happen to be."""
    words = shlex.join(["python", *sys.orig_argv[1:]])
    return words.replace(f"{ROOT}/", "").replace(str(Path.home()), "~")


def setup(**settings: Any) -> Row:
    """What every row of one invocation shares: when, which program and commit, on what, by which command."""
    return {
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "program": program(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "command": _command(),
        **settings,
    }


def quick_folder() -> Path:
    """Where rows of ``--quick`` runs go: they show that everything works and mean nothing else."""
    return Path(tempfile.gettempdir()) / "pomona-bench-quick"


def positive(text: str) -> int:
    """An option's number, 1 or larger.

    Raises:
        ValueError: it is not; argparse says so.
    """
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def add_arguments(parser: argparse.ArgumentParser, what: str, *, repeats: int | None = 5) -> None:
    """The options that all measuring commands share.

    Args:
        parser: gets them.
        what: kind of results.
        repeats: default; None if the command has no repetitions.
    """
    if repeats is not None:
        parser.add_argument("--repeats", type=positive, default=repeats, help=f"default: {repeats}")
    parser.add_argument("--output", type=Path, help=f"default: today's benchmarks/results/DATE-{what}.jsonl")
    parser.add_argument("--accept-noise", action="store_true", help="do not wait for a quiet machine, repeat nothing")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, once, rows into a temporary folder: to see that it works"
    )


def parse(parser: argparse.ArgumentParser, what: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line with the options of ``add_arguments``; ``--quick`` is spelled out."""
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.accept_noise = True
        arguments.repeats = 1
        arguments.shape = ["tiny"]
    folder = quick_folder() if arguments.quick else RESULTS
    arguments.output = arguments.output or folder / f"{today()}-{what}.jsonl"
    return arguments


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


def of_last_program(rows: Sequence[Row]) -> list[Row]:
    """The rows of the program that was measured last, on the same machine and with the same settings; a file may hold
    several. A row that does not say what another one says, being of another kind, counts."""
    return [
        row for row in rows if all(row.get(key, rows[-1].get(key)) == rows[-1].get(key, row.get(key)) for key in _SAME)
    ]


def latest(what: str, folder: Path = RESULTS) -> Path | None:
    """The newest file of a kind of results."""
    return max(folder.glob(f"????-??-??-{what}.jsonl"), default=None)


def of_kind(rows: Iterable[Row], kind: str) -> Iterator[Row]:
    """The rows whose ``kind`` is this."""
    return (row for row in rows if row.get("kind") == kind)
