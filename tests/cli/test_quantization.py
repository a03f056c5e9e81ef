"""The bundled model with int8 weights, against itself in float32: the bound that docs/design/0005 states."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.precision import compare, read_answers, rounded
from pomona import LLM
from pomona.cli.accuracy import measure, read_tasks
from pomona.cli.build import runner_config
from pomona.cli.config import load_config
from pomona.core.errors import ConfigError
from pomona.kernels.linear import quantize
from pomona.runner.config import RunnerConfig

NUM_PROMPTS = 12


@cache
def _llm(dtype: str, quantization: str) -> LLM:
    return LLM(dtype=dtype, quantization=quantization, kv_cache_bytes="64MiB", adapter_bytes="64MiB")


def _tasks():
    return [replace(task, answers=dict(list(task.answers.items())[:NUM_PROMPTS])) for task in read_tasks()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("with_adapters", [True, False])
def test_distributions_stay_within_the_stated_bound(with_adapters: bool, dtype: str) -> None:
    def adapter_of(name: str) -> str | None:
        return name if with_adapters else None

    expected = read_answers(_llm("float32", "none"), _tasks(), adapter_of)
    found = compare(expected, read_answers(_llm(dtype, "int8"), _tasks(), adapter_of))
    assert found["num_positions"] > 500
    assert 0 < found["kl_mean"] < 1e-3, found
    assert found["same_top"] >= 0.99, found


def test_adapters_answer_as_right_as_without_quantization() -> None:
    for found in measure(_llm("bfloat16", "int8"), _tasks()):
        assert found.with_adapter >= 0.9, found


def test_the_setting_reaches_the_runner_and_the_engine_says_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _llm("bfloat16", "int8").info.quantization == "int8"
    assert _llm("float32", "none").info.quantization == "none"
    assert _llm("bfloat16", "int8").info.precision == "bfloat16 over int8 weights"
    assert _llm("float32", "none").info.precision == "float32"
    monkeypatch.setenv("POMONA_QUANTIZATION", "int8")
    assert runner_config(load_config({}), "somewhere").quantization == "int8"


def test_the_setting_can_stand_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "pomona.toml").write_text('quantization = "int8"\n')
    assert load_config({}, tmp_path / "pomona.toml").quantization == "int8"


def test_other_precisions_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"quantization.*int4"):
        load_config({"quantization": "int4"})
    with pytest.raises(ConfigError, match="quantization is 'int4': must be none or int8"):
        RunnerConfig(model_path="somewhere", quantization="int4")


def test_the_simulation_of_eight_bits_per_output_is_what_is_served() -> None:
    weight = torch.randn(20, 64)
    torch.testing.assert_close(rounded(weight, 8, None), quantize(weight).dequantize())
    assert (rounded(weight, 8, 16) - weight).abs().mean() < (rounded(weight, 8, None) - weight).abs().mean()
    assert len(rounded(weight, 4, 16)[0, :16].unique()) <= 15
