import asyncio
import threading

import pytest

from pomona.server.config import ServerConfig
from support.server import BASE, MAX_MODEL_LEN, Served, serve


async def test_a_text_is_continued(served: Served):
    answer = await served.complete("The quick brown fox")
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "base"
    assert answer["choices"] == [
        {"index": 0, "text": "The quick brown fox", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    num_tokens = len(served.tokenizer.encode("The quick brown fox"))
    usage = answer["usage"]
    assert usage["prompt_tokens"] == num_tokens
    assert usage["completion_tokens"] == num_tokens + 1  # the end of sequence counts
    assert usage["total_tokens"] == 2 * num_tokens + 1


async def test_sixteen_tokens_are_the_default(served: Served):
    answer = await served.complete("a b c d e f g h i j k l m n o p q r s t u v", max_tokens=None)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16


async def test_token_ids_are_taken_as_they_are(served: Served):
    token_ids = served.tokenizer.encode("The lazy dog")
    assert (await served.complete(token_ids))["choices"][0]["text"] == "The lazy dog"


async def test_prompts_times_n_choices_come_in_order(served: Served):
    answer = await served.complete(["one", "two"], n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["one", "one", "two", "two"]
    prompt_tokens = len(served.tokenizer.encode("one")) + len(served.tokenizer.encode("two"))
    assert answer["usage"]["prompt_tokens"] == prompt_tokens
    assert answer["usage"]["completion_tokens"] == 2 * (prompt_tokens + 2)


async def test_lists_of_token_ids_are_several_prompts(served: Served):
    prompts = [served.tokenizer.encode("one"), served.tokenizer.encode("two")]
    answer = await served.complete(prompts)
    assert [choice["text"] for choice in answer["choices"]] == ["one", "two"]


async def test_choice_i_uses_seed_plus_i(served: Served):
    await served.complete("abcdef", n=3, seed=2**63 - 2, temperature=1)
    assert [start.sampling.seed for start in served.executor.seen] == [2**63 - 2, 2**63 - 1, 0]


async def test_seeds_below_zero_are_seeds(served: Served):
    for seed in (-1, -(2**63)):
        await served.complete("abcdef", seed=seed)
    assert [start.sampling.seed for start in served.executor.seen] == [2**63 - 1, 0]


async def test_without_a_seed_every_choice_draws_its_own(served: Served):
    await served.complete(["abc", "abc"], n=2, temperature=1)
    seeds = [start.sampling.seed for start in served.executor.seen]
    assert len(set(seeds)) == 4
    assert max(seeds) > 2**40


async def test_every_parameter_reaches_the_engine(served: Served):
    await served.complete(
        "abc",
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "6": 1.5},
        seed=7,
        min_tokens=2,
        max_tokens=3,
        stop_token_ids=[9],
        logprobs=2,
    )
    sampling = served.executor.seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.05)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.1, 0.2, 1.1)
    assert sampling.logit_bias == ((5, -100.0), (6, 1.5))
    assert (sampling.seed, sampling.min_tokens, sampling.max_tokens, sampling.logprobs) == (7, 2, 3, 2)
    assert sampling.prompt_logprobs is None
    assert sampling.stop_token_ids == (served.tokenizer.eos_token_id, 9)


async def test_top_k_minus_one_keeps_all_as_elsewhere(served: Served):
    await served.complete("abc", top_k=-1)
    assert served.executor.seen[0].sampling.top_k == 0


async def test_a_stop_string_ends_the_text_before_it_and_the_engines_work(served: Served):
    answer = await served.complete("The quick brown fox jumps over", stop=["wn fo", "zzz"])
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("The quick bro", "stop", "wn fo")
    assert answer["usage"]["completion_tokens"] < len(served.tokenizer.encode("The quick brown fox jumps"))
    await served.until_idle()


