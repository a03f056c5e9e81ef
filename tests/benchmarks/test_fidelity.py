import time

import pytest

from benchmarks import fidelity, fidelity_page
from benchmarks.fidelity_live import LiveRun
from pomona.cli.config import load_config
from pomona.engine.engine import Engine
from pomona.profiling.fit import Sample
from pomona.sim.cost_model import PerTokenCost
from pomona.sim.step_work import StepWork
from pomona.workload.arrivals import AllAtOnce, PoissonArrivals
from pomona.workload.spec import generate
from support.engine import FakeExecutor, make_config, make_request

LIVE = {"ttft_p50_s": 0.1, "ttft_p99_s": 0.2, "tpot_p50_s": 0.01, "tpot_p99_s": 0.02, "output_tokens_per_s": 100.0}


def row(load, live, simulated):
    setup = {"hardware": {"cpu": "a cpu", "cores": 2}, "commit": "abc", "utc": "today", "program": "p"}
    figures = {"live": LIVE | live, "simulated": LIVE | simulated, "decodes_factor": 0.9, "prompts_factor": 1.2}
    return {"kind": "fidelity", "model": "m", "workload": "chat", "load": load, **figures, **setup}


def test_medians_over_rounds_are_compared_and_spread_is_the_farthest_of_them():
    figures = ((0.09, 0.12), (0.10, 0.11), (0.13, 0.099))
    rows = [row(0.3, {"ttft_p50_s": live}, {"ttft_p50_s": simulated}) for live, simulated in figures]
    cell = next(cell for cell in fidelity_page.cells(rows) if cell["metric"] == "ttft_p50_s")
    assert cell["error"] == pytest.approx(0.10)
    assert cell["live_spread"] == pytest.approx(0.30)
    assert cell["simulated_spread"] == pytest.approx(0.10)
    assert cell["num_runs"] == 3


def test_disturbed_runs_count_only_where_there_are_no_others():
    clean, disturbed = row(0.3, {"ttft_p50_s": 0.1}, {}), row(0.3, {"ttft_p50_s": 9.0}, {}) | {"is_clean": False}
    assert next(fidelity_page.cells([clean, disturbed]))["live"] == 0.1
    assert next(fidelity_page.cells([disturbed]))["live"] == 9.0


def test_the_page_has_a_line_per_figure_and_says_what_is_worst():
    page = fidelity_page.render([row(0.3, {}, {}), row(0.9, {}, {"output_tokens_per_s": 80.0})])
    assert page.count("| chat |") == 10
    assert "| 10 | 0.0% | 20.0% | 9 | 9 | 0.0% | 0.0% |" in page
    assert "| chat | 90% | 1 | throughput | 100.0 tokens/s | 80.0 tokens/s | -20.0% | 0.0% | 0.0% |" in page
    assert "No rows yet" in fidelity_page.render([])


def test_the_page_says_where_the_live_engine_differs_from_a_server():
    page = fidelity_page.render([row(0.3, {}, {})])
    for model in fidelity.models().values():
        config = load_config(model.settings)
        assert config.adapter_loading != load_config({}).adapter_loading
        assert f"`adapter_loading` is `{config.adapter_loading}`" in page
        assert not config.prefix_cache and "no prefix cache" in page


@pytest.mark.parametrize("name", fidelity.WORKLOADS)
def test_workloads_fit_a_context_of_1024_tokens_and_differ(name):
    requests = generate(fidelity.spec(name, 12, AllAtOnce(), 500))
    assert max(request.num_prompt_tokens + request.num_output_tokens for request in requests) < 1024
    assert {request.adapter_index for request in requests} <= set(range(12))


def test_the_live_loop_serves_what_has_arrived_and_measures_from_the_arrival():
    config = make_config()
    engine = Engine(config, FakeExecutor(config))
    requests = [make_request(f"r{number}", arrival_s=0.01 * number, max_tokens=3) for number in range(5)]
    start_s = time.perf_counter()
    run = LiveRun(engine, requests)
    run.go_on(0.015)
    assert not run.is_over
    stopped_s = run.clock_s
    time.sleep(0.1)
    run.go_on()
    assert run.is_over
    assert stopped_s < run.clock_s <= time.perf_counter() - start_s - 0.1
    found = run.figures()
    assert set(found) == set(fidelity_page.METRICS)
    assert 0 < found["ttft_p50_s"] <= found["ttft_p99_s"]
    assert found["output_tokens_per_s"] <= 15 / 0.04
    assert not engine.has_work


def test_bursts_are_bursty():
    assert isinstance(fidelity.arrivals_of("chat", 3.0), PoissonArrivals)
    assert fidelity.arrivals_of("bursts", 3.0).cv == 3.0


def test_samples_beside_a_run_scale_decodes_and_prompts_apart():
    cost = PerTokenCost(step_s=0.0, row_s=1.0)
    decodes, prompts = StepWork(num_rows=2, num_decode_rows=2), StepWork(num_rows=10)
    beside = [Sample(decodes, 3.0, 0)] * 10 + [Sample(prompts, 8.0, 0)] * 10 + [Sample(prompts, 500.0, 0)]
    found = fidelity.scaled(cost, beside)
    assert (found.seconds(decodes), found.seconds(prompts)) == (3.0, 8.0)
    assert fidelity.scaled(cost, beside[8:10]).seconds(decodes) == 2.0  # too few to go by
