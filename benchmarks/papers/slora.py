"""S-LoRA's sweep over the number of adapters (arXiv 2311.03285, table 3): one A100-80G, Llama-7B, ranks 8 to 64 (its
setting S2), 10 requests per second, lengths uniform in 8 to 512.

    python -m benchmarks.papers.slora

The dense cost is that of the same card in Punica's paper. The throughput with one adapter fixes one number, the time
that a row with an adapter adds; what the base model alone reaches, and how throughput falls with more adapters, is then
the simulation's own, from the bytes of adapters that a step reads.
"""

from benchmarks.papers.lines import Line, Panel, line_chart
from benchmarks.papers.published import A100_LLAMA_7B, Report, arguments
from pomona.metrics.slo import Slo
from pomona.router.autoscale import AutoscalerConfig
from pomona.sched.config import SchedulerConfig
from pomona.sim.cluster import ClusterSim
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.cost_model import CostTerm, LinearCost
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.workload.arrivals import GammaArrivals
from pomona.workload.lengths import UniformLength
from pomona.workload.popularity import BaseOnly, ZipfPopularity
from pomona.workload.spec import WorkloadSpec, iter_requests

PUBLISHED = {0: 9.64, 1: 7.74, 5: 7.48, 100: 7.29, 200: 7.52, 1000: 6.69, 2000: 6.71}
"""Adapters -> requests per second; 0, 1 and 200 from the artifact's result files, the others from the paper's table."""
RANKS = (64, 32, 16, 8)
RATE_RPS, SLO = 10.0, Slo(ttft_s=6.0)
MEMORY_BYTES_PER_S = 1.3e12
ADAPTER_ROW_BYTES = 4 * 2 * 4096 * 2 * 32
"""One rank of q, k, v and o in all layers, in fp16."""
DENSE = tuple(term for term in A100_LLAMA_7B.terms if term.quantity in ("num_rows", "num_kv_tokens"))
DURATION_S = {0: 300.0, 1: 300.0, 5: 120.0, 100: 120.0, 200: 300.0, 1000: 120.0, 2000: 120.0}
"""Adapters -> seconds of arrivals in the published run."""
SCHEDULER = SchedulerConfig(
    num_kv_blocks=7000,  # 80 GB less 13.5 GB of weights and working memory, at 0.5 MB per token
    max_model_len=2048,
    num_adapter_pages=512,
    max_num_batched_tokens=4096,
    max_num_seqs=100,
    max_waiting=100_000,
    enable_prefix_cache=False,
    min_prefix_wait_tokens=0,
)


def simulate(num_adapters: int, adapter_row_s: float, duration_s: float) -> ClusterSim:
    read_s = ADAPTER_ROW_BYTES / MEMORY_BYTES_PER_S
    terms = (*DENSE, CostTerm("num_adapter_rows", adapter_row_s), CostTerm("sum_adapter_ranks", read_s))
    config = ClusterConfig(
        SCHEDULER, LinearCost(A100_LLAMA_7B.step_s, terms), autoscaler=AutoscalerConfig(interval_s=1e4), slo=SLO
    )
    spec = WorkloadSpec(
        round(RATE_RPS * duration_s),
        GammaArrivals(RATE_RPS, 1.0),
        UniformLength(8, 512),
        UniformLength(8, 512),
        ZipfPopularity(num_adapters, 0.0) if num_adapters else BaseOnly(),
    )
    sim = ClusterSim(config, AdapterPopulation(RANKS, AdapterPages(rows_per_page=8)))
    sim.run(iter_requests(spec))
    return sim


def throughput_rps(sim: ClusterSim) -> float:
    """All requests over the time until the last had ended, as S-LoRA's script counts."""
    return len(sim.ledger) / sim.end_s


def fit(duration_s: float) -> float:
    """The seconds per row with an adapter that give the published throughput with one adapter."""
    low, high = 0.0, 4e-4
    for _ in range(7):
        middle = (low + high) / 2
        if throughput_rps(simulate(1, middle, duration_s)) > PUBLISHED[1]:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def main() -> None:
    parser = arguments(__doc__, "slora")
    options = parser.parse_args()
    report = Report("slora", options.output)
    adapter_row_s = fit(DURATION_S[1])
    report.add("fit", {"adapter_row_s": adapter_row_s})
    found = {}
    for num_adapters, published in PUBLISHED.items():
        sim = simulate(num_adapters, adapter_row_s, DURATION_S[num_adapters])
        summary = sim.ledger.summary(SLO, sim.end_s)
        found[num_adapters] = throughput_rps(sim)
        report.add(
            "sweep",
            {
                "num_adapters": num_adapters,
                "throughput_rps": found[num_adapters],
                "published_rps": published,
                "error": found[num_adapters] / published - 1,
                "attainment": summary.attainment,
                "num_loads": sum(record.num_adapter_loads for record in sim.replicas.values()),
            },
        )
    report.draw(chart(found))


def chart(found: dict[int, float]) -> str:
    lines = (
        Line("published", tuple((max(n, 0.5), rate) for n, rate in PUBLISHED.items()), is_dots=True),
        Line("simulated", tuple((max(n, 0.5), rate) for n, rate in found.items())),
    )
    title = "S-LoRA: throughput by number of adapters, 10 requests/s offered"
    return line_chart(title, "adapters (0.5 stands for none)", [Panel("requests/s", lines)], is_log_x=True)


if __name__ == "__main__":
    main()
