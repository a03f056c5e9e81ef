"""Overlapped steps with the real runner: the same tokens as without, whatever comes, goes, stops or is aborted."""

import pytest

from pomona.core.ids import RequestId
from pomona.core.plan import ScheduledSeq, SeqStart, StepPlan
from pomona.core.request import FinishReason, SamplingParams
from support.adapters import ALL_TARGETS, make_adapter
from support.models import make_checkpoint
from support.random_work import play
from support.runner import TinyEngine

KINDS = {
    "all": {"r": 16, "target_modules": ALL_TARGETS},
    "qv": {"r": 4},
    "odd": {"r": 5, "target_modules": ["k_proj", "o_proj", "down_proj"]},
    "dora": {"r": 8, "use_dora": True, "target_modules": ALL_TARGETS},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("overlap") / "base", max_position_embeddings=512)


@pytest.fixture(scope="module")
def adapter_paths(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / name, base_path, seed=i, **fields) for i, (name, fields) in enumerate(KINDS.items())]


SETTINGS = {"max_model_len": 128, "max_num_batched_tokens": 32, "max_num_seqs": 6, "min_prefix_wait_tokens": 0}


def test_overlapped_steps_give_every_request_the_tokens_it_gets_without(base_path, adapter_paths):
    memory = {"num_kv_blocks": 45, "num_adapter_pages": 9}  # too little for all: preemption, adapters take turns
    num_evictions = num_hits = 0
    for seed in range(8):
        answers = []
        for overlap in (False, True):
            engine = TinyEngine(base_path, overlap_steps=overlap, **SETTINGS, **memory)
            answers.append(play(engine, adapter_paths, seed))
        assert answers[1] == answers[0], f"seed {seed}"
        stats = engine.engine.stats()
        assert stats.num_kv_blocks_used == stats.num_pinned_adapters == 0
        num_evictions += stats.num_adapter_evictions
        num_hits += stats.num_prefix_hits
    assert num_evictions > 0
    assert num_hits > 0


def test_memory_too_small_for_all_is_shared_out_by_preemption_and_answers_do_not_change(base_path):
    answers = []
    for overlap in (False, True):
        engine = TinyEngine(base_path, overlap_steps=overlap, num_kv_blocks=30, max_model_len=100)
        names = [engine.add(range(3 + i, 23 + i), SamplingParams(max_tokens=60, temperature=0.0)) for i in range(4)]
        engine.run()
        assert engine.engine.stats().num_preemptions > 0
        answers.append([engine.tokens(name) for name in names])
    assert answers[0] == answers[1]


def test_log_probabilities_are_those_of_the_step_that_sampled_them(base_path):
    params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=3, prompt_logprobs=1)
    found = []
    for overlap in (False, True):
        engine = TinyEngine(base_path, overlap_steps=overlap)
        name = engine.add(range(3, 20), params)
        engine.add(range(30, 40))
        engine.run()
        found.append([(output.logprobs, output.prompt_logprobs) for output in engine.outputs[name]])
    assert found[0] == found[1]


def test_a_result_that_comes_after_its_row_was_given_to_another_sequence_does_not_touch_it(base_path):
    runner = TinyEngine(base_path).loaded.runner
    params = SamplingParams(max_tokens=8, temperature=0.0)

    def start(name: str, token_ids: tuple[int, ...]) -> ScheduledSeq:
        return ScheduledSeq(RequestId(name), 0, len(token_ids), True, (0, 1), SeqStart(token_ids, 4, params, None))

    def decode(name: str, num_computed: int) -> ScheduledSeq:
        return ScheduledSeq(RequestId(name), num_computed, 1, True)

    late = runner.launch(StepPlan(1, (start("old", (9, 9, 9, 9)),)))
    new = runner.launch(StepPlan(2, (start("new", (5, 6, 7, 8)),), released=(RequestId("old"),)))
    late.result()
    second = runner.launch(StepPlan(3, (decode("new", 4),)))  # its token is that of step 2, still pending
    new.result()
    tokens = [second.result().sampled["new"], runner.execute(StepPlan(4, (decode("new", 5),))).sampled["new"]]
    engine = TinyEngine(base_path)
    assert tokens == engine.generate((5, 6, 7, 8), SamplingParams(max_tokens=3, temperature=0.0))[1:]


def test_a_request_aborted_while_its_step_is_under_way_ends_there(base_path):
    engine = TinyEngine(base_path, overlap_steps=True)
    name = engine.add(range(3, 20))
    other = engine.add(range(4, 20))
    engine.step()
    ending = engine.engine.abort(name)
    assert ending is not None
    assert ending.finish_reason is FinishReason.ABORT
    engine.run()
    assert engine.tokens(other) == TinyEngine(base_path).generate(range(4, 20))
    assert engine.engine.stats().num_kv_blocks_used == 0
