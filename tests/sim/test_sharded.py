from multiprocessing import get_context

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shard_processes import ProcessShard
from pomona.core.ids import ReplicaId, TenantId
from pomona.router.fleet import RouterConfig
from pomona.sim.cost_model import PerTokenCost
from pomona.sim.ledger import Ending
from pomona.sim.shard import Shard
from pomona.sim.sharded import ShardedSim, shard_of
from pomona.workload.spec import WorkloadRequest
from support.clusters import make_cluster, make_cluster_scheduler, make_population, simulate, steady


def _shards(config, num_shards: int) -> list[Shard]:
    replica_ids = [ReplicaId(k) for k in range(config.num_replicas)]
    return [
        Shard(config, make_population(), [k for k in replica_ids if shard_of(k, num_shards) == shard])
        for shard in range(num_shards)
    ]


def _run(config, workload, num_shards: int, interval_s: float = 0.05) -> ShardedSim:
    sim = ShardedSim(config, make_population(), _shards(config, num_shards), interval_s)
    sim.run(workload)
    return sim


def _columns(sim: ShardedSim) -> list[list[float]]:
    ledger = sim.ledger
    return [list(ledger.first_token_s), list(ledger.last_token_s), list(ledger.replica_id), list(ledger.ending)]


@settings(max_examples=25, deadline=None)
@given(
    gaps=st.lists(st.floats(0.0, 0.05), min_size=1, max_size=60),
    policy=st.sampled_from(["least-loaded", "two-choices", "affinity", "rank-aware"]),
    num_shards=st.integers(2, 5),
)
def test_the_number_of_shards_changes_nothing(gaps: list[float], policy: str, num_shards: int):
    config = make_cluster(num_replicas=5, router=RouterConfig(policy))
    now_s, workload = 0.0, []
    for k, gap in enumerate(gaps):
        now_s += gap
        workload.append(WorkloadRequest(now_s, 10 + k % 30, 5 + k % 7, k % 4))
    assert _columns(_run(config, workload, 1)) == _columns(_run(config, workload, num_shards))


def test_shards_in_other_processes_find_the_same():
    config, workload = make_cluster(num_replicas=4), steady(80, 0.005)
    here = _columns(_run(config, workload, 2))
    context = get_context("spawn")
    shards = [
        ProcessShard(context, config, (8, 16, 32), 8, [ReplicaId(k) for k in range(4) if shard_of(k, 2) == shard])
        for shard in range(2)
    ]
    try:
        sim = ShardedSim(config, make_population(), shards)
        sim.run(workload)
        assert _columns(sim) == here
        assert sum(shard.figures().num_output_tokens for shard in shards) == 80 * 10
    finally:
        for shard in shards:
            shard.close()


@pytest.mark.parametrize("gap_s", [0.004, 0.0])
def test_with_routing_that_ignores_load_it_equals_the_cluster_on_one_heap(gap_s: float):
    config, workload = make_cluster(num_replicas=3, router=RouterConfig("round-robin")), steady(90, gap_s)
    sharded, whole = _run(config, workload, 3), simulate(config, workload)
    assert list(sharded.ledger.last_token_s) == pytest.approx(list(whole.ledger.last_token_s), abs=1e-12)
    assert list(sharded.ledger.replica_id) == list(whole.ledger.replica_id)


def test_shards_divide_service_between_tenants_as_the_cluster_on_one_heap_does():
    config = make_cluster(num_replicas=1, scheduler=make_cluster_scheduler(max_num_seqs=2))
    # One tenant's backlog, then another's requests, which come first.
    workload = [WorkloadRequest(k * 1e-3, 20, 10, None, TenantId("a" if k < 20 else "b")) for k in range(24)]
    sharded, whole = _run(config, workload, 1), simulate(config, workload)
    assert list(sharded.ledger.last_token_s) == pytest.approx(list(whole.ledger.last_token_s), abs=1e-12)
    assert sharded.ledger.last_token_s[23] < sharded.ledger.last_token_s[19]


def test_later_reports_route_worse():
    config = make_cluster(num_replicas=4, router=RouterConfig("least-loaded"))
    # Every fourth request is long: a router that does not hear of endings keeps dealing them out evenly.
    workload = [WorkloadRequest(k * 0.01, 20, 60 if k % 4 == 0 else 2) for k in range(200)]
    means = []
    for interval_s in (0.01, 2.0):
        ledger = _run(config, workload, 2, interval_s).ledger
        means.append(sum(ledger.last_token_s[n] - ledger.arrival_s[n] for n in range(200)) / 200)
    assert means[0] < means[1]


def test_every_request_ends_and_what_no_replica_has_room_for_is_turned_away():
    config = make_cluster(num_replicas=2, router=RouterConfig("punica", max_requests=3))
    sim = _run(config, [*steady(10, 0.0), WorkloadRequest(1.0, 20, 3), WorkloadRequest(1.0, 300, 3)], 2)
    endings = list(sim.ledger.ending)
    assert endings.count(Ending.FINISHED) == 7
    assert endings.count(Ending.REJECTED) == 5
    assert all(
        end_s >= arrival_s for end_s, arrival_s in zip(sim.ledger.last_token_s, sim.ledger.arrival_s, strict=True)
    )


def test_what_arrives_at_a_report_is_in_the_turn_that_begins_then_as_on_one_heap():
    config = make_cluster(num_replicas=1, cost_model=PerTokenCost(0.25))
    workload = [WorkloadRequest(0.0, 20, 4), WorkloadRequest(0.5, 20, 4)]
    sharded, whole = _run(config, workload, 1, interval_s=0.5), simulate(config, workload)
    assert list(sharded.ledger.first_token_s) == list(whole.ledger.first_token_s) == [0.25, 0.75]
