"""The whole engine against peft: many kinds of adapter and the base in one batch, with everything that can go wrong
going on at once (staggered arrivals, chunked prompts, prefix hits, preemption), and every answer as if alone.
"""

import copy
import random
import warnings
from functools import cache
from pathlib import Path

import peft
import pytest
import torch

from pomona.core.request import FinishReason, SamplingParams
from support.adapters import ALL_TARGETS, make_adapter
from support.models import load_transformers, make_checkpoint
from support.runner import TinyEngine

NUM_TOKENS = 64
VOCAB_SIZE = 131

KINDS = {
    "rank-1": {"r": 1},
    "rank-4-qv": {"r": 4},
    "rank-16-all": {"r": 16, "target_modules": ALL_TARGETS},
    "rank-64-all-linear": {"r": 64, "lora_alpha": 64, "target_modules": "all-linear"},
    "rank-5-odd": {"r": 5, "target_modules": ["k_proj", "o_proj", "down_proj"]},
    "rslora": {"r": 8, "use_rslora": True},
    "patterns": {
        "r": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"v_proj": 32},
    },
    "regex": {"target_modules": r".*layers\.1\..*(gate|up)_proj"},
    "layers": {"target_modules": ALL_TARGETS, "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": ALL_TARGETS, "exclude_modules": ["o_proj"]},
    "dora": {"r": 8, "use_dora": True, "target_modules": ALL_TARGETS},
    "bias": {"bias": "all"},
    "lora-bias": {"lora_bias": True},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 17, 99]},
}


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("parity") / "base", "llama", attention_bias=True, max_position_embeddings=512
    )


@pytest.fixture(scope="module")
def adapter_paths(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(folder / name, base_path, seed=index, **fields)
        for index, (name, fields) in enumerate(KINDS.items())
    }


@cache
def _peft_model(base_path: Path, adapter_path: Path | None):
    model = load_transformers(base_path)
    if adapter_path is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), adapter_path).eval()


@cache
def expected_tokens(base_path: Path, adapter_path: Path | None, prompt: tuple[int, ...]) -> list[int]:
    """Greedy tokens of transformers or peft, one request alone."""
    with torch.inference_mode():
        out = _peft_model(base_path, adapter_path).generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)


def test_sixteen_kinds_of_adapter_and_the_base_share_a_batch_and_each_answers_as_if_alone(base_path, adapter_paths):
    chance = random.Random(5)
    shared = tuple(chance.randrange(VOCAB_SIZE) for _ in range(40))
    engine = TinyEngine(
        base_path,
        max_model_len=256,
        max_num_batched_tokens=48,  # prompts of 50 to 90 tokens are cut into chunks that share steps with decodes
        max_num_seqs=24,
        num_kv_blocks=260,  # too few for all sequences to finish together: some are preempted
        min_prefix_wait_tokens=0,
    )
    ids = {name: engine.load_adapter(path) for name, path in adapter_paths.items()}
    wanted = []
    names = [None, *KINDS]
    for name in (name for first in range(0, len(names), 2) for name in names[first : first + 2] * 2):
        # Each comes twice, the second time soon enough to find the first one's prefix.
        prompt = shared + tuple(chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(10, 50)))
        request_id = engine.add(prompt, GREEDY, ids[name] if name else None)
        wanted.append((request_id, name, prompt))
        for _ in range(chance.randrange(0, 6)):
            engine.step()
    engine.run()
    stats = engine.engine.stats()
    assert stats.num_preemptions > 0, "the test must force preemption"
    assert stats.num_prefix_hits > 0, "the test must hit the prefix cache"
    for request_id, name, prompt in wanted:
        expected = expected_tokens(base_path, adapter_paths[name] if name else None, prompt)
        assert engine.tokens(request_id) == expected, f"adapter {name}"
        assert engine.finish_reason(request_id) is FinishReason.LENGTH
    assert stats.num_kv_blocks_used == 0
    assert stats.num_pinned_adapters == 0


@pytest.mark.parametrize("name", list(KINDS))
def test_an_adapter_changes_the_base_s_answer(name, base_path, adapter_paths):
    prompt = tuple(range(5, 25))
    assert expected_tokens(base_path, adapter_paths[name], prompt) != expected_tokens(base_path, None, prompt)


