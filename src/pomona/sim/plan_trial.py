"""From a spec and a trial to a cluster simulation and its outcome."""

import math
from collections.abc import Sequence
from dataclasses import replace

from pomona.core.errors import ConfigError
from pomona.router.affinity import AffinityConfig
from pomona.router.autoscale import AutoscalerConfig
from pomona.router.fleet import RouterConfig
from pomona.router.rank_aware import StepModel
from pomona.sched.config import SchedulerConfig
from pomona.sim.cluster import ClusterSim
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.plan_search import PlanSettings, Relaxation, Trial, TrialOutcome
from pomona.sim.plan_spec import PlanSpec
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.sim.step_work import StepWork
from pomona.workload.spec import WorkloadRequest

RELAXED_COMPUTE = 0.5
"""Factor on step times where compute is made plentiful."""
RELAXED_MEMORY = 4
"""Factor on blocks, or pages, where that memory is made plentiful."""


class TrialRunner:
    """Runs trials of one spec.

    Args:
        spec: the question.
        workload: all its requests, by ascending arrival.
    """

    def __init__(self, spec: PlanSpec, workload: Sequence[WorkloadRequest]) -> None:
        self._spec = spec
        self._whole = workload
        start_s = spec.search.window_start_s
        end_s = start_s + spec.search.window_s
        window = [request for request in workload if start_s <= request.arrival_s < end_s]
        if not window:
            raise ConfigError(f"search.window_start_s is {start_s}: no request arrives in the window")
        self._window = [replace(request, arrival_s=request.arrival_s - start_s) for request in window]

    def __call__(self, trial: Trial) -> TrialOutcome:
        """Simulate one trial."""
        workload = self._whole if trial.is_whole else self._window
        if trial.rate_scale != 1.0:
            workload = [replace(request, arrival_s=request.arrival_s / trial.rate_scale) for request in workload]
        config = cluster_config(self._spec, trial.settings, trial.relaxation)
        sim = ClusterSim(
            config,
            AdapterPopulation(
                self._spec.adapters.lora_ranks,
                AdapterPages(
                    self._spec.replica.rows_per_page,
                    self._spec.replica.rank_row_bytes * self._spec.replica.rows_per_page,
                ),
            ),
        )
        sim.run(workload)
        summary = sim.ledger.summary(config.slo, sim.end_s)
        records = sim.replicas.values()
        return TrialOutcome(
            attainment=summary.attainment,
            ttft_p99_s=summary.ttft_s.p99 if summary.ttft_s else math.inf,
            tpot_p99_s=summary.tpot_s.p99 if summary.tpot_s else math.inf,
            busy_share=math.fsum(record.busy_s for record in records) / sim.replica_s(),
            num_adapter_loads=sum(record.num_adapter_loads for record in records),
            output_tokens_per_s=summary.output_tokens_per_s,
        )


def memory_split(spec: PlanSpec, adapter_share: float) -> tuple[int, int]:
    """(KV blocks, adapter pages) of a replica that gives this share of its cache memory to adapters.

    Raises:
        ConfigError: no block is left, or the largest adapter does not fit.
    """
    replica = spec.replica
    page_bytes = replica.rank_row_bytes * replica.rows_per_page
    num_pages = int(adapter_share * replica.cache_bytes) // page_bytes
    num_blocks = int((1.0 - adapter_share) * replica.cache_bytes) // (replica.kv_token_bytes * replica.block_size)
    needed = -(-max(spec.adapters.lora_ranks) // replica.rows_per_page)
    if num_pages < needed:
        raise ConfigError(
            f"adapter share {adapter_share:g} of replica.cache_bytes is {num_pages} pages: an adapter of rank "
            f"{max(spec.adapters.lora_ranks)} needs {needed}"
        )
    if num_blocks < 1:
        raise ConfigError(f"adapter share {adapter_share:g} of replica.cache_bytes leaves no KV block")
    return num_blocks, num_pages


def cluster_config(spec: PlanSpec, settings: PlanSettings, relaxation: Relaxation = "none") -> ClusterConfig:
    """The cluster of a trial."""
    replica = spec.replica
    num_blocks, num_pages = memory_split(spec, settings.adapter_share)
    num_blocks *= RELAXED_MEMORY if relaxation == "kv" else 1
    num_pages *= RELAXED_MEMORY if relaxation == "adapter memory" else 1
    scheduler = SchedulerConfig(
        num_kv_blocks=num_blocks,
        max_model_len=replica.max_model_len,
        num_adapter_pages=num_pages,
        block_size=replica.block_size,
        max_num_batched_tokens=replica.max_num_batched_tokens,
        max_num_seqs=replica.max_num_seqs,
        max_waiting=1_000_000,
        enable_prefix_cache=False,
        min_prefix_wait_tokens=0,
    )
    cost_model = replica.cost_model(
        RELAXED_COMPUTE if relaxation == "compute" else 1.0, has_free_loads=relaxation == "cold starts"
    )
    return ClusterConfig(
        scheduler,
        cost_model,
        router_config(spec, settings),
        AutoscalerConfig(max_replicas=settings.num_replicas),
        settings.num_replicas,
        slo=spec.slo.slo,
    )


def router_config(spec: PlanSpec, settings: PlanSettings) -> RouterConfig:
    """The policy, its costs in seconds read off the replica's cost model."""
    cost = spec.replica.cost_model(1.0, has_free_loads=False)
    idle_s = cost.seconds(StepWork(num_rows=1, num_decode_rows=1, num_seqs=1))
    mean_rank = round(sum(spec.adapters.lora_ranks) / len(spec.adapters.lora_ranks))
    with_adapter = StepWork(
        num_rows=1,
        num_decode_rows=1,
        num_seqs=1,
        num_adapter_rows=1,
        num_adapters=1,
        sum_row_ranks=mean_rank,
        sum_adapter_ranks=mean_rank,
        max_rank=mean_rank,
    )
    num_pages = -(-mean_rank // spec.replica.rows_per_page)
    loading = replace(with_adapter, num_loads=1, num_loaded_pages=num_pages)
    batch = 512
    prompt = StepWork(num_rows=batch, num_seqs=1, num_prefill_kv_tokens=batch, num_prefill_pairs=batch * batch // 2)
    token_s = max(0.0, cost.seconds(prompt) - idle_s) / batch
    rank_row_s = (cost.seconds(with_adapter) - idle_s) / mean_rank
    return RouterConfig(
        settings.policy,
        max_requests=spec.replica.max_num_seqs,
        max_step_s=spec.slo.tpot_s or 0.1,
        step_model=StepModel(idle_s, token_s, rank_row_s, token_s),
        affinity=AffinityConfig(
            request_wait_s=cost.seconds(with_adapter) - cost.step_s + token_s,
            prompt_token_s=token_s,
            adapter_load_s=cost.seconds(loading) - cost.seconds(with_adapter),
        ),
    )
