"""The walls of ARCHITECTURE.md, checked by machines: statically by import-linter, at run time in fresh interpreters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)


def tool(name):
    return str(Path(sys.executable).parent / name)


def test_imports_follow_the_layers():
    done = run(tool("lint-imports"), "--no-cache")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "package",
    [
        "pomona",
        "pomona.engine.engine",
        "pomona.server.app",
        "pomona.driver.client",
        "pomona.cli.main",
        "pomona.cli.serve",
        "pomona.cli.simulate",
    ],
)
def test_a_part_without_tensors_loads_no_torch(package):
    done = run(
        sys.executable,
        "-c",
        f"import {package}, sys; print([m for m in ('torch', 'triton', 'ray') if m in sys.modules])",
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_ruff_finds_nothing():
    done = run(tool("ruff"), "check", ".")
    assert done.returncode == 0, done.stdout
    done = run(tool("ruff"), "format", "--check", ".")
    assert done.returncode == 0, done.stdout


def test_strict_mypy_finds_nothing():
    done = run(tool("mypy"))
    assert done.returncode == 0, done.stdout
