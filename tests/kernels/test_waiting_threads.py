"""How long idle threads spin (docs/design/0019): as torch's OpenMP runtime says itself when it is loaded."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
TORCH = Path(importlib.util.find_spec("torch").origin).parent
RUNTIMES = [*TORCH.glob("lib/libgomp*"), *TORCH.parent.glob("torch.libs/libgomp*")]


def spins(imports, **environment):
    others = {name: value for name, value in os.environ.items() if name not in NAMES}
    code = f"import ctypes{imports}; ctypes.CDLL({str(RUNTIMES[0])!r})"
    environment = {**others, "OMP_DISPLAY_ENV": "verbose", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return int(re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[1])


@pytest.mark.skipif(not RUNTIMES, reason="this torch brings another runtime")
def test_idle_threads_soon_leave_their_core_to_others():
    assert spins(", pomona") == 1000
    assert spins(", pomona", GOMP_SPINCOUNT="7") == 7
    assert spins(", pomona", OMP_WAIT_POLICY="active") == spins("", OMP_WAIT_POLICY="active") > 1000
