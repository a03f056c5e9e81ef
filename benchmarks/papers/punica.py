"""Punica's consolidation ramp (arXiv 2310.18547, figure of section 7.3): 16 replicas, an hour of load that rises and
falls, adapters by Zipf-1.5. Requests gather on as few replicas as carry them, and empty ones can be released.

    python -m benchmarks.papers.punica

Published is a picture: busy GPUs run at the batch limit of 32, the others are idle, and the last ones in use change as
the load does. Here the same is drawn, and beside it the least-loaded policy, which keeps every replica half busy.
"""

import heapq
import itertools
import math
import random
from collections.abc import Iterator

from benchmarks.papers.lines import Line, Panel, line_chart
from benchmarks.papers.published import A100_LLAMA_7B, Report, arguments
from pomona.metrics.slo import Slo
from pomona.router.autoscale import AutoscalerConfig
from pomona.router.fleet import PolicyName, RouterConfig
from pomona.sched.config import SchedulerConfig
from pomona.sim.cluster import ClusterSim
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.workload.lengths import LognormalLength
from pomona.workload.popularity import GroupPopularity
from pomona.workload.spec import WorkloadRequest

NUM_REPLICAS, MAX_BATCH, NUM_ADAPTERS = 16, 32, 16
SCHEDULER = SchedulerConfig(
    num_kv_blocks=2700,  # 40 GB less 13.5 GB of weights and 2 GB of activations, at 0.5 MB per token
    max_model_len=2048,
    num_adapter_pages=2 * MAX_BATCH,
    max_num_seqs=MAX_BATCH,
    enable_prefix_cache=False,
    min_prefix_wait_tokens=0,
)


def ramp(peak_rps: float, duration_s: float) -> Iterator[WorkloadRequest]:
    """Poisson arrivals whose rate rises to a peak and falls again; lengths of Punica's script (section 1.6)."""
    rng, half_s = random.Random("punica"), duration_s / 2
    prompts = LognormalLength(18.0, 0.8, 2046, shift_tokens=-1)
    adapters = GroupPopularity("zipf-1.5", NUM_ADAPTERS, MAX_BATCH).indices(rng)
    expected = 0.0
    for index in adapters:
        expected += rng.expovariate(1.0)
        before = min(expected, peak_rps * half_s / 2)
        left = peak_rps * half_s - expected
        if left <= 0.0:
            return
        rising_s = math.sqrt(2 * half_s * before / peak_rps)
        arrival_s = rising_s if expected == before else duration_s - math.sqrt(2 * half_s * left / peak_rps)
        num_prompt = prompts.draw(rng)
        yield WorkloadRequest(arrival_s, num_prompt, max(2, rng.randrange(2048) - num_prompt), index)


def simulate(policy: PolicyName, peak_rps: float, duration_s: float) -> ClusterSim:
    config = ClusterConfig(
        SCHEDULER,
        A100_LLAMA_7B,
        RouterConfig(policy, max_requests=MAX_BATCH),
        AutoscalerConfig(max_replicas=NUM_REPLICAS),
        NUM_REPLICAS,
        slo=Slo(tpot_s=0.1),
        counts_output_kv=False,
        consolidation_interval_s=15.0 if policy == "punica" else None,
        sample_interval_s=duration_s / 240,
    )
    sim = ClusterSim(config, AdapterPopulation((16,), AdapterPages(rows_per_page=16)))
    sim.run(ramp(peak_rps, duration_s))
    return sim


def figures(sim: ClusterSim) -> dict[str, float]:
    """How far the load was gathered."""
    loads = [load for sample in sim.samples for _, load in sample.loads]
    busy = [load for load in loads if load > 0]
    summary = sim.ledger.summary(sim.config.slo, sim.end_s)
    assert summary.tpot_s is not None
    assert summary.ttft_s is not None
    return {
        "num_requests": summary.num_requests,
        "busy_share_of_replica_time": len(busy) / len(loads),
        "mean_batch_of_busy_replicas": sum(busy) / len(busy),
        "busy_time_share_at_24_or_more": sum(load >= 24 for load in busy) / len(busy),
        "num_moves": sim.num_moves,
        "tpot_p50_ms": 1e3 * summary.tpot_s.p50,
        "ttft_p99_s": summary.ttft_s.p99,
    }


def main() -> None:
    parser = arguments(__doc__, "punica")
    parser.add_argument("--duration", type=float, default=3600.0)
    parser.add_argument("--peak", type=float, default=15.0, help="requests per second at the top of the ramp")
    options = parser.parse_args()
    report = Report("punica", options.output, duration_s=options.duration, peak_rps=options.peak)
    sims = {}
    for policy in ("punica", "least-loaded"):
        sims[policy] = simulate(policy, options.peak, options.duration)
        report.add("ramp", {"policy": policy} | figures(sims[policy]))
    report.draw(chart(sims, options.duration))


def chart(sims: dict[str, ClusterSim], duration_s: float) -> str:
    def loads(sim: ClusterSim) -> tuple[Line, ...]:
        samples = [sample for sample in sim.samples if sample.now_s <= duration_s]
        series = [tuple((s.now_s / 60, dict(s.loads)[k]) for s in samples) for k, _ in samples[0].loads]
        return tuple(Line("", points) for points in heapq.nsmallest(NUM_REPLICAS, series))

    def in_use(policy: str, sim: ClusterSim) -> Line:
        samples = itertools.takewhile(lambda sample: sample.now_s <= duration_s, sim.samples)
        return Line(policy, tuple((s.now_s / 60, sum(load > 0 for _, load in s.loads)) for s in samples))

    panels = [Panel("replicas in use", tuple(in_use(policy, sim) for policy, sim in sims.items()))]
    panels += [Panel(f"requests on each replica, {policy}", loads(sim)) for policy, sim in sims.items()]
    return line_chart("Punica's ramp: 16 replicas", "minutes", panels)


if __name__ == "__main__":
    main()
