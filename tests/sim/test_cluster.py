import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.core.errors import ConfigError
from pomona.core.ids import RequestId
from pomona.core.request import Request, SamplingParams
from pomona.metrics.slo import Slo
from pomona.router.autoscale import AutoscalerConfig
from pomona.router.fleet import RouterConfig
from pomona.sim.clock import EventHeap
from pomona.sim.cluster import ClusterSim
from pomona.sim.cluster_config import ClusterConfig, LossConfig
from pomona.sim.cost_model import PerTokenCost
from pomona.sim.executor import SimExecutor
from pomona.sim.ledger import Ending
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.sim.replica import SimReplica
from pomona.sim.report import make_report
from pomona.workload.spec import WorkloadRequest
from support.clusters import (
    check_all_finished,
    make_cluster,
    make_cluster_scheduler,
    make_population,
    simulate,
    steady,
)

POLICIES = ("random", "round-robin", "least-loaded", "two-choices", "punica", "rank-aware", "affinity", "credit")
SCALERS = ("fixed", "light-load", "load-proportional", "target-utilisation")

workloads = st.lists(
    st.builds(
        WorkloadRequest,
        st.floats(0.0, 6.0),
        st.integers(1, 120),
        st.integers(1, 40),
        st.none() | st.integers(0, 6),
    ),
    min_size=1,
    max_size=40,
).map(lambda requests: sorted(requests, key=lambda request: request.arrival_s))


def _columns(sim: ClusterSim) -> list[list[float]]:
    ledger = sim.ledger
    return [list(ledger.first_token_s), list(ledger.last_token_s), list(ledger.replica_id), list(ledger.num_restarts)]


def test_a_cluster_of_one_replica_is_that_replica():
    workload = steady(30, 0.02)
    config = make_cluster(num_replicas=1)
    sim = simulate(config, workload)

    heap, last_token_s = EventHeap(), {}
    adapters = make_population()
    executor = SimExecutor(config.cost_model, adapters.lora_rank_of)

    def deliver(outputs):
        for output in outputs:
            last_token_s[int(output.request_id)] = heap.now_s

    replica = SimReplica(config.scheduler, executor, heap, deliver, lambda request, error: None)
    for number, request in enumerate(workload):
        info = adapters.info(request.adapter_index)
        sampling = SamplingParams(max_tokens=request.num_output_tokens, temperature=0.0)
        made = Request(
            RequestId(str(number)),
            (0,) * request.num_prompt_tokens,
            sampling,
            request.arrival_s,
            adapter_id=info.adapter_id,
        )
        heap.at(request.arrival_s, lambda made=made, info=info: replica.submit(made, info))
    heap.run()
    assert [last_token_s[number] for number in range(len(workload))] == list(sim.ledger.last_token_s)


@settings(max_examples=60, deadline=None)
@given(
    workload=workloads,
    policy=st.sampled_from(POLICIES),
    scaler=st.sampled_from(SCALERS),
    mean_life_s=st.none() | st.floats(0.5, 5.0),
    on_notice=st.sampled_from(["move", "stay"]),
    capacity=st.lists(st.tuples(st.floats(0.1, 6.0), st.integers(1, 4)), max_size=4),
    consolidates=st.booleans(),
    num_lent=st.sampled_from([0, 3]),
    seed=st.integers(0, 3),
)
def test_every_request_finishes_once_whatever_is_lost_and_equal_runs_are_equal(
    workload, policy, scaler, mean_life_s, on_notice, capacity, consolidates, num_lent, seed
):
    config = make_cluster(
        scheduler=make_cluster_scheduler(blocks_per_page=num_lent),
        num_replicas=3,
        router=RouterConfig(policy=policy, max_requests=6),
        autoscaler=AutoscalerConfig(scaler, 1, 4, interval_s=0.5, light_requests=2, target_requests=4.0, num_calm=1),
        losses=LossConfig(mean_life_s, tuple(sorted(capacity)), notice_s=0.3, on_notice=on_notice),
        consolidation_interval_s=0.4 if consolidates else None,
        sample_interval_s=0.5,
        seed=seed,
    )
    sim = simulate(config, workload)
    check_all_finished(sim, workload)
    assert all(state.num_requests == 0 and state.sum_lora_ranks == 0 for state in sim._fleet.states)
    assert {state.num_free_kv_tokens for state in sim._fleet.states} <= {16 * (64 + 16 * num_lent)}
    assert _columns(simulate(config, workload)) == _columns(sim)