async def test_a_stop_string_may_be_kept(served: Served):
    answer = await served.complete("The quick brown fox", stop="wn", include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == "The quick brown"


async def test_a_stop_token_ends_the_text(served: Served):
    token_ids = served.tokenizer.encode("The lazy dog")
    answer = await served.complete("The lazy dog", stop_token_ids=[token_ids[-1]])
    choice = answer["choices"][0]
    assert choice["text"] == served.tokenizer.decode(token_ids[:-1])
    assert choice["stop_reason"] == token_ids[-1]


async def test_ignore_eos_goes_on_to_max_tokens(served: Served):
    answer = await served.complete("ab", ignore_eos=True, max_tokens=9)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 9


async def test_min_tokens_delays_the_end(served: Served):
    num_tokens = len(served.tokenizer.encode("ab"))
    answer = await served.complete("ab", min_tokens=num_tokens + 3, max_tokens=60)
    assert answer["usage"]["completion_tokens"] > num_tokens + 3
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_echo_begins_with_the_prompt(served: Served):
    answer = await served.complete("The lazy dog", echo=True)
    assert answer["choices"][0]["text"] == "The lazy dogThe lazy dog"


async def test_echo_of_token_ids_shows_control_tokens_on_request(served: Served):
    token_ids = served.tokenizer.encode("The<|im_start|>dog")
    for skip, text in ((True, "Thedog"), (False, "The<|im_start|>dog")):
        answer = await served.complete(token_ids, echo=True, logprobs=0, max_tokens=0, skip_special_tokens=skip)
        choice = answer["choices"][0]
        assert choice["text"] == text
        assert choice["logprobs"]["text_offset"][-1] == len(text) - len(served.tokenizer.token_text(token_ids[-1]))


async def test_echo_with_log_probabilities_covers_prompt_and_output(served: Served):
    answer = await served.complete("The lazy dog", echo=True, logprobs=2, max_tokens=2)
    logprobs = answer["choices"][0]["logprobs"]
    prompt_ids = served.tokenizer.encode("The lazy dog")
    assert len(logprobs["tokens"]) == len(prompt_ids) + 2
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(prompt_ids) + 1)
    assert logprobs["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    text = answer["choices"][0]["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text[offset:].startswith(token)


async def test_only_the_prompts_log_probabilities_may_be_asked_for(served: Served):
    answer = await served.complete("The lazy dog", echo=True, logprobs=0, max_tokens=0)
    choice = answer["choices"][0]
    assert choice["text"] == "The lazy dog"
    assert len(choice["logprobs"]["tokens"]) == len(served.tokenizer.encode("The lazy dog"))
    assert answer["usage"]["completion_tokens"] == 0
    assert choice["finish_reason"] == "length"


async def test_log_probabilities_of_parts_of_a_character_have_distinct_names(served: Served):
    answer = await served.complete("🙂", logprobs=1, max_tokens=3)
    tokens = answer["choices"][0]["logprobs"]["tokens"]
    assert any(token.startswith("bytes:\\x") for token in tokens)


async def test_cached_prompt_tokens_are_reported(served: Served):
    prompt = "the same long beginning " * 10
    await served.complete(prompt)
    again = await served.complete(prompt)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


async def test_the_whole_context_may_be_used(served: Served):
    prompt = [300] * (MAX_MODEL_LEN - 1)
    answer = await served.complete(prompt, max_tokens=1)
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN


async def test_a_prompt_that_leaves_little_room_gets_what_there_is(served: Served):
    answer = await served.complete([300] * (MAX_MODEL_LEN - 5), max_tokens=None, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "prompt is empty: at least one token is needed"),
        ({"prompt": ["a", ""]}, "prompt[1]", "prompt[1] is empty"),
        ({"prompt": [[1], []]}, "prompt[1]", "prompt[1] is empty"),
        ({"prompt": [99999]}, "prompt", "prompt is 99999: must be a token id below"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "max_tokens is 0: must be at least 1"),
        ({"prompt": "a", "max_tokens": -5}, "max_tokens", "max_tokens is -5: must be at least 1"),
        ({"prompt": "a", "temperature": -0.1}, "temperature", "temperature is -0.1: must be between"),
        ({"prompt": "a", "top_p": 0}, "top_p", "top_p is 0.0: must be greater than 0"),
        ({"prompt": "a", "top_k": -2}, "top_k", "top_k is -2: must be"),
        ({"prompt": "a", "min_p": 2}, "min_p", "min_p is 2.0: must be"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty", "presence_penalty is 3.0: must be"),
        ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty", "frequency_penalty is -3.0: must be"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0.0: must be"),
        (
            {"prompt": "a", "repetition_penalty": 1e-40},
            "repetition_penalty",
            "repetition_penalty is 1e-40: must be between 0.01 and 100",
        ),
        ({"prompt": "a", "seed": -(2**63) - 1}, "seed", "seed is -9223372036854775809: must be"),
        ({"prompt": "a", "seed": 2**63}, "seed", "seed is 9223372036854775808: must be"),
        ({"prompt": "a", "n": 0}, "n", "n is 0: must be at least 1"),
        ({"prompt": "a", "n": 1000}, "n", "n is 1000: at most 256 choices"),
        ({"prompt": ["a"] * 200, "n": 2}, "n", "n is 2 for 200 prompts: at most 256 choices"),
        ({"prompt": "a", "best_of": 3}, "best_of", "best_of is 3: must be equal to n, which is 1"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "logprobs is 21: must be between 0 and 20"),
        ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias", "logit_bias is 99999: must be a token id below"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias", "logit_bias is 101.0: must be between"),
        ({"prompt": "a", "stop_token_ids": [99999]}, "stop_token_ids", "stop_token_ids is 99999: must be"),
        ({"prompt": "a", "min_tokens": 20}, "min_tokens", "min_tokens is 20: must be between 0 and max_tokens"),
        ({"prompt": "a", "max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", "min_tokens is 1: must be 0"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "needs stream to be true"),
        ({"prompt": "a", "messages": []}, "messages", "Unknown parameter: 'messages'."),
    ],
)
async def test_a_wrong_parameter_is_a_400_that_names_it(served: Served, body, param, message):
    status, error = await served.refused("/v1/completions", max_tokens=body.pop("max_tokens", 16), **body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]
    assert (await served.complete("still there"))["choices"][0]["text"] == "still there"


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "param", "message"),
    [
        (MAX_MODEL_LEN, 1, "prompt", f"The prompt has {MAX_MODEL_LEN} tokens: at most {MAX_MODEL_LEN - 1} fit"),
        (MAX_MODEL_LEN - 9, 10, "max_tokens", "together more than the model's context of 512 tokens"),
        pytest.param(1, 10**4300 - 1, "max_tokens", "together more than", id="a number that Python does not write out"),
    ],
)
async def test_too_long_is_named_with_lengths_and_limit(served: Served, num_tokens, max_tokens, param, message):
    status, error = await served.refused("/v1/completions", prompt=[300] * num_tokens, max_tokens=max_tokens)
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert message in error["message"]


