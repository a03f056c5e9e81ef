import random

import pytest

from pomona.core.ids import ReplicaId
from pomona.router.fleet import RouterConfig
from pomona.sim.cluster import ClusterSim
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.sim.shard import Shard
from pomona.sim.sharded import ShardedSim
from pomona.workload.popularity import ZipfPopularity
from pomona.workload.spec import WorkloadRequest
from support.clusters import make_cluster, make_cluster_scheduler


@pytest.mark.parametrize("policy", ["affinity", "credit"])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_the_router_counts_the_pages_that_an_adapter_takes_and_not_its_rank(policy: str, is_sharded: bool):
    """Adapters of rank 1 and 4 take a page of four rows each, so as many of them are resident."""
    config = make_cluster(
        num_replicas=3, router=RouterConfig(policy), scheduler=make_cluster_scheduler(num_adapter_pages=4)
    )
    indices = ZipfPopularity(20, 0.5).indices(random.Random(1))
    workload = [WorkloadRequest(k * 0.02, 20, 10, next(indices)) for k in range(300)]
    placed = []
    for lora_rank in (1, 4):
        adapters = AdapterPopulation((lora_rank,), AdapterPages(rows_per_page=4))
        sim: ClusterSim | ShardedSim = ClusterSim(config, adapters)
        if is_sharded:
            sim = ShardedSim(config, adapters, [Shard(config, adapters, [ReplicaId(k) for k in range(3)])])
        sim.run(workload)
        placed.append(list(sim.ledger.replica_id))
    assert placed[0] == placed[1]
