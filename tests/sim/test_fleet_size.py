import math
from typing import ClassVar

import pytest

from pomona.router.autoscale import AutoscalerConfig
from pomona.router.fleet import RouterConfig
from pomona.sim.cluster import ClusterSim
from pomona.sim.cost_model import PerTokenCost
from pomona.workload.spec import WorkloadRequest
from support.clusters import make_cluster, make_population, simulate, steady


def test_the_autoscaler_hears_how_idle_replicas_were_since_it_looked_or_they_began_to_serve():
    class Scripted:
        seen_idle: ClassVar = {}

        def wanted(self, seen):
            self.seen_idle[seen.now_s] = seen.idle_share
            return 1 if seen.now_s < 4.0 else 2 if seen.now_s == 4.0 else 3

    # The first replica drains from 1 s to 4 s, and is done at 4.25 s; the third serves from 5.5 s on.
    config = make_cluster(num_replicas=2, cost_model=PerTokenCost(0.25), start_s=0.5)
    sim = ClusterSim(config, make_population())
    sim._size._autoscaler = Scripted()
    sim.run([WorkloadRequest(time_s, 20, count) for time_s, count in ((0.0, 17), (0.0, 40), (5.6, 9), (5.6, 9))])
    assert Scripted.seen_idle[5.0] == pytest.approx((0.75, 0.0))
    assert Scripted.seen_idle[6.0] == pytest.approx((0.6, 0.0, 0.2))


def test_one_that_waits_for_a_replica_that_starts_makes_no_others_start():
    scaler = AutoscalerConfig("light-load", 1, 10, interval_s=1.0, light_requests=2, num_calm=1)
    punica = RouterConfig("punica", max_requests=2)
    config = make_cluster(num_replicas=1, router=punica, autoscaler=scaler, start_s=8.0, cost_model=PerTokenCost(0.1))
    sim = simulate(config, [WorkloadRequest(0.0, 20, 150) for _ in range(3)])
    assert [record.asked_s for record in sim.replicas.values()] == [0.0, 1.0]


def test_a_fleet_is_not_paid_for_once_the_last_request_has_ended_however_late_the_simulation_is_to_stop():
    workload = steady(60, 0.01)
    by_itself, stopped = (simulate(make_cluster(), workload, until_s) for until_s in (math.inf, 1000.0))
    assert (stopped.end_s, stopped.replica_s()) == (by_itself.end_s, by_itself.replica_s())
