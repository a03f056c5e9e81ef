"""Part of a large cluster: some replicas on an event heap of their own. Between two reports to the router no replica
depends on another, so shards may run anywhere, in this process or in others, with the same result.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

from pomona.core.errors import PomonaError
from pomona.core.ids import ReplicaId, RequestId, TenantId
from pomona.core.output import RequestOutput
from pomona.core.request import FinishReason, Request, SamplingParams
from pomona.sim.clock import EventHeap
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.executor import SimExecutor
from pomona.sim.population import AdapterPopulation
from pomona.sim.prompts import UniquePrompts
from pomona.sim.replica import SimReplica
from pomona.workload.spec import WorkloadRequest


class Routed(NamedTuple):
    """A request on its way to a replica; plain values, so that it crosses process borders cheaply."""

    arrival_s: float
    number: int
    replica_id: int
    num_prompt_tokens: int
    num_output_tokens: int
    adapter_index: int
    """-1 for the base model alone."""
    tenant_id: TenantId


class Ended(NamedTuple):
    """A request that has ended."""

    number: int
    replica_id: int
    first_token_s: float
    last_token_s: float
    num_output_tokens: int
    is_finished: bool


class ShardFigures(NamedTuple):
    """Sums over a shard's replicas."""

    num_steps: int
    num_output_tokens: int
    num_adapter_loads: int
    busy_s: float
    peak_rss_bytes: int
    """Of the process that holds it; 0 in this one."""


class ShardHost(Protocol):
    """A shard, wherever it is. ``begin`` and ``finish`` come in turn, so that several can work at once."""

    def begin(self, routed: Sequence[Routed], until_s: float) -> None:
        """Take requests, and simulate to a moment, which belongs to the next interval."""
        ...

    def finish(self) -> list[Ended]:
        """What has ended by then."""
        ...

    def figures(self) -> ShardFigures:
        """Sums so far."""
        ...


class Shard:
    """Replicas in this process: a ``ShardHost``.

    Args:
        config: of the cluster; router, autoscaler and losses are not a shard's business.
        adapters: every shard has its own copy.
        replica_ids: the replicas of this shard.
    """

    def __init__(self, config: ClusterConfig, adapters: AdapterPopulation, replica_ids: Sequence[ReplicaId]) -> None:
        self._adapters = adapters
        self._prompts = UniquePrompts(is_distinct=config.scheduler.enable_prefix_cache)
        self._heap = EventHeap()
        self._live: dict[RequestId, list[float]] = {}
        self._ended: list[Ended] = []
        self._until_s = 0.0
        self._replicas = {
            replica_id: SimReplica(
                config.scheduler,
                SimExecutor(
                    config.cost_model, adapters.lora_rank_of, lambda request_id, position: 0, adapters.with_extras
                ),
                self._heap,
                partial(self._deliver, replica_id),
                partial(self._reject, replica_id),
                overlap_steps=config.overlap_steps,
            )
            for replica_id in replica_ids
        }

    def begin(self, routed: Sequence[Routed], until_s: float) -> None:
        """See ``ShardHost``."""
        # A turn that begins at that moment takes in what arrives then, which has not been told yet.
        self._until_s = math.nextafter(until_s, 0.0)
        for request in routed:
            self._heap.at(request.arrival_s, partial(self._submit, request))

    def finish(self) -> list[Ended]:
        """See ``ShardHost``."""
        self._heap.run(self._until_s)
        ended, self._ended = self._ended, []
        return ended

    def figures(self) -> ShardFigures:
        """See ``ShardHost``."""
        stats = [replica.stats for replica in self._replicas.values()]
        return ShardFigures(
            sum(s.num_steps for s in stats),
            sum(s.num_output_tokens for s in stats),
            sum(s.num_adapter_loads for s in stats),
            math.fsum(replica.busy_s for replica in self._replicas.values()),
            0,
        )

    def _submit(self, routed: Routed) -> None:
        info = None if routed.adapter_index < 0 else self._adapters.info(routed.adapter_index)
        workload = WorkloadRequest(routed.arrival_s, routed.num_prompt_tokens, routed.num_output_tokens)
        request = Request(
            request_id=RequestId(str(routed.number)),
            prompt_token_ids=self._prompts.token_ids(routed.number, workload, 0),
            sampling=SamplingParams(max_tokens=routed.num_output_tokens, temperature=0.0),
            arrival_s=routed.arrival_s,
            tenant_id=routed.tenant_id,
            adapter_id=None if info is None else info.adapter_id,
        )
        self._live[request.request_id] = [math.nan, 0]
        self._replicas[ReplicaId(routed.replica_id)].submit(request, info)

    def _deliver(self, replica_id: ReplicaId, outputs: list[RequestOutput]) -> None:
        now_s = self._heap.now_s
        for output in outputs:
            live = self._live[output.request_id]
            if output.new_token_ids:
                if live[1] == 0:
                    live[0] = now_s
                live[1] += len(output.new_token_ids)
            reason = output.finish_reason
            if reason is not None:
                del self._live[output.request_id]
                is_finished = reason in (FinishReason.STOP, FinishReason.LENGTH)
                number = int(output.request_id)
                self._ended.append(Ended(number, replica_id, live[0], now_s, int(live[1]), is_finished))

    def _reject(self, replica_id: ReplicaId, request: Request, error: PomonaError) -> None:
        del error, self._live[request.request_id]
        number = int(request.request_id)
        self._ended.append(Ended(number, replica_id, math.nan, self._heap.now_s, 0, is_finished=False))
