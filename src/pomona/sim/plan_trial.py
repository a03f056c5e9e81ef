"""From a plan's spec and a trial to a cluster simulation and its outcome."""

import itertools
import math
from dataclasses import dataclass, replace

from pomona.core.errors import ConfigError
from pomona.router.affinity import AffinityConfig
from pomona.router.autoscale import AutoscalerConfig
from pomona.router.fleet import PolicyName, RouterConfig
from pomona.router.rank_aware import StepModel
from pomona.sim.cluster import ClusterSim
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.cost_model import CostModel
from pomona.sim.plan_search import PlanSettings, Relaxation, Trial, TrialOutcome
from pomona.sim.plan_spec import PlanSpec
from pomona.sim.setup import ReadLines, Setup, prepare
from pomona.sim.step_work import StepWork
from pomona.workload.spec import WorkloadRequest

MAX_REQUESTS = 1_000_000
"""Most requests of a workload that is planned for: it is held in memory and simulated many times."""
RELAXED_COMPUTE = 0.5
"""Factor on step times where compute is made plentiful."""
RELAXED_MEMORY = 4
"""Factor on blocks, or pages, where that memory is made plentiful."""


@dataclass(frozen=True, slots=True)
class RelaxedCost:
    """Another cost model, its steps or its adapter copies made cheaper."""

    cost_model: CostModel
    compute_scale: float = 1.0
    load_scale: float = 1.0

    def seconds(self, work: StepWork) -> float:
        """See ``CostModel``."""
        compute_s = self.cost_model.seconds(replace(work, num_loads=0, num_loaded_pages=0))
        load_s = self.cost_model.seconds(work) - compute_s if work.num_loads else 0.0
        return self.compute_scale * compute_s + self.load_scale * load_s


