"""Builders of small cluster simulations, and what must hold after every one."""

import math
from collections.abc import Sequence

from pomona.core.ids import TenantId
from pomona.metrics.slo import Slo
from pomona.router.autoscale import AutoscalerConfig
from pomona.sched.config import SchedulerConfig
from pomona.sim.cluster import ClusterSim
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.cost_model import PerTokenCost
from pomona.sim.ledger import Ending
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.workload.spec import WorkloadRequest

RANKS = (8, 16, 32)


def make_cluster_scheduler(**changes: object) -> SchedulerConfig:
    values: dict[str, object] = {
        "num_kv_blocks": 64,
        "max_model_len": 256,
        "num_adapter_pages": 16,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "enable_prefix_cache": False,
        "min_prefix_wait_tokens": 0,
    }
    return SchedulerConfig(**(values | changes))  # type: ignore[arg-type]


def make_cluster(**changes: object) -> ClusterConfig:
    """Two small replicas whose steps take 10 ms and 0.1 ms per row."""
    num_replicas = changes.get("num_replicas", 2)
    values: dict[str, object] = {
        "scheduler": make_cluster_scheduler(),
        "cost_model": PerTokenCost(0.01, 1e-4),
        "autoscaler": AutoscalerConfig(max_replicas=num_replicas, interval_s=1.0),  # type: ignore[arg-type]
        "num_replicas": num_replicas,
        "start_s": 1.0,
        "slo": Slo(ttft_s=0.5),
    }
    return ClusterConfig(**(values | changes))  # type: ignore[arg-type]


def make_population() -> AdapterPopulation:
    return AdapterPopulation(RANKS, AdapterPages(rows_per_page=8))


def steady(
    num_requests: int, gap_s: float, num_prompt_tokens: int = 20, num_output_tokens: int = 10, num_adapters: int = 3
) -> list[WorkloadRequest]:
    """Requests at equal gaps, adapters in turn."""
    return [
        WorkloadRequest(k * gap_s, num_prompt_tokens, num_output_tokens, k % num_adapters, TenantId(f"t{k % 2}"))
        for k in range(num_requests)
    ]


def simulate(config: ClusterConfig, workload: Sequence[WorkloadRequest], until_s: float = math.inf) -> ClusterSim:
    sim = ClusterSim(config, make_population())
    sim.run(workload, until_s)
    return sim


def check_all_finished(sim: ClusterSim, workload: Sequence[WorkloadRequest]) -> None:
    """Every request ended once, with a whole answer, after it arrived; what the fleet knows is in balance."""
    ledger = sim.ledger
    assert len(ledger) == len(workload)
    assert list(ledger.ending) == [Ending.FINISHED] * len(workload)
    assert list(ledger.num_output_tokens) == [request.num_output_tokens for request in workload]
    for number, request in enumerate(workload):
        assert request.arrival_s < ledger.first_token_s[number] <= ledger.last_token_s[number]
    assert sim.is_over
