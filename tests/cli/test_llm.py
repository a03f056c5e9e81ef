"""LLM, the offline interface: generation, streaming, adapters."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pytest
from huggingface_hub import constants as hub_constants

from pomona import LLM, SamplingParams
from pomona.cli.llm import _Run
from pomona.core.errors import (
    AdapterError,
    ConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    PomonaError,
    PromptTooLongError,
)
from pomona.core.request import FinishReason
from pomona.runner.runner import ModelRunner
from pomona.sched.scheduler import Scheduler
from support.adapters import make_adapter
from support.models import make_checkpoint
from support.tokenizers import make_tokenizer_files

PARAMS = SamplingParams(max_tokens=12, temperature=0.0)
LONG = SamplingParams(max_tokens=60, temperature=0.0)
TOO_LONG = [1] * 300


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


def num_held(llm):
    """Requests that the engine has."""
    return llm.stats().num_running + llm.stats().num_waiting


def test_streams_read_in_turn_give_what_they_give_one_after_the_other(llm):
    free = llm.generate("def add(", sampling=LONG, ignore_eos=True)[0].text
    stop = (free[len(free) // 2 : len(free) // 2 + 2],)
    calls = [
        {"prompt": "The quick", "sampling": LONG},
        {"prompt": "Many adapters", "sampling": PARAMS, "adapter": "a0"},
        {"prompt": "The quick", "sampling": LONG, "adapter": "a1"},
        {"prompt": "def add(", "sampling": LONG, "stop": stop},
        {"prompt": "The", "sampling": SamplingParams(max_tokens=40, temperature=0.8, seed=5), "adapter": "a2"},
    ]
    alone = ["".join(llm.stream(ignore_eos=True, **call)) for call in calls]
    rounds = zip_longest(*[llm.stream(ignore_eos=True, **call) for call in calls], fillvalue="")
    assert ["".join(pieces) for pieces in zip(*rounds, strict=True)] == alone
    # Each begun, then each to its end: all but the first have ended, or nearly, when they are read on.
    streams = [llm.stream(ignore_eos=True, **call) for call in calls]
    first_pieces = [next(stream) for stream in streams]
    assert [first + "".join(stream) for first, stream in zip(first_pieces, streams, strict=True)] == alone
    assert num_held(llm) == 0


def test_a_stream_goes_on_after_other_calls_have_come_in_between(llm):
    prompts = ["The lazy dog", "Many adapters"] * 5  # more than the queue holds
    alone = llm.generate("The quick", adapter="a1", sampling=LONG, ignore_eos=True)[0].text
    others = [completion.token_ids for completion in llm.generate(prompts, adapter="a0", sampling=PARAMS)]
    answer = llm.chat("hello", sampling=PARAMS)
    stream = llm.stream("The quick", adapter="a1", sampling=LONG, ignore_eos=True)
    text = next(stream)
    assert llm.chat("hello", sampling=PARAMS).token_ids == answer.token_ids
    text += next(stream)
    between = llm.generate(prompts, adapter="a0", sampling=PARAMS)
    assert [completion.token_ids for completion in between] == others
    assert text + "".join(stream) == alone
    assert num_held(llm) == 0


def test_closing_a_stream_ends_its_request_and_no_other(llm):
    alone = llm.generate("Many adapters", adapter="a0", sampling=LONG, ignore_eos=True)[0].text
    left, read = (
        llm.stream(prompt, adapter=adapter, sampling=LONG, ignore_eos=True)
        for prompt, adapter in [("The quick", None), ("Many adapters", "a0")]
    )
    next(left)
    text = next(read)
    left.close()
    assert num_held(llm) == 1
    assert text + "".join(read) == alone
    assert num_held(llm) == 0


def test_a_call_that_is_refused_leaves_nothing_behind_and_others_alone(llm):
    alone = llm.generate("The quick", sampling=LONG, ignore_eos=True)[0].text
    with pytest.raises(PromptTooLongError):
        llm.generate(["Many adapters", TOO_LONG], sampling=PARAMS)
    assert num_held(llm) == 0
    stream = llm.stream("The quick", sampling=LONG, ignore_eos=True)
    text = next(stream)
    with pytest.raises(PromptTooLongError):
        llm.generate(["Many adapters"] * 9 + [TOO_LONG], sampling=PARAMS)
    with pytest.raises(PromptTooLongError):
        next(llm.stream(TOO_LONG, sampling=PARAMS))
    assert num_held(llm) == 1
    assert text + "".join(stream) == alone


def test_a_stream_cut_short_by_a_failure_in_another_call_says_so(llm, monkeypatch):
    alone = llm.generate("The quick", sampling=LONG, ignore_eos=True)[0].text
    stream = llm.stream("The quick", sampling=LONG, ignore_eos=True)
    next(stream)

    def fail(runner, plan):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "execute", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            llm.generate("Many adapters", sampling=PARAMS)
    with pytest.raises(PomonaError, match="the model failed: RuntimeError"):
        list(stream)
    assert llm.generate("The quick", sampling=LONG, ignore_eos=True)[0].text == alone


def test_a_stream_is_told_of_an_interrupt_while_a_result_was_taken_in(llm, monkeypatch):
    alone = llm.generate("The quick", sampling=LONG, ignore_eos=True)[0].text
    stream = llm.stream("The quick", sampling=LONG, ignore_eos=True)
    next(stream)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "_append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("Many adapters", sampling=PARAMS)
    with pytest.raises(PomonaError, match="the model failed: KeyboardInterrupt"):
        list(stream)
    assert llm.generate("The quick", sampling=LONG, ignore_eos=True)[0].text == alone


@pytest.mark.parametrize("is_in_engine", [True, False])
def test_a_stream_whose_end_an_interrupt_lost_ends_all_the_same(llm, monkeypatch, is_in_engine):
    alone = llm.generate("The quick", sampling=PARAMS, ignore_eos=True)[0].text
    stream = llm.stream("The quick", sampling=PARAMS, ignore_eos=True)
    next(stream)
    append, take, lost = Scheduler._append, _Run.take, []

    def interrupt_at_an_end(output):
        if output.finish_reason is not None and not lost:
            lost.append(output)
            raise KeyboardInterrupt
        return output

    with monkeypatch.context() as patch:
        if is_in_engine:
            patch.setattr(Scheduler, "_append", lambda *taken_in: interrupt_at_an_end(append(*taken_in)))
        else:
            patch.setattr(_Run, "take", lambda run, output: take(run, interrupt_at_an_end(output)))
        with pytest.raises(KeyboardInterrupt):
            llm.generate("Many adapters", sampling=LONG, ignore_eos=True)
    with pytest.raises(PomonaError, match="the model failed: KeyboardInterrupt"):
        list(stream)
    assert llm.generate("The quick", sampling=PARAMS, ignore_eos=True)[0].text == alone
    assert num_held(llm) == 0


def test_threads_may_share_it(llm):
    calls = [(prompt, adapter) for prompt in ("The quick", "Many adapters") for adapter in (None, "a0", "a1", "a2")]
    alone = [llm.generate(prompt, adapter=adapter, sampling=PARAMS)[0].token_ids for prompt, adapter in calls]
    together = threading.Barrier(len(calls))

    def ask(call):
        together.wait()
        return [llm.generate(call[0], adapter=call[1], sampling=PARAMS)[0].token_ids for _ in range(5)]

    with ThreadPoolExecutor(len(calls)) as pool:
        assert list(pool.map(ask, calls)) == [[token_ids] * 5 for token_ids in alone]
    assert num_held(llm) == 0


def test_an_answer_that_failed_says_why_beside_those_that_did_not(llm, monkeypatch):
    alone = llm.generate("Many adapters", sampling=PARAMS)[0]
    execute = ModelRunner.execute

    def fail_longest(runner, plan):
        result = execute(runner, plan)
        longest = max(plan.seqs, key=lambda seq: seq.num_computed_tokens + seq.num_scheduled_tokens, default=None)
        if longest is None or len(plan.seqs) == 1:
            return result
        return replace(result, failed={longest.request_id: "logits are not finite"})

    monkeypatch.setattr(ModelRunner, "execute", fail_longest)
    failed, fine = llm.generate(["The quick brown fox jumps over", "Many adapters"], sampling=PARAMS)
    assert (failed.finish_reason, failed.error) == (FinishReason.FAIL, "logits are not finite")
    assert (fine.token_ids, fine.error) == (alone.token_ids, None)


def test_an_adapter_unloaded_while_a_stream_uses_it_goes_when_the_stream_ends(llm, base_path, tmp_path):
    adapter_id = llm.load_adapter("leaving", str(make_adapter(tmp_path / "leaving", base_path, seed=80))).adapter_id
    alone = llm.generate("The quick", adapter="leaving", sampling=LONG, ignore_eos=True)[0].text
    stream = llm.stream("The quick", adapter="leaving", sampling=LONG, ignore_eos=True)
    text = next(stream)
    llm.unload_adapter("leaving")
    assert adapter_id in llm._adapter_host.staged
    assert text + "".join(stream) == alone
    llm.generate("x", sampling=PARAMS)
    assert adapter_id not in llm._adapter_host.staged


def test_an_adapter_that_nobody_uses_leaves_host_memory_as_soon_as_it_is_unloaded(llm, base_path, tmp_path):
    adapter_id = llm.load_adapter("idle", str(make_adapter(tmp_path / "idle", base_path, seed=81))).adapter_id
    llm.generate("The quick", adapter="idle", sampling=PARAMS)
    assert llm.stats().num_resident_adapters > 0
    llm.unload_adapter("idle")
    assert adapter_id not in llm._adapter_host.staged


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


@pytest.fixture
def hub_adapter(base_path, tmp_path, monkeypatch):
    """Hub id of an adapter that lies in the hub's cache."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    repo = tmp_path / "hub" / "models--org--legal"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    make_adapter(repo / "snapshots" / ("0" * 40), base_path, seed=90)
    return "org/legal"