def test_more_replicas_make_no_request_later():
    workload = steady(60, 0.01)
    ends = [simulate(make_cluster(num_replicas=count), workload).end_s for count in (1, 2, 4)]
    assert ends[0] > ends[1] > ends[2]


def test_a_lost_replicas_requests_go_on_elsewhere_without_repeating_what_was_delivered():
    workload = [WorkloadRequest(0.0, 20, 100)]
    lonely = simulate(make_cluster(num_replicas=1), workload)
    config = make_cluster(
        num_replicas=2,
        autoscaler=AutoscalerConfig(max_replicas=2, interval_s=1.0),
        losses=LossConfig(capacity=((0.5, 0), (0.6, 2)), notice_s=0.0, on_notice="stay"),
    )
    sim = simulate(config, workload)
    check_all_finished(sim, workload)
    assert sim.ledger.num_restarts[0] == 1
    assert sim.ledger.first_token_s[0] == lonely.ledger.first_token_s[0]
    # It waited for the autoscaler's next look (1 s) and the new replica's start (1 s), then computed the rest.
    assert 2.0 < sim.ledger.last_token_s[0] < 2.0 + lonely.ledger.last_token_s[0]


def test_what_was_delivered_before_a_loss_counts_although_no_other_replica_takes_the_rest():
    losses = LossConfig(capacity=((0.0, 2), (0.3, 1)), notice_s=0.0)
    config = make_cluster(scheduler=make_cluster_scheduler(max_waiting=1), losses=losses)
    sim = simulate(config, steady(12, 0.01, num_output_tokens=50))
    ledger = sim.ledger
    broken_off = [number for number in ledger.numbers() if ledger.ending[number] == Ending.FAILED]
    assert broken_off
    assert all(ledger.num_output_tokens[number] and ledger.num_restarts[number] for number in broken_off)
    served = [number for number in ledger.numbers() if ledger.num_output_tokens[number]]
    delivered = sum(ledger.num_prompt_tokens[number] + 2 * ledger.num_output_tokens[number] for number in served)
    assert sum(sim.service.values()) == delivered


def test_requests_of_a_lost_replica_may_be_made_to_fail():
    config = make_cluster(
        num_replicas=1, losses=LossConfig(capacity=((0.5, 0), (0.6, 1)), notice_s=0.0, on_loss="fail")
    )
    config = replace(config, losses=replace(config.losses, on_notice="stay"))
    sim = simulate(config, [WorkloadRequest(0.0, 20, 100), WorkloadRequest(0.7, 20, 3)])
    assert list(sim.ledger.ending) == [Ending.FAILED, Ending.FINISHED]
    assert 0 < sim.ledger.num_output_tokens[0] < 100


def test_requests_that_stay_until_the_loss_restart_less_often_than_those_that_move_at_the_notice():
    workload = [WorkloadRequest(0.0, 20, 20 * (k + 1)) for k in range(10)]
    num_restarts = {}
    for on_notice in ("move", "stay"):
        losses = LossConfig(capacity=((0.1, 1), (30.0, 2)), notice_s=0.6, on_notice=on_notice)
        sim = simulate(make_cluster(losses=losses), workload)
        check_all_finished(sim, workload)
        num_restarts[on_notice] = sum(sim.ledger.num_restarts)
    assert 0 < num_restarts["stay"] < num_restarts["move"] == 5


