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


def test_punica_fills_the_memory_that_kv_may_borrow_from_adapters_that_nobody_needs():
    """A request needs 8 blocks; a replica has 16, and a page of each adapter, which are 8, when no request needs it."""
    scheduler = make_cluster_scheduler(num_kv_blocks=16, num_adapter_pages=4, blocks_per_page=8)
    config = make_cluster(num_replicas=1, router=RouterConfig("punica"), scheduler=scheduler, sample_interval_s=0.1)
    most = []
    for indices in ((None,) * 8, (0,) * 8, (0, 1, 2, 3) * 2):
        workload = [WorkloadRequest(0.0, 28, 100, index) for index in indices]
        sim = ClusterSim(config, AdapterPopulation((4,), AdapterPages(rows_per_page=4)))
        sim.run(workload)
        most.append(max(load for sample in sim.samples for _, load in sample.loads))
    assert most == [6, 5, 3]
