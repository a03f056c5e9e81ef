"""Rows: what they say of where they come from."""

import shlex
import sys

from benchmarks import results


def test_a_rows_command_can_be_given_to_a_shell_as_it_stands(monkeypatch):
    words = ["-m", "benchmarks.step", "--mix", "base int8", "--cells", "b1-*/*", "--settings", '{"num_threads": 1}']
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", *words])
    assert shlex.split(results.setup()["command"]) == ["python", *words]


def test_a_rows_command_says_nothing_of_where_the_checkout_is(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "benchmarks.step", "--output", f"{results.ROOT}/rows.jsonl"])
    assert results.setup()["command"] == "python -m benchmarks.step --output rows.jsonl"
