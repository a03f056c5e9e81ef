"""Every measuring command end to end at tiny sizes, and the pages that come of its rows. The numbers mean nothing."""

import shutil
from collections.abc import Callable

import pytest
import torch

from benchmarks import ceilings, engine, report, results, server, step
from benchmarks.kernels import bench_ops, compare_builds
from benchmarks.peers import run as peers
from pomona.kernels.cpu import binding


@pytest.fixture
def quick(tiny_cache, tmp_path, monkeypatch):
    """The folder of quick rows; one thread."""
    monkeypatch.setattr(results, "quick_folder", lambda: tmp_path)
    monkeypatch.setenv("POMONA_NUM_THREADS", "1")
    before = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(before)


def _check(
    command: Callable[[list[str]], None], words: list[str], what: str, pages: dict[str, str], quick, capsys
) -> None:
    command(["--quick", *words])
    path = results.latest(what, quick)
    assert path is not None
    rows = results.read(path)
    assert rows
    assert {row["program"] for row in rows} == {results.program()}
    report.main(["--quick"])
    capsys.readouterr()
    for name, title in pages.items():
        assert title in (quick / "docs" / name).read_text()


def test_ceilings_are_measured_and_shown(quick, capsys):
    _check(
        ceilings.main, [], "ceilings", {"performance.md": "Floors are computed from the best medians"}, quick, capsys
    )


def test_steps_are_timed_and_shown(quick, capsys):
    pages = {"benchmarks/step.md": "| decode 8 | r128 among r4 |", "benchmarks/step-tiny.svg": "tiny: decode step"}
    _check(step.main, ["--batch", "8", "--profile"], "step", pages, quick, capsys)


def test_ops_are_timed_where_the_tensors_are_whether_or_not_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_ops, "backends_of", lambda op: ("reference", "cpu", "triton"))
    assert bench_ops.default_backends() == ["reference", "cpu"]


def test_ops_are_timed_and_shown(quick, capsys):
    pages = {"benchmarks/ops.md": "rank 128 beside 31 of 4", "benchmarks/ops-tiny.svg": "tiny: ops under the roof"}
    _check(bench_ops.main, ["--threads", "1"], "ops", pages, quick, capsys)


@pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)
def test_builds_are_compared(tmp_path, capsys):
    same = shutil.copy(binding.library()._name, tmp_path)
    words = [same, "--shape", "tiny", "--ops", "adapted,attention,linear", "--threads", "1", "--seconds", "0"]
    compare_builds.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("adapted    layer of 4 products, decode 32 skewed, rank 16") for line in lines)
    assert any(line.startswith("attention  decode 1, context 160") for line in lines)
    assert any("rows=2048" in line and " ratio " in line for line in lines)


def test_jobs_are_timed_and_shown(quick, capsys):
    pages = {"benchmarks/engine.md": "| zipf-1.5 |", "benchmarks/engine-tiny.svg": "tiny: LoRA tax"}
    _check(engine.main, [], "engine", pages, quick, capsys)


@pytest.mark.slow
def test_the_server_is_measured_and_shown(quick, capsys):
    _check(server.main, [], "server", {"performance.md": "8 streams, base"}, quick, capsys)


@pytest.mark.slow
def test_systems_are_compared_and_shown(quick, capsys):
    pages = {"benchmarks/peers.md": "| Pomona |", "benchmarks/peers-tiny-b8-128-64.svg": "tiny: 8 requests"}
    _check(peers.main, ["--system", "pomona"], "peers", pages, quick, capsys)
