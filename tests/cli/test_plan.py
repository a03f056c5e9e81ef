import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pomona.cli.main import app
from pomona.cli.plan import read_spec, read_workload, run_plan
from pomona.core.errors import ConfigError
from pomona.sim.plan_search import PlanSettings
from pomona.sim.plan_trial import cluster_config, memory_split, router_config

SPEC = """
[workload]
trace = "trace.csv"
format = "plain"

[adapters]
num_adapters = 20
lora_ranks = [8, 16]

[replica]
cache_bytes = 4_000_000
kv_token_bytes = 512
rank_row_bytes = 1024
max_model_len = 512
max_num_seqs = 16
step_s = 0.01
terms = [{ quantity = "num_rows", seconds_each = 1e-4 }, { quantity = "num_loaded_pages", seconds_each = 1e-3 }]

[slo]
ttft_s = 0.3
min_attainment = 0.9

[search]
max_replicas = 8
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


def test_a_plan_meets_the_objectives_and_one_replica_fewer_does_not(tmp_path, capsys):
    run_plan(_folder(tmp_path), as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert plan["answer"]["num_replicas"] > 1
    assert plan["outcome"]["attainment"] >= 0.9
    assert plan["one_fewer"]["attainment"] < 0.9
    assert plan["binds"] == "compute"
    assert plan["answer"]["adapter_rank_rows"] == 8 * plan["answer"]["num_adapter_pages"]


def test_the_command_says_the_answer_in_words(tmp_path):
    result = CliRunner().invoke(app, ["plan", str(_folder(tmp_path))])
    assert result.exit_code == 0, result.output
    assert "What binds below that: compute." in result.output
    assert "one replica fewer" in result.output


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("num_adapters = 20", "num_adapters = 0", r"adapters\.num_adapters"),
        ("num_adapters = 20", "num_adaptors = 20", r"adapters\.num_adapt"),
        ("lora_ranks = [8, 16]", "lora_ranks = []", r"adapters\.lora_ranks"),
        ("lora_ranks = [8, 16]", "lora_ranks = [0]", r"adapters.*lora_ranks"),
        ("cache_bytes = 4_000_000", "cache_bytes = -1", r"replica\.cache_bytes"),
        ('quantity = "num_rows"', 'quantity = "num_cows"', r"replica\.terms\.0\.quantity"),
        ("step_s = 0.01", "step_s = nan", r"replica\.step_s"),
        ("min_attainment = 0.9", "min_attainment = 1.5", r"slo\.min_attainment"),
        ("adapter_shares = [0.1, 0.4]", "adapter_shares = [1.4]", r"search\.adapter_shares"),
        ('"affinity"]', '"afinity"]', r"search\.policies\.1"),
        ('format = "plain"', 'format = "plane"', r"workload\.format"),
        ("[slo]", "[slow]", r"slo"),
    ],
)
def test_a_wrong_field_is_refused_with_its_path(tmp_path, old: str, new: str, path: str):
    assert old in SPEC
    with pytest.raises(ConfigError, match=path):
        read_spec(_folder(tmp_path, SPEC.replace(old, new)))


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([], "no rows"),
        (["1.0,5,5", "0.5,5,5"], "line 3"),
        (["-1.0,5,5"], "line 2"),
        (["0.0,five,5"], "num_prompt_tokens"),
    ],
)
def test_empty_unsorted_and_malformed_traces_are_refused(tmp_path, rows: list[str], what: str):
    path = _folder(tmp_path, rows=rows)
    with pytest.raises(ConfigError, match=what):
        read_workload(read_spec(path), tmp_path)


def test_missing_files_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        read_spec(tmp_path / "nothing.toml")
    path = _folder(tmp_path, SPEC.replace('"trace.csv"', '"other.csv"'))
    with pytest.raises(ConfigError, match=r"workload\.trace is 'other\.csv'"):
        read_workload(read_spec(path), tmp_path)


def test_memory_given_to_adapters_is_taken_from_kv(tmp_path):
    spec = read_spec(_folder(tmp_path))
    # 4 MB; a page of 8 rows is 8 KiB, a block of 16 tokens is 8 KiB.
    assert memory_split(spec, 0.25) == (366, 122)
    assert sum(memory_split(spec, 0.5)) == pytest.approx(sum(memory_split(spec, 0.25)), abs=1)
    with pytest.raises(ConfigError, match="rank 16 needs 2"):
        memory_split(spec, 0.003)


def test_resources_made_plentiful_change_nothing_else(tmp_path):
    spec = read_spec(_folder(tmp_path))
    settings = PlanSettings(2, 0.25, "affinity")
    plain = cluster_config(spec, settings)
    assert cluster_config(spec, settings, "kv").scheduler.num_kv_blocks == 4 * plain.scheduler.num_kv_blocks
    assert cluster_config(spec, settings, "adapter memory").scheduler.num_kv_blocks == plain.scheduler.num_kv_blocks
    assert cluster_config(spec, settings, "adapter memory").scheduler.num_adapter_pages == 4 * 122
    assert cluster_config(spec, settings, "cold starts").scheduler == plain.scheduler
    affinity = router_config(spec, settings).affinity
    # A mean rank of 12 is two pages of a millisecond each; a prompt token is a row.
    assert (affinity.adapter_load_s, affinity.prompt_token_s) == pytest.approx((2e-3, 1e-4), rel=0.01)
