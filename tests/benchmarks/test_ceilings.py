"""Measuring the machine's ceilings, at sizes too small to mean anything."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import ceilings, results
from benchmarks.roofline import Ceilings
from pomona.cli.ceilings import CeilingsConfig, _launch_tests, measure, render, run_ceilings
from pomona.core.errors import ConfigError

SMALL = CeilingsConfig(device="cpu", num_threads=1, num_runs=2, run_s=0.001, is_small=True)


@pytest.fixture(autouse=True)
def _keep_threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def test_every_test_is_measured_and_peaks_are_the_best_medians():
    seen: list[tuple[int, int]] = []
    report = measure(SMALL, lambda name, done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == 2 * len(report["ceilings"])
    assert {item["group"] for item in report["ceilings"]} == {"gemm", "read"}
    assert all(0 < item["worst"] <= item["median"] <= item["best"] for item in report["ceilings"])
    bf16 = [item["median"] for item in report["ceilings"] if item["facts"].get("dtype") == "bfloat16"]
    assert report["peaks"]["bfloat16_gflop_per_s"] == max(bf16)
    assert report["threads"] == 1
    assert render(report).row_count == len(report["ceilings"])


def test_the_command_prints_one_json_line_and_appends_it(tmp_path, capsys):
    output = tmp_path / "ceilings.jsonl"
    for _ in range(2):
        run_ceilings(SMALL, output)
    lines = capsys.readouterr().out.splitlines()
    assert output.read_text().splitlines() == lines
    assert [json.loads(line)["kind"] for line in lines] == ["ceilings"] * 2


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(ConfigError, match="Is a directory"):
        run_ceilings(SMALL, tmp_path)
    assert capsys.readouterr().out == ""


def test_small_kernels_are_captured_and_launched_although_inference_mode_is_left_in_between(monkeypatch):
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    with torch.inference_mode():
        for test in _launch_tests():
            test.call()


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_runs": 0},
        {"run_s": -1.0},
        {"run_s": math.nan},
        {"run_s": math.inf},
        {"num_threads": 0},
        {"num_threads": 1025},
        {"device": "tpu"},
    ],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CeilingsConfig(**wrong)


def test_floors_use_the_newest_clean_row_of_the_same_hardware(tmp_path, monkeypatch):
    def row(peak: float, hardware: object, *, is_clean: bool) -> dict[str, object]:
        peaks = {"bfloat16_gflop_per_s": peak, "float32_gflop_per_s": 1.0, "read_gb_per_s": 10.0}
        return {"kind": "ceilings", "hardware": hardware, "is_clean": is_clean, "peaks": peaks}

    here = results.hardware()
    path = tmp_path / "2026-01-01-ceilings.jsonl"
    for one in (row(100.0, here, is_clean=True), row(50.0, here, is_clean=False), row(9e9, {}, is_clean=True)):
        results.append(path, one)
    monkeypatch.setattr(results, "latest", lambda what: path)
    assert ceilings.current(Console(quiet=True)) == Ceilings(flops_per_s=1e11, bytes_per_s=1e10)