def test_a_fleet_never_serves_with_more_than_the_capacity_once_the_notice_is_over():
    losses = LossConfig(capacity=((1.0, 1), (3.0, 4), (5.0, 2)), notice_s=0.25)
    config = make_cluster(num_replicas=4, losses=losses, sample_interval_s=0.25)
    sim = simulate(config, steady(300, 0.02))
    most_serving = {}
    for sample in sim.samples:
        since_s, allowed = next(
            (at_s, n) for at_s, n in ((5.3, 2), (3.0, 4), (1.3, 1), (0.0, 4)) if sample.now_s >= at_s
        )
        assert len(sample.loads) <= allowed
        most_serving[since_s] = max(most_serving.get(since_s, 0), len(sample.loads))
    assert most_serving == {0.0: 4, 1.3: 1, 3.0: 4, 5.3: 2}


def test_the_fleet_grows_under_load_after_the_start_up_time_and_shrinks_when_it_ends():
    scaler = AutoscalerConfig("target-utilisation", 1, 4, interval_s=0.5, target_requests=4.0, num_calm=2)
    config = make_cluster(num_replicas=1, autoscaler=scaler, start_s=2.0, sample_interval_s=0.5)
    burst = steady(200, 0.01)
    late = [WorkloadRequest(20.0 + k, 20, 10) for k in range(10)]
    sim = simulate(config, burst + late)
    check_all_finished(sim, burst + late)
    sizes = {sample.now_s: len(sample.loads) for sample in sim.samples}
    assert max(sizes.values()) == 4
    assert all(size == 1 for now_s, size in sizes.items() if now_s < 2.5)
    assert sizes[25.0] == 1
    assert all(record.ready_s - record.asked_s == 2.0 for record in sim.replicas.values() if record.asked_s > 0.0)


def test_consolidation_empties_light_replicas_so_that_they_can_be_released():
    # Requests of very different lengths leave every replica with a few long ones.
    workload = [WorkloadRequest(0.0, 10, 200 if k % 6 == 0 else 5) for k in range(18)]
    used = {}
    for interval_s in (None, 0.2):
        config = make_cluster(
            num_replicas=3,
            router=RouterConfig("punica", max_requests=6),
            autoscaler=AutoscalerConfig("light-load", 1, 3, interval_s=0.2, light_requests=6, num_calm=1),
            consolidation_interval_s=interval_s,
        )
        sim = simulate(config, workload)
        check_all_finished(sim, workload)
        used[interval_s] = sim.replica_s()
        assert (sim.num_moves > 0) == (interval_s is not None)
    assert used[0.2] < used[None]


def test_requests_wait_their_turn_when_every_working_set_is_full():
    config = make_cluster(num_replicas=1, router=RouterConfig("punica", max_requests=2))
    sim = simulate(config, steady(10, 0.0))
    check_all_finished(sim, steady(10, 0.0))
    assert list(sim.ledger.first_token_s) == sorted(sim.ledger.first_token_s)


def test_what_the_engine_refuses_is_counted_as_rejected():
    workload = [WorkloadRequest(0.0, 300, 4), WorkloadRequest(0.0, 20, 4)]
    sim = simulate(make_cluster(), workload)
    assert list(sim.ledger.ending) == [Ending.REJECTED, Ending.FINISHED]
    summary = sim.ledger.summary(Slo(), sim.end_s)
    assert (summary.num_rejected, summary.num_finished, summary.attainment) == (1, 1, 0.5)


def test_stopping_early_leaves_requests_open():
    sim = simulate(make_cluster(), steady(100, 0.1), until_s=5.0)
    assert len(sim.ledger) == 51
    assert Ending.NONE in list(sim.ledger.ending)
    assert sim.end_s == 5.0
    assert sim.replica_s() == 10.0


