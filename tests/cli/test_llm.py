"""LLM, the offline interface: generation, streaming, adapters, stop strings."""

import pytest

from pomona import LLM, SamplingParams
from pomona.core.errors import AdapterError, ConfigError, ModelNotFoundError, PromptTooLongError
from pomona.core.request import FinishReason
from support.adapters import make_adapter
from support.models import make_checkpoint
from support.tokenizers import make_tokenizer_files

PARAMS = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("llm") / "tiny", vocab_size=400, max_position_embeddings=256)
    return make_tokenizer_files(path, vocab_size=400)


@pytest.fixture(scope="module")
def adapter_paths(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / f"a{index}", base_path, seed=index) for index in range(3)]


@pytest.fixture(scope="module")
def llm(base_path, adapter_paths):
    return LLM(
        str(base_path),
        adapters={path.name: str(path) for path in adapter_paths},
        dtype="float32",
        kv_cache_bytes="8MiB",
        adapter_bytes="4MiB",
        max_waiting=4,
    )


def test_a_list_of_prompts_with_an_adapter_each_is_answered_as_one_by_one(llm):
    prompts = ["The quick", "Many adapters", "The quick", "def add("]
    adapters = [None, "a0", "a1", "a0"]
    together = llm.generate(prompts, adapter=adapters, sampling=PARAMS)
    alone = [llm.generate(p, adapter=a, sampling=PARAMS)[0] for p, a in zip(prompts, adapters, strict=True)]
    assert [completion.token_ids for completion in together] == [completion.token_ids for completion in alone]
    assert together[0].text != together[2].text
    assert all(completion.finish_reason is FinishReason.LENGTH for completion in together)


def test_overlapped_and_replayed_steps_answer_alike(llm, base_path, adapter_paths):
    other = LLM(
        str(base_path),
        adapters={path.name: str(path) for path in adapter_paths},
        dtype="float32",
        kv_cache_bytes="8MiB",
        adapter_bytes="4MiB",
        overlap_steps=True,
        decode_graphs=True,
        graph_batch_sizes=[1, 4],
    )
    prompts, adapters = ["The quick", "Many adapters", "def add("], [None, "a0", "a1"]
    answers = [
        [completion.token_ids for completion in each.generate(prompts, adapter=adapters, sampling=PARAMS)]
        for each in (llm, other)
    ]
    assert answers[0] == answers[1]


def test_more_prompts_than_the_queue_holds_are_all_answered(llm):
    assert len(llm.generate(["The lazy dog"] * 50, sampling=PARAMS)) == 50


def test_a_stream_adds_up_to_the_answer_and_leaving_it_early_frees_everything(llm):
    pieces = list(llm.stream("The quick", adapter="a1", sampling=PARAMS))
    assert "".join(pieces) == llm.generate("The quick", adapter="a1", sampling=PARAMS)[0].text
    stream = llm.stream("The quick", sampling=SamplingParams(max_tokens=100, temperature=0.0), ignore_eos=True)
    next(stream)
    stream.close()
    llm.generate("x", sampling=PARAMS)
    assert llm.stats().num_running == 0
    assert llm.stats().num_kv_blocks_used == 0


def test_a_stop_string_is_cut_off_and_ends_the_answer(llm):
    free = llm.generate("The quick", sampling=PARAMS, ignore_eos=True)[0].text
    middle = free[len(free) // 2 : len(free) // 2 + 2]
    stopped = llm.generate("The quick", sampling=PARAMS, stop=[middle], ignore_eos=True)[0]
    assert stopped.text == free[: free.index(middle)]
    assert stopped.finish_reason is FinishReason.STOP


def test_token_ids_are_taken_as_they_are_and_chat_uses_the_template(llm):
    ids = llm.tokenizer.encode("The quick")
    assert llm.generate(ids, sampling=PARAMS)[0].token_ids == llm.generate("The quick", sampling=PARAMS)[0].token_ids
    answer = llm.chat("hello", adapter="a2", sampling=PARAMS)
    assert answer.num_prompt_tokens == len(llm.encode_chat([{"role": "user", "content": "hello"}]))


def test_adapters_are_replaced_and_unloaded_at_run_time(llm, base_path, tmp_path):
    first = make_adapter(tmp_path / "v1", base_path, seed=70)
    second = make_adapter(tmp_path / "v2", base_path, seed=71)
    llm.load_adapter("nightly", str(first))
    old = llm.generate("The quick", adapter="nightly", sampling=PARAMS)[0].text
    llm.load_adapter("nightly", str(second))
    assert llm.generate("The quick", adapter="nightly", sampling=PARAMS)[0].text != old
    llm.unload_adapter("nightly")
    with pytest.raises(ModelNotFoundError, match="nightly"):
        llm.generate("The quick", adapter="nightly")
    with pytest.raises(AdapterError):
        llm.load_adapter("nightly", str(tmp_path))


def test_logprobs_come_with_tokens_and_prompt(llm):
    params = SamplingParams(max_tokens=3, temperature=0.0, logprobs=1, prompt_logprobs=0)
    answer = llm.generate("The quick brown", sampling=params, ignore_eos=True)[0]
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    assert len(answer.prompt_logprobs) == answer.num_prompt_tokens - 1


def test_what_can_never_work_is_refused(llm):
    with pytest.raises(PromptTooLongError):
        llm.generate([list(range(100)) * 3], sampling=PARAMS)
    with pytest.raises(ConfigError, match="adapter"):
        llm.generate(["a", "b"], adapter=["a0"])
    assert llm.stats().num_running == 0
