import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pomona.cli.main import app
from pomona.cli.plan import load_plan_spec, run_plan
from pomona.cli.simulate import read_lines
from pomona.core.errors import ConfigError
from pomona.sim.plan_search import PlanSettings, Trial
from pomona.sim.plan_trial import RelaxedCost, TrialRunner
from pomona.sim.step_work import StepWork

SPEC = """
[replica]
machine = "cpu-2-cores"
model = "smollm2-135m"
max_model_len = 512
max_num_seqs = 16

[adapters]
lora_ranks = [8, 16]
popularity = { kind = "zipf", num_adapters = 20, alpha = 1.0 }

[workload]
kind = "trace"
file = "trace.csv"
format = "plain"

[slo]
ttft_s = 0.4
tpot_s = 0.03

[plan]
min_attainment = 0.9
max_replicas = 16
adapter_shares = [0.1, 0.4]
policies = ["least-loaded", "affinity"]
window_s = 2.0
"""


def _folder(tmp_path: Path, spec: str = SPEC, rows: list[str] | None = None) -> Path:
    if rows is None:
        rows = [f"{k * 0.012},60,20" for k in range(250)]
    (tmp_path / "trace.csv").write_text("\n".join(["arrival_s,num_prompt_tokens,num_output_tokens", *rows]) + "\n")
    path = tmp_path / "spec.toml"
    path.write_text(spec)
    return path


def _runner(path: Path) -> TrialRunner:
    return TrialRunner(load_plan_spec(path), lambda name: read_lines(name, path.parent))


def test_a_plan_meets_the_objectives_and_one_replica_fewer_does_not(tmp_path, capsys):
    run_plan(_folder(tmp_path), as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert plan["answer"]["num_replicas"] > 1
    assert plan["outcome"]["attainment"] >= 0.9
    assert plan["one_fewer"]["attainment"] < 0.9
    assert plan["binds"] == "compute"
    assert plan["answer"]["adapter_rank_rows"] == 4 * plan["answer"]["num_adapter_pages"]


def test_the_command_says_the_answer_in_words(tmp_path):
    result = CliRunner().invoke(app, ["plan", str(_folder(tmp_path))])
    assert result.exit_code == 0, result.output
    assert "What binds below that: compute." in result.output
    assert "one replica fewer" in result.output


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("num_adapters = 20", "num_adapters = 0", r"adapters\.popularity.*num_adapters is 0"),
        ("num_adapters = 20", "num_adaptors = 20", r"adapters\.popularity\.num_adapt"),
        ("lora_ranks = [8, 16]", "lora_ranks = []", r"adapters\.lora_ranks"),
        ('machine = "cpu-2-cores"', 'machine = "abacus"', r"replica\.machine: .*abacus"),
        ("min_attainment = 0.9", "min_attainment = 1.5", r"plan\.min_attainment"),
        ("min_attainment = 0.9", "attainment = 0.9", r"plan\.attainment: unknown key"),
        ("adapter_shares = [0.1, 0.4]", "adapter_shares = [0.1, 1.4]", r"plan\.adapter_shares\.1"),
        ('"affinity"]', '"afinity"]', r"plan\.policies\.1"),
        ("window_s = 2.0", "window_s = -2.0", r"plan\.window_s"),
        ("window_s = 2.0", "window_start_s = 99.0", r"plan\.window_start_s"),
        ('format = "plain"', 'format = "plane"', r"workload\.format"),
        ("[replica]", "until_s = 5.0\n[replica]", r"until_s: a plan is made for the whole workload"),
        (
            "[0.1, 0.4]",
            "[0.4, 1e-6]",
            r"plan\.adapter_shares\.1 is 1e-06: adapters\.lora_ranks\.0 is 8: needs 2 adapter",
        ),
        ("ttft_s = 0.4\ntpot_s = 0.03", "", r"slo: needs at least one"),
        ("max_replicas = 16", "max_replicas = 1", r"plan\.max_replicas is 1: attainment is then"),
    ],
)
def test_a_wrong_key_is_refused_with_its_path(tmp_path, old: str, new: str, path: str):
    assert old in SPEC
    with pytest.raises(ConfigError, match=path):
        run_plan(_folder(tmp_path, SPEC.replace(old, new)), as_json=True)


def test_shares_of_memory_are_refused_for_a_profile(tmp_path):
    spec = SPEC.replace('machine = "cpu-2-cores"\nmodel = "smollm2-135m"', 'profile = "p.json"')
    with pytest.raises(ConfigError, match=r"plan\.adapter_shares: needs replica\.machine"):
        load_plan_spec(_folder(tmp_path, spec))


def test_memory_given_to_adapters_is_taken_from_kv(tmp_path):
    runner = _runner(_folder(tmp_path))
    few, many = (runner.cluster_config(PlanSettings(2, share, "affinity")).scheduler for share in (0.1, 0.4))
    assert few.num_adapter_pages < many.num_adapter_pages
    assert few.num_kv_blocks > many.num_kv_blocks