@pytest.mark.parametrize("until_s", [math.inf, 1.5])
def test_the_throughput_over_time_is_of_the_tokens_that_came_out_then(until_s):
    workload = steady(200, 0.0)
    sim = simulate(make_cluster(num_replicas=1), workload, until_s)
    report = make_report(sim, {}, 1.0, None)
    (series,) = (series for series in report.series if series.name == "throughput")
    width_s = 2 * series.times_s[0]
    assert sum(series.values) * width_s == pytest.approx(sum(sim.ledger.num_output_tokens))
    assert len(series.values) == 20
    assert max(series.values) < 8 / 0.01  # eight sequences, and no step is shorter than this
    assert min(series.values[:-1]) > 0


def test_service_is_counted_by_tenant_over_time():
    sim = simulate(make_cluster(sample_interval_s=0.1), steady(10, 0.0))
    service = [sample.service for sample in sim.samples]
    assert service[-1] == {"t0": 5 * (20 + 2 * 10), "t1": 5 * (20 + 2 * 10)}
    assert all(a.get("t0", 0.0) <= b.get("t0", 0.0) for a, b in itertools.pairwise(service))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: replace(make_cluster(), num_replicas=0), "num_replicas"),
        (lambda: make_cluster(start_s=-1.0), "start_s"),
        (lambda: make_cluster(sample_interval_s=0.0), "sample_interval_s"),
        (lambda: make_cluster(max_moves=0), "max_moves"),
        (lambda: make_cluster(max_samples=4), "max_samples"),
        (lambda: LossConfig(mean_life_s=0.0), "mean_life_s"),
        (lambda: LossConfig(capacity=((2.0, 1), (1.0, 1))), r"capacity\[1\]"),
        (lambda: LossConfig(capacity=((-2.0, 1),)), r"capacity\[0\]"),
        (lambda: LossConfig(notice_s=float("nan")), "notice_s"),
        (lambda: AdapterPopulation((), AdapterPages()), "lora_ranks"),
        (lambda: AdapterPages(rows_per_page=0), "rows_per_page"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make, name: str):
    with pytest.raises(ConfigError, match=name):
        make()


def test_a_million_adapters_cost_nothing_until_they_are_named():
    adapters = AdapterPopulation((8, 64), AdapterPages(rows_per_page=16))
    assert adapters.info(999_999).lora_rank == 64
    assert adapters.info(999_999).num_pages == 4
    assert len(adapters.lora_rank_of) == 1


def test_the_ledgers_figures_are_those_of_the_glossary():
    config = ClusterConfig(make_cluster_scheduler(), slo=Slo(ttft_s=0.015))
    sim = ClusterSim(config, make_population())
    sim.run([WorkloadRequest(1.0, 20, 5), WorkloadRequest(1.0, 120, 1)])
    ledger = sim.ledger
    # 64 tokens per step of 10 ms: the first prompt and part of the second, then the rest.
    assert [ledger.ttft_s(n) for n in range(2)] == pytest.approx([0.01, 0.03])
    assert ledger.tpot_s(0) == pytest.approx(0.01)
    assert math.isnan(ledger.tpot_s(1))
    summary = ledger.summary(config.slo, 2.0)
    assert (summary.attainment, summary.goodput_rps, summary.output_tokens_per_s) == (0.5, 0.5, 3.0)
    assert summary.ttft_s is not None and summary.ttft_s.p50 == pytest.approx(0.02)
    assert summary.tpot_s is not None and summary.tpot_s.num_samples == 1


def test_what_arrives_at_one_time_is_in_one_step():
    sim = simulate(make_cluster(num_replicas=1), [WorkloadRequest(1.0, 10, 1) for _ in range(4)])
    assert list(sim.ledger.first_token_s) == [pytest.approx(1.014)] * 4


