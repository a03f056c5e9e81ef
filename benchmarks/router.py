"""What a routing decision costs: every policy at 10 to 10,000 replicas, under a steady stream of sends and ends.

    python -m benchmarks.router

One row per policy and size: microseconds of a decision, and of a request's whole part in the router (choose, sent,
ended). The load is 16 requests per replica; a scan over all replicas is measured beside it.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import get_args

from benchmarks import results
from pomona.core.ids import AdapterId, ReplicaId
from pomona.router.fleet import Fleet, PolicyName, RouterConfig
from pomona.router.rank_aware import StepModel
from pomona.router.snapshot import ReplicaSnapshot, RouteRequest

SIZES = (10, 100, 1_000, 10_000)
REQUESTS_PER_REPLICA = 16
RANKS = (8, 16, 32, 64)
NUM_ADAPTERS = 100_000


def requests(num_requests: int, seed: int = 0) -> list[RouteRequest]:
    """Zipf-like adapters of mixed ranks, prompts of which a third begins with one of a thousand prefixes."""
    rng = random.Random(seed)
    made = []
    for _ in range(num_requests):
        adapter = int(NUM_ADAPTERS ** rng.random()) - 1
        num_tokens = rng.randint(64, 2048)
        prefix = rng.randrange(3000)
        keys = tuple(f"{prefix}/{k}".encode() for k in range(num_tokens // 512)) if prefix < 1000 else ()
        rank = RANKS[adapter % 4]
        made.append(RouteRequest(num_tokens, num_tokens, AdapterId(f"a{adapter}"), rank, keys, rank))
    return made


def make_fleet(policy: PolicyName, num_replicas: int, form: str = "sum") -> Fleet:
    model = StepModel(base_s=0.012, row_s=1e-5, rank_row_s=1e-6, prompt_token_s=2e-5, form=form)  # type: ignore[arg-type]
    fleet = Fleet(RouterConfig(policy, max_requests=32, max_step_s=0.0135, step_model=model))
    for k in range(num_replicas):
        fleet.report(
            ReplicaSnapshot(ReplicaId(k), num_kv_tokens=65_536, num_free_kv_tokens=65_536, num_adapter_rows=2048)
        )
    return fleet


def measure(policy: PolicyName, num_replicas: int, num_decisions: int, form: str = "sum") -> dict[str, float]:
    """Microseconds per decision and per request, medians of five runs of the stream."""
    fleet = make_fleet(policy, num_replicas, form)
    stream = requests(2 * REQUESTS_PER_REPLICA * num_replicas if num_replicas < 1000 else 50_000)
    running: deque[tuple[ReplicaId, RouteRequest]] = deque()
    position = 0

    def turn(num_turns: int) -> float:
        nonlocal position
        choosing_s = 0.0
        for _ in range(num_turns):
            request = stream[position % len(stream)]
            position += 1
            start_s = time.perf_counter()
            chosen = fleet.choose(request)
            choosing_s += time.perf_counter() - start_s
            if chosen is not None:
                fleet.sent(chosen, request)
                running.append((chosen, request))
            if len(running) > REQUESTS_PER_REPLICA * num_replicas:
                fleet.ended(*running.popleft())
        return choosing_s

    turn((REQUESTS_PER_REPLICA + 1) * num_replicas)
    choosing, whole = [], []
    for _ in range(5):
        start_s = time.perf_counter()
        choosing.append(turn(num_decisions) / num_decisions)
        whole.append((time.perf_counter() - start_s) / num_decisions)
    return {"decision_us": 1e6 * statistics.median(choosing), "request_us": 1e6 * statistics.median(whole)}


def scan(num_replicas: int) -> float:
    """Microseconds of looking at every replica once, as a policy without an index would."""
    fleet = make_fleet("least-loaded", num_replicas)
    states = fleet.states
    num_scans = max(3, 100_000 // num_replicas)
    start_s = time.perf_counter()
    for _ in range(num_scans):
        min(states, key=lambda state: (state.num_requests, state.replica_id))
    return 1e6 * (time.perf_counter() - start_s) / num_scans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="default: today's benchmarks/results/DATE-router.jsonl")
    parser.add_argument("--decisions", type=results.positive, default=4000, help="decisions per run")
    parser.add_argument("--sizes", type=results.positive, nargs="+", default=SIZES)
    options = parser.parse_args()
    output = options.output or results.RESULTS / f"{results.today()}-router.jsonl"
    setup = results.setup()
    rows = []
    for num_replicas in options.sizes:
        cases = [(policy, "sum") for policy in get_args(PolicyName)] + [("rank-aware", "max")]
        for policy, form in cases:
            name = f"rank-aware-{form}" if policy == "rank-aware" else policy
            cost = measure(policy, num_replicas, options.decisions, form)
            rows.append({"kind": "router", "policy": name, "num_replicas": num_replicas, **cost})
        rows.append(
            {"kind": "router", "policy": "(a scan)", "num_replicas": num_replicas, "decision_us": scan(num_replicas)}
        )
        for row in rows[-len(cases) - 1 :]:
            print(json.dumps(row), file=sys.stderr)
    for row in rows:
        results.append(output, setup | row)
    print(json.dumps(rows[-1]))


if __name__ == "__main__":
    main()