async def test_a_huge_text_does_not_keep_others_waiting(served: Served):
    """While a text of megabytes is tokenized, the event loop turns."""
    huge = asyncio.create_task(served.refused("/v1/completions", prompt="word " * 60_000))
    num_answers = 0
    while not huge.done():
        await served.complete("ab", max_tokens=1)
        num_answers += 1
    status, error = huge.result()
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert num_answers > 1


async def test_many_texts_together_are_tokenized_beside_the_event_loop(served: Served, monkeypatch):
    tokenizer = served.app.state.context.tokenizer
    encode, threads = tokenizer.encode, set()

    def noted(*args, **kwargs):
        threads.add(threading.current_thread())
        return encode(*args, **kwargs)

    monkeypatch.setattr(tokenizer, "encode", noted)
    response = await served.http.post("/v1/completions", json={"model": BASE, "prompt": ["one two " * 100] * 16})
    assert response.status_code == 200
    assert threads
    assert threading.main_thread() not in threads


async def test_one_choice_past_the_limit_is_too_many(tmp_path):
    async with serve(tmp_path, ServerConfig(max_choices=2)) as served:
        assert len((await served.complete("a", n=2))["choices"]) == 2
        status, error = await served.refused("/v1/completions", prompt="a", n=3)
        assert (status, error["param"]) == (400, "n")
