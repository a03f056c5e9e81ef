"""How fast a large cluster is simulated: 1,000 replicas, 1,000,000 adapters, 50,000 requests per second offered.

    python -m benchmarks.scale_sim                     # two simulated seconds, one process
    python -m benchmarks.scale_sim --processes 2       # replicas in two more processes
    python -m benchmarks.scale_sim --profile           # and where the time of one process goes

The simulator runs one scheduler per replica, the real one, so its work is that of the schedulers: some microseconds for
every token of every request. The first simulated second does not count: requests come, and few end. After it the load
is steady, and the time for ten simulated minutes follows by proportion; the row says that it was extrapolated.
"""

import argparse
import cProfile
import gc
import json
import pstats
import resource
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, get_args

from benchmarks import results
from benchmarks.shard_processes import ProcessShard
from pomona.core.ids import ReplicaId
from pomona.metrics.slo import Slo
from pomona.router.autoscale import AutoscalerConfig
from pomona.router.fleet import PolicyName, RouterConfig
from pomona.sched.config import SchedulerConfig
from pomona.sim.cluster import ClusterSim
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.cost_model import CostTerm, LinearCost
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.sim.sharded import ShardedSim, shard_of
from pomona.workload.arrivals import PoissonArrivals
from pomona.workload.lengths import UniformLength
from pomona.workload.popularity import ZipfPopularity
from pomona.workload.spec import WorkloadRequest, WorkloadSpec, iter_requests

GOAL_S = 600.0
STEADY_S = 1.0
"""The cluster is in its steady state from then on."""
SCHEDULER = SchedulerConfig(
    num_kv_blocks=6000,
    max_model_len=2048,
    num_adapter_pages=1024,
    max_num_seqs=256,
    enable_prefix_cache=False,
    min_prefix_wait_tokens=0,
)
COST = LinearCost(
    0.012,
    (CostTerm("num_rows", 3.5e-5), CostTerm("num_kv_tokens", 1.5e-7), CostTerm("sum_adapter_ranks", 1e-6)),
)
"""Between an A100 and an H100 with a model of 7 billion weights."""
PROMPTS, OUTPUTS = UniformLength(16, 240), UniformLength(8, 56)


RANKS, ROWS_PER_PAGE = (8, 16, 32, 64), 8


def make_config(num_replicas: int, policy: PolicyName) -> ClusterConfig:
    return ClusterConfig(
        SCHEDULER,
        COST,
        RouterConfig(policy, max_requests=128),
        AutoscalerConfig(max_replicas=num_replicas),
        num_replicas,
        slo=Slo(ttft_s=0.5, tpot_s=0.05),
    )


def make_adapters() -> AdapterPopulation:
    return AdapterPopulation(RANKS, AdapterPages(ROWS_PER_PAGE))


def workload(num_adapters: int, rate_rps: float, duration_s: float) -> WorkloadSpec:
    return WorkloadSpec(
        round(rate_rps * duration_s), PoissonArrivals(rate_rps), PROMPTS, OUTPUTS, ZipfPopularity(num_adapters, 0.92)
    )


class Mark(NamedTuple):
    """How far a simulation is."""

    wall_s: float
    num_requests: int
    num_tokens: int
    num_steps: int


def _rates(begin: Mark, end: Mark, simulated_s: float) -> results.Row:
    """What was simulated between two marks."""
    wall_s = end.wall_s - begin.wall_s
    return {
        "simulated_s": simulated_s,
        "wall_s": wall_s,
        "num_requests": end.num_requests - begin.num_requests,
        "requests_per_wall_s": (end.num_requests - begin.num_requests) / wall_s,
        "tokens_per_wall_s": (end.num_tokens - begin.num_tokens) / wall_s,
        "steps_per_wall_s": (end.num_steps - begin.num_steps) / wall_s,
        "extrapolated_hours_for_ten_minutes": wall_s / simulated_s * GOAL_S / 3600,
    }


def measure(
    num_replicas: int, num_adapters: int, rate_rps: float, duration_s: float, policy: PolicyName
) -> results.Row:
    """Simulate to ``duration_s``; what is counted begins at ``STEADY_S``."""
    sim = ClusterSim(make_config(num_replicas, policy), make_adapters())

    def mark() -> Mark:
        wall_s, stats = time.perf_counter(), [member.replica.stats for member in sim._members.values()]
        tokens, steps = sum(one.num_output_tokens for one in stats), sum(one.num_steps for one in stats)
        return Mark(wall_s, len(sim.ledger), tokens, steps)

    marks: list[Mark] = []
    sim.heap.at(STEADY_S, lambda: marks.append(mark()))
    sim.run(iter_requests(workload(num_adapters, rate_rps, duration_s)), duration_s)
    marks.append(mark())
    return {
        "num_replicas": num_replicas,
        "num_adapters": num_adapters,
        "num_processes": 1,
        "rate_rps": rate_rps,
        "policy": policy,
        **_rates(marks[0], marks[-1], duration_s - STEADY_S),
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "busy_share": sum(record.busy_s for record in sim.replicas.values()) / (num_replicas * duration_s),
    }


