"""The same events give the same plans in every process, whatever Python's hash seed."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
PROGRAM = """
import hashlib
from support.engine import EngineHarness, make_request
harness = EngineHarness(num_kv_blocks=10, num_adapter_pages=2, adapter_wait_limit_s=1.0, min_prefix_wait_tokens=4)
for name in ("x", "y", "z"):
    harness.register(name)
for index in range(24):
    prompt = [1, 2, 3, 4, 5, 6, index % 3]
    harness.add(make_request(f"r{index}", prompt, 2 + index % 9, adapter=(None, "x", "y", "z")[index % 4]))
    harness.step(0.5)
    if index % 7 == 6:
        harness.abort(f"r{index - 3}")
harness.run()
assert harness.engine.stats().num_preemptions and harness.engine.stats().num_adapter_evictions
print(hashlib.sha256(repr(harness.executor.plans).encode()).hexdigest())
"""


def plans_digest(hash_seed: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{TESTS}:{TESTS.parent / 'src'}"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_plans_do_not_depend_on_hash_order():
    assert plans_digest("1") == plans_digest("2") == plans_digest("3")