def test_weights_replaced_under_one_name_change_the_answer_at_once_although_prefixes_are_cached(base_path, tmp_path):
    engine = TinyEngine(base_path)
    prompt = tuple(range(3, 43))
    old_path = make_adapter(tmp_path / "old", base_path, seed=100)
    new_path = make_adapter(tmp_path / "new", base_path, seed=101)
    old_id = engine.load_adapter(old_path)
    assert engine.generate(prompt, GREEDY, old_id) == expected_tokens(base_path, old_path, prompt)
    new_id = engine.load_adapter(new_path)
    engine.engine.retire_adapter(old_id)
    hits = engine.engine.stats().num_prefix_hits
    assert engine.generate(prompt, GREEDY, new_id) == expected_tokens(base_path, new_path, prompt)
    assert engine.engine.stats().num_prefix_hits == hits, "no block of the old version may be found"
    assert engine.generate(prompt, GREEDY, new_id) == expected_tokens(base_path, new_path, prompt)
    assert engine.engine.stats().num_prefix_hits > hits, "blocks of the same version are found"


def test_two_salts_never_share_blocks_and_one_salt_does(base_path):
    engine = TinyEngine(base_path)
    prompt = tuple(range(3, 43))
    answers = []
    for salt, is_hit in ((b"a", False), (b"b", False), (b"a", True), (b"b", True)):
        request_id = engine.add(prompt, GREEDY, salt=salt)
        engine.run()
        answers.append(engine.tokens(request_id))
        assert (engine.outputs[request_id][0].num_cached_tokens > 0) is is_hit
    assert answers[0] == answers[1] == answers[2] == answers[3]


def test_adapters_that_do_not_fit_together_take_turns_and_all_answer_right(base_path, adapter_paths):
    engine = TinyEngine(base_path, num_adapter_pages=20)
    names = ["rank-16-all", "rank-64-all-linear", "rank-4-qv", "rslora", "rank-16-all", "rank-5-odd"]
    ids = {name: engine.load_adapter(adapter_paths[name]) for name in dict.fromkeys(names)}
    prompt = tuple(range(3, 23))
    request_ids = [engine.add(prompt, GREEDY, ids[name]) for name in names]
    engine.run()
    assert engine.engine.stats().num_adapter_evictions > 0
    for name, request_id in zip(names, request_ids, strict=True):
        assert engine.tokens(request_id) == expected_tokens(base_path, adapter_paths[name], prompt)


def test_a_seeded_request_draws_the_same_tokens_alone_and_in_company(base_path):
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=7)
    prompt = tuple(range(3, 20))
    alone = TinyEngine(base_path).generate(prompt, params)
    engine = TinyEngine(base_path, max_num_batched_tokens=16)
    for seed in range(5):
        engine.add(prompt[: 5 + seed], SamplingParams(max_tokens=30, temperature=1.3, seed=seed))
        engine.step()
    request_id = engine.add(prompt, params)
    engine.run()
    assert engine.tokens(request_id) == alone


def test_prompt_logprobs_equal_the_model_s_own_in_chunks_and_with_a_replaced_head(base_path, adapter_paths):
    engine = TinyEngine(base_path, max_num_batched_tokens=7)
    prompt = tuple(range(3, 33))
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, prompt_logprobs=2)
    for name in (None, "saved-head", "embedding", "rank-16-all"):
        adapter_path = adapter_paths[name] if name else None
        request_id = engine.add(prompt, params, engine.load_adapter(adapter_path) if adapter_path else None)
        engine.run()
        with torch.inference_mode():
            logits = _peft_model(base_path, adapter_path)(torch.tensor([prompt])).logits[0].float()
        expected = torch.log_softmax(logits, dim=-1)
        found = [entry for output in engine.outputs[request_id] for entry in output.prompt_logprobs]
        assert [entry.token_id for entry in found] == list(prompt[1:])
        for position, entry in enumerate(found):
            assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        (last,) = engine.outputs[request_id][-1].logprobs
        assert last.logprob == pytest.approx(float(expected[-1].max()), abs=1e-4)
        assert len(last.top) == 2