def measure_sharded(
    num_replicas: int, num_adapters: int, rate_rps: float, duration_s: float, policy: PolicyName, num_processes: int
) -> results.Row:
    """The same with the replicas in processes of their own, which report to the router every 50 ms."""
    config, context = make_config(num_replicas, policy), get_context("spawn")
    shares = [
        [ReplicaId(k) for k in range(num_replicas) if shard_of(k, num_processes) == shard]
        for shard in range(num_processes)
    ]
    shards = [ProcessShard(context, config, RANKS, ROWS_PER_PAGE, share) for share in shares]
    try:
        sim = ShardedSim(config, make_adapters(), shards)

        def mark(num_requests: int) -> Mark:
            wall_s, figures = time.perf_counter(), [shard.figures() for shard in shards]
            tokens, steps = sum(one.num_output_tokens for one in figures), sum(one.num_steps for one in figures)
            return Mark(wall_s, num_requests, tokens, steps)

        marks: list[Mark] = []
        sim.run(
            _marked(workload(num_adapters, rate_rps, duration_s), lambda number: marks.append(mark(number))), duration_s
        )
        marks.append(mark(len(sim.ledger)))
        figures = [shard.figures() for shard in shards]
    finally:
        for shard in shards:
            shard.close()
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "num_replicas": num_replicas,
        "num_adapters": num_adapters,
        "num_processes": num_processes,
        "rate_rps": rate_rps,
        "policy": policy,
        **_rates(marks[0], marks[-1], duration_s - STEADY_S),
        "peak_rss_gib": own + sum(one.peak_rss_bytes for one in figures) / 2**30,
        "busy_share": sum(one.busy_s for one in figures) / (num_replicas * duration_s),
    }


def _marked(spec: WorkloadSpec, mark: Callable[[int], None]) -> Iterator[WorkloadRequest]:
    """The spec's requests; ``mark`` is called with how many come before ``STEADY_S``, once all shards are there."""
    is_steady = False
    for number, request in enumerate(iter_requests(spec)):
        yield request
        if not is_steady and request.arrival_s >= STEADY_S:  # has been routed: its interval has begun
            is_steady = True
            mark(number)


PARTS = {
    "scheduler": ("pomona/sched/", "pomona/engine/", "pomona/core/"),
    "executor and cost model": ("sim/executor", "sim/step_work", "sim/cost_model"),
    "replica and heap": ("sim/replica", "sim/clock"),
    "router": ("pomona/router/",),
    "cluster and ledger": ("sim/cluster", "sim/ledger", "sim/fleet_size", "sim/prompts", "sim/population"),
    "workload": ("pomona/workload/", "random.py"),
}


def profile(
    num_replicas: int, num_adapters: int, rate_rps: float, duration_s: float, policy: PolicyName
) -> results.Row:
    """Share of the time in each part, built-in functions counted where they are called."""
    sim = ClusterSim(make_config(num_replicas, policy), make_adapters())
    requests = iter_requests(workload(num_adapters, rate_rps, duration_s))
    profiler = cProfile.Profile()
    profiler.enable()
    sim.run(requests, duration_s)
    profiler.disable()
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    totals = dict.fromkeys((*PARTS, "other"), 0.0)

    def part_of(path: str) -> str:
        return next((name for name, places in PARTS.items() if any(place in path for place in places)), "other")

    for (path, _, _), (_, _, own_s, _, callers) in stats.items():
        if path == "~" and callers:
            for (caller, _, _), (_, _, caller_own_s, _) in callers.items():
                totals[part_of(caller)] += caller_own_s
        else:
            totals[part_of(path)] += own_s
    whole_s = sum(totals.values())
    return {f"share {name}": seconds / whole_s for name, seconds in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=results.positive, nargs="+", default=[1000])
    parser.add_argument("--adapters", type=results.positive, default=1_000_000)
    parser.add_argument("--rate-per-replica", type=float, default=50.0)
    parser.add_argument("--duration", type=float, default=2.0, help="simulated seconds")
    parser.add_argument("--policy", choices=get_args(PolicyName), default="affinity")
    parser.add_argument(
        "--processes", type=results.positive, default=1, help="1 simulates in this process, on one heap"
    )
    parser.add_argument("--profile", action="store_true", help="a second, shorter run under a profiler")
    parser.add_argument("--output", type=Path, help="default: today's benchmarks/results/DATE-scale.jsonl")
    options = parser.parse_args()
    if not options.duration > STEADY_S:
        parser.error(f"--duration {options.duration:g}: must be more than {STEADY_S:g}, when what is counted begins")
    output = options.output or results.RESULTS / f"{results.today()}-scale.jsonl"
    setup = results.setup()
    # Nothing the simulator makes is cyclic garbage; the collector would visit every live request again and again.
    gc.disable()
    for num_replicas in options.replicas:
        rate_rps = options.rate_per_replica * num_replicas
        case = (num_replicas, options.adapters, rate_rps, options.duration, options.policy)
        row = measure(*case) if options.processes == 1 else measure_sharded(*case, options.processes)
        results.append(output, setup | {"kind": "scale"} | row)
        print(json.dumps(row))
        if options.profile:
            shares = profile(num_replicas, options.adapters, rate_rps, min(options.duration, 0.8), options.policy)
            results.append(output, setup | {"kind": "profile", "num_replicas": num_replicas} | shares)
            print(json.dumps(shares))


if __name__ == "__main__":
    main()
