"""ShardedSim: a cluster of fixed size whose router hears of ended requests at intervals, as real ones do.

Between two reports every routing decision is made, then all shards simulate the interval side by side, then their news
is taken in. How many shards there are, and where they run, changes nothing but the time it takes.
"""

import math
from collections.abc import Iterable, Sequence

from pomona.core.ids import ReplicaId
from pomona.router.fleet import Fleet
from pomona.router.snapshot import RouteRequest
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.ledger import Ending, Ledger
from pomona.sim.population import AdapterPopulation
from pomona.sim.shard import Routed, ShardHost
from pomona.workload.spec import WorkloadRequest


def shard_of(replica_id: int, num_shards: int) -> int:
    """The shard that a replica belongs to."""
    return replica_id % num_shards


class ShardedSim:
    """One simulation; ``run`` it once.

    Args:
        config: the cluster; its losses, autoscaler and consolidation are not simulated here.
        adapters: the router's view of them.
        shards: hosts of all replicas, dealt out by ``shard_of``.
        report_interval_s: time between reports.
    """

    def __init__(
        self,
        config: ClusterConfig,
        adapters: AdapterPopulation,
        shards: Sequence[ShardHost],
        report_interval_s: float = 0.05,
    ) -> None:
        assert report_interval_s > 0.0
        self.ledger = Ledger()
        self._adapters = adapters
        self._shards = shards
        self._interval_s = report_interval_s
        self._config = config
        self._routes: dict[int, RouteRequest] = {}
        self._fleet = Fleet(config.router)
        for replica_id in range(config.num_replicas):
            self._fleet.report(config.empty_replica(ReplicaId(replica_id), adapters.pages.rows_per_page))

    def run(self, workload: Iterable[WorkloadRequest], until_s: float = math.inf) -> None:
        """Simulate until every request has ended, or to the first report at or after a moment.

        Args:
            workload: requests by ascending arrival.
            until_s: when to stop.
        """
        requests = iter(workload)
        request = next(requests, None)
        num_reports = 0
        while (request is not None or self._routes) and num_reports * self._interval_s < until_s:
            num_reports += 1
            end_s = num_reports * self._interval_s
            batches: list[list[Routed]] = [[] for _ in self._shards]
            while request is not None and request.arrival_s < end_s:
                self._route(request, batches)
                request = next(requests, None)
            for shard, batch in zip(self._shards, batches, strict=True):
                shard.begin(batch, end_s)
            for shard in self._shards:
                self._take(shard)

    def _route(self, request: WorkloadRequest, batches: list[list[Routed]]) -> None:
        index = request.adapter_index
        info = None if index is None else self._adapters.info(index)
        num_prompt, num_output = request.num_prompt_tokens, request.num_output_tokens
        route = RouteRequest(
            num_prompt,
            self._config.num_kv_tokens(request),
            None if info is None else info.adapter_id,
            0 if info is None else info.lora_rank,
            num_adapter_rows=0 if info is None else info.num_pages * self._adapters.pages.rows_per_page,
            num_page_kv_tokens=0 if info is None else self._config.num_page_kv_tokens(info.num_pages),
        )
        number = self.ledger.arrive(request)
        replica_id = self._fleet.choose(route)
        if replica_id is None:
            # There is no queue in front of the fleet here: a full one turns requests away.
            self.ledger.last_token_s[number] = request.arrival_s
            self.ledger.close(number, Ending.REJECTED)
            return
        self._fleet.sent(replica_id, route)
        self._routes[number] = route
        adapter_index = -1 if index is None else index
        routed = Routed(request.arrival_s, number, replica_id, num_prompt, num_output, adapter_index, request.tenant_id)
        batches[shard_of(replica_id, len(self._shards))].append(routed)

    def _take(self, shard: ShardHost) -> None:
        ledger = self.ledger
        for number, replica_id, first_token_s, last_token_s, num_output_tokens, is_finished in shard.finish():
            ledger.first_token_s[number] = first_token_s
            ledger.last_token_s[number] = last_token_s
            ledger.num_output_tokens[number] = num_output_tokens
            has_ended_as = Ending.FINISHED if is_finished else Ending.FAILED if num_output_tokens else Ending.REJECTED
            ledger.close(number, has_ended_as, ReplicaId(replica_id))
            self._fleet.ended(ReplicaId(replica_id), self._routes.pop(number))
