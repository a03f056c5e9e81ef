"""The comparison workload: the same for everyone, every time."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from benchmarks import workload
from benchmarks.shapes import TINY
from benchmarks.workload import POPULARITIES, assign, cells, prompts


def test_the_workload_is_the_same_on_every_machine_and_in_every_year():
    content = workload.build(TINY, root=Path("assets"))
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert digest == "dd3846496e6c16dcf910f52d30ba62365cac7726087be299b8d1e572775dc3a6"


def test_the_written_file_is_what_was_built(tmp_path, monkeypatch):
    monkeypatch.setenv(workload.CACHE_VARIABLE, str(tmp_path))
    path = workload.write(TINY, cells()[:1])
    assert path.is_relative_to(tmp_path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(workload.build(TINY, cells()[:1])))


@pytest.mark.parametrize(
    ("popularity", "expected"),
    [
        ("identical", [32]),
        ("uniform", [6, 6, 5, 5, 5, 5]),
        ("zipf-1.5", [11, 7, 5, 3, 2, 2, 1, 1]),
        ("distinct", [1] * 32),
    ],
)
def test_32_requests_divide_among_adapters_as_in_punicas_benchmark(popularity, expected):
    assigned = assign(popularity, 32)
    assert [assigned.count(index) for index in range(len(expected))] == expected


@pytest.mark.parametrize("popularity", ["base", "idle"])
def test_base_and_idle_ask_for_no_adapter(popularity):
    assert assign(popularity, 8) == [None] * 8


def test_prompts_of_a_small_batch_are_the_first_of_a_large_one_and_share_no_beginning():
    large = prompts(TINY, 32, 128)
    assert prompts(TINY, 8, 128) == large[:8]
    assert len({tuple(prompt[:16]) for prompt in large}) == 32
    assert all(256 <= token < TINY.vocab_size for prompt in large for token in prompt)


def test_cells_have_unique_names_and_those_of_one_popularity_stand_together():
    listed = cells()
    assert len({cell.name for cell in listed}) == len(listed)
    runs = [popularity for popularity, _ in itertools.groupby(cell.popularity for cell in listed)]
    assert runs == list(POPULARITIES)
    assert {(cell.batch, cell.num_prompt_tokens, cell.num_output_tokens) for cell in listed} == {
        (32, 128, 64),
        (32, 512, 32),
        (8, 128, 64),
        (1, 128, 64),
    }
