"""Rows: what they say of where they come from, and which of them are read together."""

import shlex
import sys

import pytest

from benchmarks import results, tables
from benchmarks.report import Report


def test_a_rows_command_can_be_given_to_a_shell_as_it_stands(monkeypatch):
    words = ["-m", "benchmarks.step", "--mix", "base int8", "--cells", "b1-*/*", "--settings", '{"num_threads": 1}']
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", *words])
    assert shlex.split(results.setup()["command"]) == ["python", *words]


def test_a_rows_command_says_nothing_of_where_the_checkout_is(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "benchmarks.step", "--output", f"{results.ROOT}/rows.jsonl"])
    assert results.setup()["command"] == "python -m benchmarks.step --output rows.jsonl"


@pytest.mark.parametrize(
    ("key", "first", "last"),
    [
        ("program", "p", "q"),
        ("hardware", {"cpu": "A", "cores": 2}, {"cpu": "B", "cores": 2}),
        ("settings", {}, {"num_threads": 1}),
        ("isa", "avx512bf16", "amx"),
        ("threads", 2, 1),
        ("dtype", "bfloat16", "float32"),
    ],
)
def test_what_was_measured_otherwise_than_the_last_rows_does_not_count(key, first, last):
    rows = [{**row_of("op", 9.0), key: first}, {**row_of("op", 5.0), key: last}]
    assert results.of_last_program(rows) == rows[1:]


def test_rows_of_another_kind_need_not_say_what_the_last_one_says():
    rows = [row_of("precision", 9.0), {**row_of("step", 5.0), "dtype": "bfloat16"}]
    assert results.of_last_program(rows) == rows
    assert results.of_last_program(rows[::-1]) == rows[::-1]


def test_systems_are_compared_on_the_machine_that_was_measured_last():
    def peer(system: str, cpu: str) -> results.Row:
        return {"kind": "peer", "system": system, "program": "p", "hardware": {"cpu": cpu}}

    rows = [peer("vllm", "A"), peer("pomona", "A"), peer("vllm", "B"), peer("pomona", "B")]
    assert tables.of_one_program(rows) == rows[2:]


def test_tokens_of_earlier_programs_do_not_count_as_agreement(tmp_path):
    def agreement(system: str, program: str, share: float) -> results.Row:
        what = {"kind": "agreement", "system": system, "program": program, "hardware": "A", "utc": "2026-01-02T03:04"}
        return {**what, "same_first_token": share, "mean_common_prefix": 64 * share}

    rows = [agreement("pomona", "wrong", 0.0), agreement("vllm", "wrong", 0.75), agreement("pomona", "right", 1.0)]
    peer = {"shape": "tiny", "cell": "b8-128-64/base", "popularity": "base", "settings": {}, "versions": {}}
    times = dict.fromkeys(("output_tokens_per_s", "ttft_mean_s", "tpot_mean_ms", "wall_s", "memory_mib"), 1.0)
    peer |= {
        **times,
        "kind": "peer",
        "system": "pomona",
        "program": "right",
        "hardware": "A",
        "utc": "2026-01-02T03:04",
    }
    for row in (peer, *rows):
        results.append(tmp_path / "2026-01-02-peers.jsonl", row)
    pages = dict(Report(tmp_path).files(""))
    assert "| Pomona | 100.0% | 64.0 | 1 |" in pages["benchmarks/peers.md"]
    assert "| vLLM (CPU build), mixed batch | 75.0% | 48.0 | 1 |" in pages["benchmarks/peers.md"]


def test_a_row_of_the_servers_table_is_of_one_number_of_streams():
    latencies = {"engine_itl_ms": {"p50": 1.0, "p99": 1.0}, "client_itl_ms": {"p50": 1.0, "p99": 1.0}}
    times = dict.fromkeys(("itl_p99_ratio", "server_cpu_us_per_token", "engine_host_cpu_us_per_token"), 1.0)
    rows = [
        {
            "popularity": "base",
            "num_streams": count,
            "output_tokens_per_s": speed,
            "is_clean": True,
            **latencies,
            **times,
        }
        for count, speed in ((8, 100.0), (256, 900.0))
    ]
    table = tables.server_table(rows)
    assert "| 8 streams, base | 100 |" in table
    assert "| 256 streams, base | 900 |" in table


def row_of(kind: str, value: float) -> results.Row:
    return {"kind": kind, "program": "p", "hardware": {"cpu": "A", "cores": 2}, "value": value}
