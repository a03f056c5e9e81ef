"""Small runs of every reproduction: that they run, and that what they claim to show is there."""

import pytest

from benchmarks.papers import caraserve, punica, slora, slots, spot
from benchmarks.papers.lines import Line, Panel, line_chart
from benchmarks.papers.published import DATA


def test_consolidation_gathers_requests_and_least_loaded_spreads_them():
    sims = {policy: punica.simulate(policy, 4.0, 60.0) for policy in ("punica", "least-loaded")}
    found = {policy: punica.figures(sim) for policy, sim in sims.items()}
    assert found["punica"]["busy_share_of_replica_time"] < 0.5 * found["least-loaded"]["busy_share_of_replica_time"]
    assert found["punica"]["mean_batch_of_busy_replicas"] > 2 * found["least-loaded"]["mean_batch_of_busy_replicas"]
    assert "<svg" in punica.chart(sims, 60.0)


def test_the_ramp_rises_and_falls_symmetrically():
    times = [request.arrival_s for request in punica.ramp(20.0, 200.0)]
    assert times == sorted(times)
    assert len(times) == pytest.approx(2000, rel=0.1)
    assert sum(time < 100 for time in times) == pytest.approx(len(times) / 2, rel=0.1)
    assert sum(50 <= time < 150 for time in times) == pytest.approx(0.75 * len(times), rel=0.1)


def test_rank_aware_routing_wins_where_kernels_pad():
    found = {}
    for policy in ("rank-aware", "least-loaded"):
        sim = caraserve.simulate(policy, "max", 6.0, caraserve.RATE_RPS)
        found[policy] = sim.ledger.summary(sim.config.slo, 6.0, sim.ledger.numbers(2.0, 6.0)).attainment
    assert found["rank-aware"] > found["least-loaded"] + 0.5


def test_more_adapters_cost_throughput_and_some_adapter_costs_most():
    found = [slora.throughput_rps(slora.simulate(count, 7e-5, 40.0)) for count in (0, 1, 200)]
    assert found[0] > found[1] > found[2]
    assert found[0] - found[1] > found[1] - found[2]


def test_the_best_number_of_slots_is_inside():
    runs = slots.read_runs(DATA / "lora_h100_fit.csv")
    cost = slots.fit_cost([run for run in runs if run.is_saturated])
    kv_tokens = slots.fit_kv_tokens(runs)
    load = slots.Load(num_adapters=512, rate_rps=150.0, num_waiting=4000)
    found = {count: slots.simulate(count, load, cost, kv_tokens[count], 1e6, 20.0) for count in (8, 64, 384)}
    assert found[64] > 1.5 * found[8]
    assert found[64] > 2.0 * found[384]


def test_a_spot_day_ends_every_request():
    sim = spot.simulate("spot, stay until the loss", 1.0, 600.0)
    summary = sim.ledger.summary(spot.SLO, sim.end_s)
    assert summary.num_finished == summary.num_requests == 600
    assert max(count for _, count in spot.availability()) == 24
    assert "<svg" in spot.chart({"spot, stay until the loss": sim})


def test_a_line_chart_has_its_lines_labels_and_ticks():
    chart = line_chart("T<itle", "x", [Panel("unit", (Line("a", ((1.0, 2.0), (10.0, 4.0))),))], is_log_x=True)
    assert "T&lt;itle" in chart
    assert chart.count("<polyline") == 1
    assert chart.count("<circle") == 2
    assert ">10<" in chart
