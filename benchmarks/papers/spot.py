"""A day on spot instances: the g4dn trace of SpotServe's artifact (10.8 hours, up to 24 nodes that come and go), a load
that needs about six of them, and what interruptions do to requests.

    python -m benchmarks.papers.spot

Every request must end with a whole answer: what a lost replica had goes on elsewhere, computed again from its prompt
and the tokens delivered so far. SpotServe (ASPLOS'24) reports a cost of 46 % of on-demand; prices here are its ratio.
"""

import gzip
import importlib.resources
import itertools

from benchmarks.papers.lines import Line, Panel, line_chart
from benchmarks.papers.published import Report, arguments
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
from pomona.workload.traces import read_spot_events

SPOT_PRICE = 1.9 / 3.9
"""Of on-demand, g4dn.12xlarge (dollars per hour in SpotServe, section 6.1)."""
NOTICE_S = 30.0
SLO = Slo(ttft_s=10.0, tpot_s=0.3)
SCHEDULER = SchedulerConfig(
    num_kv_blocks=3000,
    max_model_len=2048,
    num_adapter_pages=128,
    max_num_seqs=64,
    enable_prefix_cache=False,
    min_prefix_wait_tokens=0,
)
COST = LinearCost(
    0.09, (CostTerm("num_rows", 1e-3), CostTerm("num_kv_tokens", 2e-6), CostTerm("sum_adapter_ranks", 1.5e-5))
)
"""A model of 30 billion weights in fp16 over the four T4s of a node: 15 GB per device at some 0.22 TB/s and the
exchanges between them; 60 GFLOP per token at some 60 TFLOP/s."""


def availability() -> tuple[tuple[float, int], ...]:
    """(seconds since the first node came, nodes up)."""
    packed = (importlib.resources.files("pomona.workload") / "data" / "spot-g4dn-12xlarge.csv.gz").read_bytes()
    capacity = read_spot_events(gzip.decompress(packed).decode().splitlines())
    return tuple((time_s - capacity[0][0], nodes) for time_s, nodes in capacity)


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
    parser.add_argument("--rate", type=float, default=3.0)
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
    for before, after in itertools.pairwise(availability()):
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
