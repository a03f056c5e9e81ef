"""The bundled model: what ships is small, of every kind, and right, measured through Pomona's own engine."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pomona import LLM
from pomona.cli.accuracy import measure, read_tasks
from pomona.cli.hub import bundled_dir

ADAPTERS = sorted(path.name for path in (bundled_dir() / "adapters").iterdir())
README = Path(__file__).parents[1] / "README.md"
NUM_PROMPTS = 50


def config_of(name):
    return json.loads((bundled_dir() / "adapters" / name / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def llm():
    return LLM(kv_cache_bytes="64MiB", adapter_bytes="64MiB")


def test_all_of_it_is_at_most_20_mb_and_names_nobody_s_machine():
    files = [path for path in bundled_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    for path in files:
        if path.suffix == ".json":
            assert not re.search(r'"/(home|root|tmp|work|Users)', path.read_text()), path


def test_the_adapters_are_of_every_kind():
    configs = {name: config_of(name) for name in ADAPTERS}
    assert len(configs) >= 8
    ranks = {config["r"] for config in configs.values()}
    assert min(ranks) == 4 and max(ranks) == 64 and len(ranks) >= 4
    targets = {name: set(config["target_modules"]) for name, config in configs.items()}
    assert any(names == {"q_proj", "v_proj"} for names in targets.values())
    assert any(len(names) >= 7 for names in targets.values())
    assert sum(config["use_rslora"] for config in configs.values()) == 1
    assert sum(config["use_dora"] for config in configs.values()) == 1
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs.values())
    assert any(
        config["modules_to_save"] or targets[name] & {"lm_head", "embed_tokens"} for name, config in configs.items()
    )


def test_each_adapter_is_right_at_least_nine_times_in_ten_and_the_base_at_most_twice(llm):
    tasks = [replace(task, answers=dict(list(task.answers.items())[:NUM_PROMPTS])) for task in read_tasks()]
    assert sorted(task.name for task in tasks) == ADAPTERS
    for found in measure(llm, tasks):
        assert found.with_adapter >= 0.9, found
        assert found.base_alone <= 0.2, found


def test_the_readme_s_offline_example_prints_what_its_comment_says(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "LLM()" in block]
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"print\(.*\)\s*# (\S+)", example).group(1)