@pytest.mark.parametrize("refused", [WorkloadRequest(0.0, 300, 4), WorkloadRequest(0.0, 200, 400)])
def test_what_no_replica_has_memory_for_holds_up_nobody(refused):
    # The first prompt is longer than the context; the second is answered until the context is full.
    config = make_cluster(
        num_replicas=1,
        router=RouterConfig("punica", max_requests=1),
        scheduler=make_cluster_scheduler(num_kv_blocks=16),
    )
    sim = simulate(config, [refused, WorkloadRequest(0.0, 20, 4)], until_s=60.0)
    assert sim.ledger.ending[0] in (Ending.REJECTED, Ending.FINISHED)
    assert sim.ledger.ending[1] == Ending.FINISHED


def test_who_waits_for_a_replica_gets_one_that_comes_back_from_draining():
    # The second replica is drained, then the first is lost; the second is busy with one long answer.
    class Scripted:
        def wanted(self, seen):
            return 1 if seen.now_s < 1.5 else 2

    config = make_cluster(
        num_replicas=2,
        router=RouterConfig("round-robin"),
        cost_model=PerTokenCost(0.05),
        start_s=50.0,
        losses=LossConfig(capacity=((1.2, 1), (1.4, 2)), notice_s=0.0),
    )
    lasting = [WorkloadRequest(0.0, 20, 200), WorkloadRequest(0.0, 20, 200)]
    for seed in range(8):
        sim = ClusterSim(replace(config, seed=seed), make_population())
        sim._size._autoscaler = Scripted()
        sim.run([*lasting, WorkloadRequest(1.3, 20, 2)])
        check_all_finished(sim, [*lasting, WorkloadRequest(1.3, 20, 2)])
        if sim.ledger.num_restarts[1]:  # it was the one that did not drain that was lost
            assert sim.ledger.last_token_s[2] < 3.0 < sim.ledger.last_token_s[0]
            return
    raise AssertionError("no seed loses the replica that does not drain")


def test_nothing_is_lost_after_the_last_request_has_ended():
    losses = LossConfig(mean_life_s=1e6, capacity=((0.0, 2), (100.0, 0)))
    sim = simulate(make_cluster(losses=losses), steady(10, 0.1))
    assert sim.end_s < 10.0
    assert not any(record.is_lost for record in sim.replicas.values())


def test_replicas_that_are_called_off_while_they_start_are_paid_for_until_then():
    scaler = AutoscalerConfig("target-utilisation", 1, 3, interval_s=1.0, target_requests=1.0, num_calm=1)
    config = make_cluster(num_replicas=1, autoscaler=scaler, start_s=100.0)
    # Three requests at the first look at the fleet, one at the later ones.
    sim = simulate(
        config, [WorkloadRequest(0.0, 10, 100), WorkloadRequest(0.0, 10, 100), WorkloadRequest(0.0, 10, 230)]
    )
    asked = [record for record in sim.replicas.values() if record.asked_s > 0.0]
    assert [(record.asked_s, record.end_s) for record in asked] == [(1.0, 2.0), (1.0, 2.0)]
    assert sim.replica_s() == pytest.approx(sim.end_s + 2.0)


def test_tokens_that_were_delivered_count_where_the_simulation_is_stopped():
    sim = simulate(make_cluster(num_replicas=1), [WorkloadRequest(0.0, 20, 200)], until_s=1.0)
    assert sim.ledger.ending[0] == Ending.NONE
    summary = sim.ledger.summary(Slo(), 1.0)
    assert sim.service["default"] == 20 + 2 * summary.output_tokens_per_s > 100
    assert summary.ttft_s is not None and summary.ttft_s.p50 == pytest.approx(0.012)


def test_a_simulation_that_lasts_longer_than_expected_keeps_few_samples():
    config = make_cluster(num_replicas=1, sample_interval_s=0.01, max_samples=51)
    sim = simulate(config, steady(40, 0.0, num_output_tokens=100))
    assert sim.end_s > 5.0
    times = [sample.now_s for sample in sim.samples]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert 25 <= len(times) <= 51
    assert gaps == [pytest.approx(gaps[0])] * len(gaps)
    assert times[-1] >= sim.end_s
