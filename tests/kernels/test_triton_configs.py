"""The table of tile sizes."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from pomona.kernels.triton.configs import (
    BOUNDS,
    PARAMETERS,
    PATH,
    config_for,
    find_entry,
    load_table,
    parse_table,
    use_configs,
)

CPU = torch.device("cpu")


def _raw() -> dict[str, dict[str, list[dict[str, Any]]]]:
    return deepcopy(json.loads(PATH.read_text()))


def test_the_shipped_table_is_whole_and_its_tiles_are_powers_of_two() -> None:
    for ops in load_table().values():
        for entries in ops.values():
            for entry in entries:
                for name, value in entry.config.items():
                    may_be_off = name in ("split_tokens", "num_stages", "max_splits")
                    assert may_be_off or (value > 0 and value & (value - 1) == 0), (name, value)


def test_splits_begin_at_tile_boundaries() -> None:
    for ops in load_table().values():
        for entry in ops.get("attention", ()):
            assert entry.config["split_tokens"] % entry.config["block_n"] == 0


def test_the_first_entry_that_applies_is_taken() -> None:
    raw = _raw()
    raw["default"]["lora"] = [
        {"up_to": {"num_tokens": 8}, "rows_per_chunk": 16},
        {"up_to": {"num_tokens": 64}, "rows_per_chunk": 32},
        {"rows_per_chunk": 64},
    ]
    raw["A GPU"] = {"lora": [{"rows_per_chunk": 128}]}
    table = parse_table(raw)

    def rows(gpu: str, num_tokens: int) -> int:
        return find_entry(table, gpu, "lora", {"num_tokens": num_tokens}).config["rows_per_chunk"]

    assert [rows("default", num_tokens) for num_tokens in (1, 8, 9, 64, 65)] == [16, 16, 32, 32, 64]
    assert rows("Another GPU", 9) == 32
    assert rows("A GPU", 9) == 128
    shape = dict.fromkeys(BOUNDS["norm"], 64)
    assert find_entry(table, "A GPU", "norm", shape) == find_entry(table, "default", "norm", shape)


@pytest.mark.parametrize(
    "op, entries, message",
    [
        ("lora", [], "no entry"),
        ("lora", [{"up_to": {"num_tokens": 8}, "rows_per_chunk": 16}], "no bounds"),
        ("lora", [{"rows": 16}], "must have the parameters"),
        ("lora", [{"up_to": {"lora_rank": 8}, "rows_per_chunk": 16}, {"rows_per_chunk": 16}], "may be bounded by"),
    ],
)
def test_a_damaged_table_is_refused_with_the_place(op: str, entries: list[dict[str, Any]], message: str) -> None:
    raw = _raw()
    raw["A GPU"] = {op: entries}
    with pytest.raises(AssertionError, match=f"A GPU, {op}.*{message}"):
        parse_table(raw)


def test_the_defaults_must_have_every_op() -> None:
    raw = _raw()
    del raw["default"]["rope"]
    with pytest.raises(AssertionError, match="default must have the ops"):
        parse_table(raw)


def test_an_override_lasts_as_long_as_its_context() -> None:
    usual = config_for("lora", CPU, num_tokens=1)
    with use_configs(lora={"rows_per_chunk": 64}):
        assert config_for("lora", CPU, num_tokens=1) == {"rows_per_chunk": 64}
        with use_configs(norm={"num_warps": 1}):
            assert config_for("lora", CPU, num_tokens=1) == {"rows_per_chunk": 64}
        assert config_for("norm", CPU, features=1 << 20) != {"num_warps": 1}
    assert config_for("lora", CPU, num_tokens=1) == usual
    with pytest.raises(AssertionError, match="parameters"), use_configs(lora={"rows": 1}):
        pass


def test_parameters_and_bounds_name_the_same_ops() -> None:
    assert set(PARAMETERS) == set(BOUNDS)


def test_the_tuner_shows_what_it_would_try_without_a_gpu_and_changes_nothing() -> None:
    pytest.importorskip("triton")
    before = PATH.read_bytes()
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "benchmarks/kernels/tune_triton.py"), "--dry-run", "--ops", "lora_expand"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert "Nothing was measured or written" in done.stdout
    assert PATH.read_bytes() == before
