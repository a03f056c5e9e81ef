"""The step benchmark on a tiny model, and the rows it makes."""

import json

import pytest

from benchmarks.roofline import Ceilings, SequenceWork, step_cost
from benchmarks.shapes import TINY
from benchmarks.stamped_engine import StampedBuild, StampedEngine
from benchmarks.step import MIN_STEPS, NUM_PROMPT_TOKENS, Bench, Mix, cases, mixes, row_of, work_of
from pomona.cli.build import engine_builder
from pomona.cli.config import load_config
from support.driver import TinyBuilder, make_request

LIMITS = Ceilings(flops_per_s=1e11, bytes_per_s=1e10)
MIXED = Mix("r128 among r4", ("r128-00", "r4-01"))


@pytest.fixture(scope="module")
def bench(tiny_assets):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POMONA_BENCH_CACHE", str(tiny_assets))
        patch.setenv("POMONA_NUM_THREADS", "1")
        yield Bench(TINY, ["r16-00", "r4-01", "r128-00"])


def test_decode_steps_are_timed_after_all_sequences_have_started_and_nothing_is_left_behind(bench):
    for mix in (Mix("idle", (None, None)), Mix("identical", ("r16-00", "r16-00")), MIXED):
        times_s, context = bench.decode(mix)
        assert len(times_s) >= MIN_STEPS
        assert context == NUM_PROMPT_TOKENS + 3 + (len(times_s) - 1) / 2
    stats = bench._parts.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks_used, stats.num_pinned_adapters) == (0, 0, 0, 0)


def test_a_prefill_is_one_step_that_computes_every_prompt(bench):
    before = bench._parts.engine.stats().num_prompt_tokens
    for _ in range(2):  # prompts are new every time, also to an adapter that has had some
        assert len(bench.prefill(MIXED)) == 1
    assert bench._parts.engine.stats().num_prompt_tokens - before == 4 * NUM_PROMPT_TOKENS


def test_a_profile_names_our_functions(bench):
    functions = [row["function"] for row in bench.profile(MIXED, num_steps=2)]
    assert any(function.startswith(("kernels.", "model.", "runner.")) for function in functions)


def test_ranks_of_a_mix_are_those_of_its_adapters():
    assert mixes(8)[-1].ranks == {"r128-00": 128} | {f"r4-{index:02d}": 4 for index in range(1, 8)}
    sequences, ranks = work_of(MIXED, 1, 160.4)
    assert sequences == [SequenceWork(1, 160, 0), SequenceWork(1, 160, 1)]
    assert ranks == [128, 4]


def test_int8_weights_halve_the_bytes_of_a_step_of_the_base_alone():
    both = [mix for mix in mixes(1) if mix.name in ("base", "base int8")]
    plain, int8 = (row_of(TINY, "decode", mix, [0.001], 160.0, LIMITS) for mix in both)
    assert (plain["quantization"], int8["quantization"]) == ("none", "int8")
    assert int8["flops"] == plain["flops"]
    saved = plain["bytes"] - int8["bytes"]
    num_outputs = TINY.vocab_size + TINY.num_layers * sum(out for _, out in TINY.targets.values())
    num_inputs_looked_up = TINY.hidden_size
    assert saved == TINY.linear_parameters + TINY.vocab_size * TINY.hidden_size + num_inputs_looked_up - 4 * num_outputs


def test_a_row_holds_the_floor_of_its_step():
    row = row_of(TINY, "decode", MIXED, [0.004, 0.002, 0.003], 160.0, LIMITS)
    cost = step_cost(TINY, *work_of(MIXED, 1, 160.0))
    assert (row["step_ms"], row["step_ms_min"]) == (3.0, 2.0)
    assert (row["flops"], row["bytes"]) == (cost.flops, cost.bytes)
    assert row["times_floor"] == pytest.approx(0.003 / LIMITS.floor_s(cost))


def test_cases_cover_batches_mixes_and_prompts():
    found = [(phase, len(mix.adapters), mix.name) for phase, mix in cases((1, 8, 32), 2048)]
    assert ("decode", 32, "r128 among r4") in found
    assert ("decode", 1, "identical") in found
    assert ("prefill", 16, "distinct") in found
    assert len(set(found)) == len(found)


def test_a_stamped_engine_notes_every_token_of_every_request_and_stays_an_engine(tmp_path):
    engine = StampedEngine(TinyBuilder().build().engine, str(tmp_path / "stamps.json"))
    for name, count in (("a", 3), ("b", 5)):
        engine.add(make_request(name, max_tokens=count))
    now_s = 0.0
    while engine.has_work:
        now_s += 1.0
        engine.step(now_s)
    engine.save()
    stamps = json.loads((tmp_path / "stamps.json").read_text())
    assert {name: len(times) for name, times in stamps["tokens"].items()} == {"a": 3, "b": 5}
    assert all(times == sorted(times) for times in stamps["tokens"].values())
    assert stamps["steps"] == sorted(stamps["steps"])


def test_a_stamped_build_is_a_build_whose_engine_writes_its_stamps_when_closed(tiny_cache, tmp_path):
    plain = engine_builder(load_config({"model": str(tiny_cache / "tiny" / "model"), "num_threads": 1}))
    parts = StampedBuild(plain.config, plain.model_path, stamps_path=str(tmp_path / "stamps.json"))()
    parts.close()
    assert json.loads((tmp_path / "stamps.json").read_text()) == {"tokens": {}, "steps": []}