def test_resources_made_plentiful_change_nothing_else(tmp_path):
    runner = _runner(_folder(tmp_path))
    settings = PlanSettings(2, 0.1, "affinity")
    plain = runner.cluster_config(settings)
    kv = runner.cluster_config(settings, "kv").scheduler
    pages = runner.cluster_config(settings, "adapter memory").scheduler
    assert kv.num_kv_blocks == 4 * plain.scheduler.num_kv_blocks
    assert kv.num_adapter_pages == plain.scheduler.num_adapter_pages
    assert pages.num_adapter_pages == 4 * plain.scheduler.num_adapter_pages
    assert pages.num_kv_blocks == plain.scheduler.num_kv_blocks
    assert runner.cluster_config(settings, "cold starts").scheduler == plain.scheduler


def test_adapter_memory_made_plentiful_lends_kv_no_more_than_before(tmp_path):
    runner = _runner(_folder(tmp_path, SPEC.replace("max_num_seqs = 16", "max_num_seqs = 16\nblocks_per_page = 2")))

    def sizes(relaxation):
        config = runner.cluster_config(PlanSettings(2, 0.1, "affinity"), relaxation).scheduler
        return config.num_kv_blocks + config.num_adapter_pages * config.blocks_per_page, config.num_adapter_pages

    num_blocks, num_pages = sizes("none")
    assert sizes("kv") == (4 * num_blocks, num_pages)
    assert sizes("adapter memory") == (num_blocks, 4 * num_pages)


def test_relaxed_costs_scale_steps_and_copies_apart(tmp_path):
    cost = _runner(_folder(tmp_path)).cluster_config(PlanSettings(1, 0.1, "affinity")).cost_model
    work = StepWork(num_seqs=1, num_rows=1, num_decode_rows=1, num_sampled=1, num_loads=1, num_loaded_pages=3)
    load_s = cost.seconds(work) - RelaxedCost(cost, load_scale=0.0).seconds(work)
    assert load_s > 0.0
    assert RelaxedCost(cost).seconds(work) == pytest.approx(cost.seconds(work))
    halved = RelaxedCost(cost, compute_scale=0.5).seconds(work)
    assert halved == pytest.approx(0.5 * (cost.seconds(work) - load_s) + load_s)


def test_a_fleet_of_one_is_asked_what_it_would_lack_at_twice_the_rate(tmp_path):
    rows = [f"{k * 0.5},60,20" for k in range(10)]
    result = CliRunner().invoke(app, ["plan", str(_folder(tmp_path, rows=rows))])
    assert result.exit_code == 0, result.output
    assert "1 replica, " in result.output
    assert "What binds at twice the rate: nothing." in result.output
    assert "one replica fewer" not in result.output


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_what_is_not_defined_is_null(tmp_path, capsys):
    run_plan(_folder(tmp_path, rows=[f"{k * 0.5},60,1" for k in range(10)]), as_json=True)
    outcome = json.loads(capsys.readouterr().out, parse_constant=refuse_constant)["outcome"]
    assert outcome["tpot_p99_s"] is None and outcome["ttft_p99_s"] > 0.0


def test_a_workload_that_is_refused_at_once_meets_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"plan\.max_replicas is 16: attainment is then 0\.0% at best"):
        run_plan(_folder(tmp_path, rows=["0,600,20"]), as_json=True)


def test_the_window_has_the_capacity_of_its_time(tmp_path):
    spec = SPEC.replace("window_s = 2.0", "window_start_s = 1.5")
    losses = "[losses]\ncapacity = [[0.0, 1], [1.0, 4], [9.0, 2]]\n[plan]"
    always, later = (_runner(_folder(tmp_path, text)) for text in (spec, spec.replace("[plan]", losses)))
    trial = Trial(PlanSettings(4, 0.4, "affinity"))
    assert later(trial) == always(trial)
    assert later(replace(trial, is_whole=True)).attainment < always(replace(trial, is_whole=True)).attainment


def test_prompts_that_begin_alike_share_the_prefix_cache_in_a_plan_too(tmp_path):
    lines = [
        json.dumps(
            {"timestamp": 100 * k, "input_length": 1100, "output_length": 2, "hash_ids": [k // 20, 100 + k // 20]}
        )
        for k in range(60)
    ]
    spec = SPEC.replace("max_model_len = 512", "max_model_len = 2048\nenable_prefix_cache = true")
    spec = spec.replace('format = "plain"', 'format = "mooncake"').replace("window_s = 2.0", "window_start_s = 3.0")
    spec = spec.replace('popularity = { kind = "zipf", num_adapters = 20, alpha = 1.0 }', "")
    path = _folder(tmp_path, spec)
    (tmp_path / "trace.csv").write_text("\n".join(lines))
    runners = []
    for switch in ("true", "false"):
        path.write_text(spec.replace("_cache = true", f"_cache = {switch}"))
        runners.append(_runner(path))
    for is_whole in (False, True):
        shared, apart = (run(Trial(PlanSettings(1, 0.4, "affinity"), is_whole=is_whole)) for run in runners)
        assert shared.ttft_p99_s < apart.ttft_p99_s
        assert shared.output_tokens_per_s > apart.output_tokens_per_s
