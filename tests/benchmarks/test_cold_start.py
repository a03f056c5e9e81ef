"""The cold-start benchmark end to end at tiny size. The numbers mean nothing."""

import torch

from benchmarks import cold_start, results


def test_every_way_and_rule_is_measured_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "quick_folder", lambda: tmp_path)
    threads = torch.get_num_threads()
    cold_start.main(["--quick"])
    torch.set_num_threads(threads)
    capsys.readouterr()
    page = (tmp_path / "docs" / "benchmarks" / "cold_start.md").read_text()
    for way in cold_start.WAYS:
        assert f"| 8 | 0.5 | {way} |" in page
    for rule in cold_start.RULES:
        assert f"| 16 | assist | {rule} |" in page
    assert (
        "TTFT against adapters in use"
        in (tmp_path / "docs" / "benchmarks" / "cold-start-adapters-pippin.svg").read_text()
    )
