"""What a measuring command cannot do it refuses at once, naming the option."""

import sys

import pytest

from benchmarks import accounts, engine, fairness, noisy_neighbour, residency, router, scale_sim, server, step
from benchmarks.kernels import bench_ops, compare_builds

REFUSED = [
    (step, "--batch 33", "--batch"),
    (step, "--mix nothing", "--mix"),
    (step, "--repeats 0", "--repeats"),
    (engine, "--batch b2-2-2", "--batch"),
    (engine, "--popularity nobody", "--popularity"),
    (engine, "--settings {", "--settings {"),
    (engine, "--settings [1]", "must be a JSON object"),
    (engine, '--settings {"speed":1}', "speed"),
    (engine, '--settings {"dtype":"float32"}', "dtype is not to be set"),
    (server, "--popularity nobody", "--popularity"),
    (server, "--streams 0", "--streams"),
    (bench_ops, "--ops lora,loar", "--ops loar"),
    (bench_ops, "--backends cup", "--backends cup"),
    (bench_ops, "--threads 0", "--threads"),
    (compare_builds, "/nowhere/at-all.so", "at-all.so does not load"),
    (fairness, "--workload overlaod", "--workload"),
    (noisy_neighbour, "--duration 0.5", "--duration 0.5"),
    (router, "--sizes 0", "--sizes"),
    (scale_sim, "--duration 0.5", "--duration 0.5"),
    (scale_sim, "--policy nobody", "--policy"),
    (accounts, "--rounds 0", "--rounds"),
    (residency, "--requests 0", "--requests"),
]


@pytest.mark.parametrize(("command", "words", "named"), REFUSED)
def test_what_cannot_be_measured_is_refused_by_name(command, words, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", *words.split()])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
