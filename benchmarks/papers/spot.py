"""A day on spot instances: the g4dn trace of SpotServe's artifact (10.8 hours, up to 24 nodes that come and go), a load
that needs about eight of them, and what interruptions do to requests.

    python -m benchmarks.papers.spot

Every request must end with a whole answer: what a lost replica had goes on elsewhere, computed again from its prompt
and the tokens delivered so far. SpotServe (ASPLOS'24) reports a cost of 46 % of on-demand; prices here are its ratio.
"""

import csv

from benchmarks.papers.lines import Line, Panel, line_chart
from benchmarks.papers.published import DATA, Report, arguments
from pomona.metrics.slo import Slo
from pomona.router.autoscale import AutoscalerConfig
from pomona.router.fleet import RouterConfig
from pomona.sched.config import SchedulerConfig
from pomona.sim.cluster import ClusterSim
from pomona.sim.cluster_config import ClusterConfig, LossConfig
from pomona.sim.cost_model import CostTerm, LinearCost
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.workload.arrivals import GammaArrivals
from pomona.workload.lengths import UniformLength
from pomona.workload.popularity import ZipfPopularity
from pomona.workload.spec import WorkloadSpec, iter_requests

SPOT_PRICE = 1.9 / 3.9
"""Of on-demand, g4dn.12xlarge (dollars per hour in SpotServe, section 6.1)."""
NOTICE_S = 30.0
SLO = Slo(ttft_s=5.0, tpot_s=0.1)
SCHEDULER = SchedulerConfig(
    num_kv_blocks=3000,
    max_model_len=2048,
    num_adapter_pages=128,
    max_num_seqs=64,
    enable_prefix_cache=False,
    min_prefix_wait_tokens=0,
)
COST = LinearCost(
    0.03, (CostTerm("num_rows", 3e-4), CostTerm("num_kv_tokens", 8e-7), CostTerm("sum_adapter_ranks", 5e-6))
)
"""A model of 7 billion weights over the four T4s of a node: 3.4 GB per device at 0.2 TB/s, 14 GFLOP per token."""


def availability() -> tuple[tuple[float, int], ...]:
    """(seconds, nodes up) from the trace."""
    changes: dict[float, int] = {}
    with (DATA / "spot_g4dn_12xlarge.csv").open() as file:
        for time_ms, op, _ in csv.reader(file):
            changes[float(time_ms) / 1000] = changes.get(float(time_ms) / 1000, 0) + (1 if op == "add" else -1)
    capacity, nodes = [], 0
    first_s = min(changes)
    for time_s in sorted(changes):
        nodes += changes[time_s]
        capacity.append((time_s - first_s, nodes))
    return tuple(capacity)


def simulate(name: str, rate_rps: float, duration_s: float) -> ClusterSim:
    capacity = () if name == "on-demand" else availability()
    on_notice = "move" if name == "spot, move at the notice" else "stay"
    config = ClusterConfig(
        SCHEDULER,
        COST,
        RouterConfig("least-loaded"),
        AutoscalerConfig("target-utilisation", 2, 24, interval_s=15.0, target_requests=24.0, num_calm=8),
        num_replicas=4,
        start_s=120.0,
        losses=LossConfig(capacity=capacity, notice_s=NOTICE_S, on_notice=on_notice),  # type: ignore[arg-type]
        slo=SLO,
        sample_interval_s=duration_s / 300,
    )
    spec = WorkloadSpec(
        round(rate_rps * duration_s),
        GammaArrivals(rate_rps, 2.0),
        UniformLength(32, 512),
        UniformLength(32, 256),
        ZipfPopularity(1000, 0.92),
    )
    sim = ClusterSim(config, AdapterPopulation((8, 16, 32, 64), AdapterPages(rows_per_page=16)))
    sim.run(iter_requests(spec))
    return sim


def main() -> None:
    parser = arguments(__doc__, "spot")
    parser.add_argument("--duration", type=float, default=38_880.0)
    parser.add_argument("--rate", type=float, default=4.0)
    options = parser.parse_args()
    report = Report("spot", options.output, duration_s=options.duration, rate_rps=options.rate)
    sims = {}
    for name in ("on-demand", "spot, stay until the loss", "spot, move at the notice"):
        sim = sims[name] = simulate(name, options.rate, options.duration)
        summary = sim.ledger.summary(SLO, sim.end_s)
        assert summary.ttft_s is not None
        price = 1.0 if name == "on-demand" else SPOT_PRICE
        report.add(
            "day",
            {
                "fleet": name,
                "num_requests": summary.num_requests,
                "num_unfinished": summary.num_requests - summary.num_finished,
                "num_lost_replicas": sum(record.is_lost for record in sim.replicas.values()),
                "num_restarts": summary.num_restarts,
                "attainment": summary.attainment,
                "ttft_p50_s": summary.ttft_s.p50,
                "ttft_p99_s": summary.ttft_s.p99,
                "replica_hours": sim.replica_s() / 3600,
                "cost_of_on_demand_hours": price * sim.replica_s() / 3600,
            },
        )
    report.draw(chart(sims))


def chart(sims: dict[str, ClusterSim]) -> str:
    spot = sims["spot, stay until the loss"]
    hours = [sample.now_s / 3600 for sample in spot.samples]
    nodes: list[tuple[float, float]] = []
    for before, after in zip(availability(), availability()[1:], strict=False):
        nodes += [(before[0] / 3600, before[1]), (after[0] / 3600, before[1])]
    replicas = [
        Line("nodes to be had", tuple(point for point in nodes if point[0] <= hours[-1])),
        Line("serving", tuple((hour, len(s.loads)) for hour, s in zip(hours, spot.samples, strict=True))),
    ]
    waiting = Line(
        "on replicas", tuple((h, sum(n for _, n in s.loads)) for h, s in zip(hours, spot.samples, strict=True))
    )
    panels = [Panel("replicas", tuple(replicas)), Panel("requests", (waiting,))]
    return line_chart("A spot-interruption day (SpotServe's g4dn trace)", "hours", panels)


if __name__ == "__main__":
    main()
