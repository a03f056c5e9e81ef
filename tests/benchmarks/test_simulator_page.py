import json

from benchmarks.papers import report, vtc

SETUP = {
    "utc": "2026-01-01T00:00:00+00:00",
    "commit": "c",
    "hardware": {"cpu": "A CPU (family 1)"},
    "command": "python -m something",
}


def _write(folder, what: str, *rows: dict) -> None:
    lines = [json.dumps(SETUP | row) for row in rows]
    (folder / f"2026-01-01-{what}.jsonl").write_text("\n".join(lines) + "\n")


def test_the_page_has_a_section_for_every_kind_of_rows_and_none_for_others(tmp_path):
    sweep = {"kind": "sweep", "num_adapters": 5, "published_rps": 7.48, "throughput_rps": 7.5, "error": 0.0027}
    _write(tmp_path, "paper-slora", sweep | {"num_loads": 5})
    cost = {"kind": "router", "policy": "random", "num_replicas": 1000, "decision_us": 0.31, "request_us": 1.5}
    _write(tmp_path, "router", cost, cost | {"policy": "(a scan)", "decision_us": 80.0, "request_us": None})
    page = report.page(tmp_path)
    assert "| 5 | 7.48 | 7.50 | +0.3 % | 5 |" in page
    assert "| (a scan) | 80.0 |  |" in page
    assert page.count("\n## ") == 2
    assert page.count("python -m something") == 2


def test_only_the_last_run_of_a_file_counts(tmp_path):
    row = {
        "kind": "sweep",
        "num_adapters": 5,
        "published_rps": 7.0,
        "throughput_rps": 1.0,
        "error": 0.0,
        "num_loads": 1,
    }
    later = {"utc": "2026-01-01T01:00:00+00:00", "throughput_rps": 2.0}
    _write(tmp_path, "paper-slora", row, row | later)
    page = report.page(tmp_path)
    assert "| 2.00 |" in page
    assert "| 1.00 |" not in page


def test_the_page_and_its_charts_are_those_of_the_newest_rows():
    assert [path.name for path, content in report.files().items() if path.read_text() != content] == []


def test_vtc_keeps_the_service_equal_and_first_come_first_served_does_not():
    gap = {policy: vtc.gaps(vtc.simulate(policy, 60.0)) for policy in ("fcfs", "vtc")}
    assert gap["fcfs"][-1][1] > 3 * gap["vtc"][-1][1]
    assert "<svg" in vtc.chart(gap | {"default": gap["vtc"]})
