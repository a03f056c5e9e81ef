"""The cold-start benchmark end to end at tiny size. The numbers mean nothing."""

import torch

from benchmarks import cold_start, cold_start_report, results


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


def row(load, way, ttft_ms):
    return {"rank": 8, "load": load, "way": way, "ttft_ms": [ttft_ms], "itl_ms": [5.0]}


def test_cells_are_taken_together_as_ratios_beside_what_the_oracle_itself_varies_by():
    rows = [row(0.3, "oracle", 10.0), row(0.3, "assist", 20.0), row(0.5, "oracle", 40.0), row(0.5, "assist", 20.0)]
    assert cold_start_report.summary_table(rows).splitlines()[2:] == ["| assist | +0% | +0% | +0% |"]
    again = [*rows, row(0.3, "oracle", 12.0), row(0.5, "oracle", 44.0)]
    assert "slowest to fastest repetition | +15% | +15% | +0% |" in cold_start_report.summary_table(again)