def test_a_hub_id_is_looked_up_on_the_hub(llm, hub_adapter):
    llm.load_adapter("legal", hub_adapter)
    assert llm.generate("The quick", adapter="legal", sampling=PARAMS)[0].token_ids
    llm.unload_adapter("legal")
    with pytest.raises(AdapterError, match="hub cannot be reached"):
        llm.load_adapter("legal", "org/absent")


def test_broken_folders_of_an_adapters_dir_are_left_out_with_a_warning(base_path, tmp_path, caplog):
    good = make_adapter(tmp_path / "good", base_path, seed=91)
    shutil.copytree(good, tmp_path / "no adapter's name")
    shutil.copytree(good, tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").unlink()
    sizes = {"dtype": "float32", "kv_cache_bytes": "1MiB", "adapter_bytes": "4MiB"}
    llm = LLM(str(base_path), adapters_dir=str(tmp_path), **sizes)
    assert llm.adapters == ["good"]
    for name in ("broken", "no adapter's name"):
        assert any(str(tmp_path / name) in record.getMessage() for record in caplog.records)
    with pytest.raises(ConfigError, match=r"adapter 'mine' from '.*broken': no weights"):
        LLM(str(base_path), adapters={"mine": str(tmp_path / "broken")}, **sizes)


def test_logprobs_come_with_tokens_and_prompt(llm):
    params = SamplingParams(max_tokens=3, temperature=0.0, logprobs=1, prompt_logprobs=0)
    answer = llm.generate("The quick brown", sampling=params, ignore_eos=True)[0]
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    assert len(answer.prompt_logprobs) == answer.num_prompt_tokens - 1


def test_what_can_never_work_is_refused(llm):
    with pytest.raises(PromptTooLongError):
        llm.generate([TOO_LONG], sampling=PARAMS)
    with pytest.raises(ConfigError, match="adapter"):
        llm.generate(["a", "b"], adapter=["a0"])
    assert llm.stats().num_running == 0


def test_a_token_that_the_model_does_not_have_is_refused(llm):
    answer = llm.generate([[399]], sampling=PARAMS)[0]
    with pytest.raises(InvalidRequestError, match="prompt is 400: must be a token id from 0 to 399"):
        llm.generate([[1, 400]], sampling=PARAMS)
    assert llm.generate([[399]], sampling=PARAMS)[0].token_ids == answer.token_ids


@pytest.mark.parametrize("prompts", [[1.0, 2.0], [[1, 2.5]], [["The"]], [1, "The"], [None]])
def test_what_is_neither_text_nor_whole_token_ids_is_refused(llm, prompts):
    with pytest.raises(InvalidRequestError, match="prompt: must be text or whole token ids"):
        llm.generate(prompts, sampling=PARAMS)


def test_token_ids_may_be_an_array(llm):
    answer = llm.generate([[7, 8, 9]], sampling=PARAMS)[0].token_ids
    for prompts in (np.array([7, 8, 9]), [np.array([7, 8, 9])]):
        assert [completion.token_ids for completion in llm.generate(prompts, sampling=PARAMS)] == [answer]


def test_the_base_model_s_own_name_is_the_base_model(llm):
    named, unnamed = llm.generate(["The quick"] * 2, adapter=["tiny", None], sampling=PARAMS)
    assert named.token_ids == unnamed.token_ids
    with pytest.raises(ModelNotFoundError, match="nobody"):
        llm.generate("The quick", adapter="nobody", sampling=PARAMS)


def test_adapters_named_in_two_ways_are_refused(adapter_paths):
    with pytest.raises(ConfigError, match="adapter and adapters: must not both be given"):
        LLM(adapters={"a0": str(adapter_paths[0])}, adapter=f"a1={adapter_paths[1]}")


def test_an_answer_goes_on_from_a_text_and_begins_anew_after_token_ids(tmp_path):
    path = make_checkpoint(tmp_path / "tiny", vocab_size=700, max_position_embeddings=64)
    llm = LLM(
        str(make_tokenizer_files(path, vocab_size=400, kind="sentencepiece")),
        dtype="float32",
        kv_cache_bytes="8MiB",
        adapter_bytes="4MiB",
    )
    word = llm.tokenizer.encode("dog", add_special_tokens=False)[0]  # begins with the mark that becomes a space
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logit_bias=((word, 100.0),))
    on, anew = llm.generate(["The quick", llm.tokenizer.encode("The quick")], sampling=sampling)
    assert on.token_ids == anew.token_ids
    assert on.text == " " + anew.text