class TrialRunner:
    """Runs trials of one spec.

    Args:
        spec: the question.
        read_lines: reads the files that the spec names.

    Raises:
        ConfigError: the spec, or a file that it names, is wrong; the message begins with the key's path.
    """

    def __init__(self, spec: PlanSpec, read_lines: ReadLines) -> None:
        self._spec = spec
        self._read_lines = read_lines
        self._setups: dict[float | None, Setup] = {}
        for index, share in enumerate(spec.plan.adapter_shares):
            try:
                self._setup(share)
            except ConfigError as error:
                raise ConfigError(f"plan.adapter_shares.{index} is {share:g}: {error}") from error
        first = self._setup(spec.space.adapter_shares[0])
        self._whole = list(itertools.islice(first.workload, MAX_REQUESTS + 1))
        if len(self._whole) > MAX_REQUESTS:
            raise ConfigError(f"workload: has more than {MAX_REQUESTS} requests: plan for a shorter part of it")
        start_s = spec.plan.window_start_s
        end_s = start_s + spec.plan.window_s
        window = [request for request in self._whole if start_s <= request.arrival_s < end_s]
        num_before = sum(request.arrival_s < start_s for request in self._whole)
        self._whole_prompts = first.prompts
        self._window_prompts = None if first.prompts is None else first.prompts.part(num_before)
        if not window:
            raise ConfigError(f"plan.window_start_s is {start_s}: no request arrives in the window")
        self._window = [replace(request, arrival_s=request.arrival_s - start_s) for request in window]

    @property
    def beyond_profile(self) -> str:
        """See ``Setup``."""
        return self._setup(self._spec.space.adapter_shares[0]).beyond_profile

    @property
    def num_requests(self) -> int:
        """Of the whole workload."""
        return len(self._whole)

    def __call__(self, trial: Trial) -> TrialOutcome:
        """Simulate one trial."""
        workload: list[WorkloadRequest] = self._whole if trial.is_whole else self._window
        if trial.rate_scale != 1.0:
            workload = [replace(request, arrival_s=request.arrival_s / trial.rate_scale) for request in workload]
        config = self.cluster_config(trial.settings, trial.relaxation)
        if not trial.is_whole:
            config = replace(config, losses=config.losses.since(self._spec.plan.window_start_s))
        prompts = self._whole_prompts if trial.is_whole else self._window_prompts
        sim = ClusterSim(config, self._setup(trial.settings.adapter_share).adapters, prompts)
        sim.run(workload)
        summary = sim.ledger.summary(config.slo, sim.duration_s)
        return TrialOutcome(
            attainment=summary.attainment,
            ttft_p99_s=summary.ttft_s.p99 if summary.ttft_s else None,
            tpot_p99_s=summary.tpot_s.p99 if summary.tpot_s else None,
            busy_share=sim.busy_share(),
            num_adapter_loads=sum(record.num_adapter_loads for record in sim.replicas.values()),
            output_tokens_per_s=summary.output_tokens_per_s,
        )

    def cluster_config(self, settings: PlanSettings, relaxation: Relaxation = "none") -> ClusterConfig:
        """The cluster of a trial."""
        setup = self._setup(settings.adapter_share)
        scheduler, cost_model = setup.cluster.scheduler, setup.cluster.cost_model
        num_pages, num_lent = scheduler.num_adapter_pages, scheduler.num_adapter_pages * scheduler.blocks_per_page
        num_blocks = scheduler.num_kv_blocks + num_lent  # what KV has if it borrows every page
        if relaxation == "kv":
            scheduler = replace(scheduler, num_kv_blocks=RELAXED_MEMORY * num_blocks - num_lent)
        elif relaxation == "adapter memory":
            scheduler = replace(
                scheduler, num_kv_blocks=num_blocks, num_adapter_pages=RELAXED_MEMORY * num_pages, blocks_per_page=0
            )
        elif relaxation == "compute":
            cost_model = RelaxedCost(cost_model, compute_scale=RELAXED_COMPUTE)
        elif relaxation == "cold starts":
            cost_model = RelaxedCost(cost_model, load_scale=0.0)
        return replace(
            setup.cluster,
            scheduler=scheduler,
            cost_model=cost_model,
            router=self._router(setup, settings.policy),
            autoscaler=AutoscalerConfig(max_replicas=settings.num_replicas),
            num_replicas=settings.num_replicas,
            sample_interval_s=None,
        )

    def _setup(self, adapter_share: float | None) -> Setup:
        setup = self._setups.get(adapter_share)
        if setup is None:
            spec = self._spec.simulation
            if adapter_share is not None:
                replica = spec.replica.model_copy(update={"adapter_share": adapter_share})
                spec = spec.model_copy(update={"replica": replica})
            setup = self._setups[adapter_share] = prepare(spec, self._read_lines)
        return setup

    def _router(self, setup: Setup, policy: PolicyName) -> RouterConfig:
        """The policy, with what it weighs read off the replica's cost model."""
        cost, lora_ranks = setup.cluster.cost_model, self._spec.simulation.adapters.lora_ranks
        mean_rank = round(sum(lora_ranks) / len(lora_ranks))
        idle = StepWork(num_seqs=1, num_rows=1, num_decode_rows=1, num_sampled=1)
        row = replace(
            idle,
            num_adapter_rows=1,
            num_adapters=1,
            sum_row_ranks=mean_rank,
            sum_adapter_ranks=mean_rank,
            max_rank=mean_rank,
        )
        load = replace(row, num_loads=1, num_loaded_pages=setup.adapters.pages.num_pages(mean_rank))
        num_tokens = 512
        prompt = StepWork(
            num_seqs=1,
            num_rows=num_tokens,
            num_prefill_kv_tokens=num_tokens,
            num_prefill_pairs=num_tokens * num_tokens // 2,
        )
        idle_s, row_s = cost.seconds(idle), cost.seconds(row)
        token_s = max(0.0, cost.seconds(prompt) - idle_s) / num_tokens
        return replace(
            setup.cluster.router,
            policy=policy,
            max_requests=setup.cluster.scheduler.max_num_seqs,
            max_step_s=setup.cluster.slo.tpot_s or math.inf,
            step_model=StepModel(idle_s, token_s, max(0.0, row_s - idle_s) / mean_rank, token_s),
            affinity=AffinityConfig(
                request_wait_s=row_s - idle_s + token_s,
                prompt_token_s=token_s,
                adapter_load_s=max(0.0, cost.seconds(load) - row_s),
            ),
        )
