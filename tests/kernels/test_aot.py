"""Triton kernels compile for real GPUs at real shapes without one, and keep what they work on in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

# KiB of shared memory that one program may use.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}


def _compile(compute_capability: int, group: str, cache_dir: Path) -> list[dict[str, Any]]:
    """In a process that does not interpret; compiled programs are kept from one test run to the next."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env |= {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(cache_dir)}
    command = [sys.executable, "-m", "support.triton_aot", str(compute_capability), group]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check(programs: list[dict[str, Any]], compute_capability: int) -> None:
    assert {program["compute_capability"] for program in programs} == {compute_capability}
    spilling = [program for program in programs if program["spill_bytes"] or program["stack_bytes"]]
    assert not spilling
    too_large = [program for program in programs if program["shared_bytes"] > SHARED_LIMITS[compute_capability]]
    assert not too_large


@pytest.mark.parametrize("compute_capability", [80, 90])
def test_kernels_of_every_step_compile_without_spills(compute_capability: int, pytestconfig: pytest.Config) -> None:
    programs = _compile(compute_capability, "hot", pytestconfig.cache.mkdir("triton"))
    assert {program["kernel"] for program in programs} == {
        *("shrink_kernel", "expand_kernel", "attend_kernel", "merge_kernel", "write_kv_kernel"),
        *("rms_norm_kernel", "rope_kernel", "silu_mul_kernel", "int8_row_kernel", "int8_tile_kernel"),
    }
    _check(programs, compute_capability)


@pytest.mark.slow
@pytest.mark.parametrize("compute_capability", [80, 90])
def test_kernels_of_all_shapes_and_ranks_compile_without_spills(
    compute_capability: int, pytestconfig: pytest.Config
) -> None:
    _check(_compile(compute_capability, "all", pytestconfig.cache.mkdir("triton")), compute_capability)
