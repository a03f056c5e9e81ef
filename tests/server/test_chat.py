import threading

import pytest

from support.server import Served, serve
from support.tokenizers import make_tokenizer_files

MESSAGES = [{"role": "user", "content": "hi"}]


async def test_a_conversation_is_answered(served: Served):
    answer = await served.chat("The quick brown fox")
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    choice = answer["choices"][0]
    # The executor echoes the prompt's ordinary tokens, which the template is a part of.
    assert choice["message"] == {
        "role": "assistant",
        "content": "user\nThe quick brown fox\nassistant\n",
        "refusal": None,
    }
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)


async def test_the_template_decides_the_prompt(served: Served):
    await served.chat("hi")
    rendered = served.tokenizer.decode(served.executor.seen[0].token_ids, skip_special_tokens=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_an_answer_may_use_the_rest_of_the_context(served: Served):
    await served.chat("hi", max_tokens=None)
    start = served.executor.seen[0]
    assert start.sampling.max_tokens == 512 - start.num_prompt_tokens


async def test_max_completion_tokens_is_the_newer_name(served: Served):
    answer = await served.chat("hi there", max_tokens=None, max_completion_tokens=2)
    assert answer["usage"]["completion_tokens"] == 2
    status, error = await served.refused("/v1/chat/completions", messages=MESSAGES, max_completion_tokens=0)
    assert (status, error["param"]) == (400, "max_completion_tokens")
    assert error["message"] == "max_completion_tokens is 0: must be at least 1"


async def test_log_probabilities_come_with_bytes_and_alternatives(served: Served):
    answer = await served.chat("🙂", logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"] - 1  # the end of sequence is not shown
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "user\n🙂\nassistant\n"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]


async def test_log_probabilities_without_alternatives(served: Served):
    answer = await served.chat("hi", logprobs=True)
    assert all(entry["top_logprobs"] == [] for entry in answer["choices"][0]["logprobs"]["content"])


async def test_n_choices_share_a_prompt_that_counts_once(served: Served):
    answer = await served.chat("hi", n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == served.executor.seen[0].num_prompt_tokens


async def test_special_tokens_of_the_answer_are_shown_on_request(served: Served):
    answer = await served.chat("hi", include_stop_str_in_output=True, skip_special_tokens=False)
    assert answer["choices"][0]["message"]["content"].endswith("<|im_end|>")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs is 3: needs logprobs to be true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21: must be between 0 and 20"),
        ({"logprobs": 3}, "logprobs", "logprobs is 3: must be true or false"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "give one"),
        ({"max_tokens": 600}, "max_tokens", "the model's context of 512 tokens"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages", "fit the model's context of 512 tokens"),
        ({"tools": [{}]}, "tools", "tools is not supported"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "'messages' is reserved"),
        ({"prompt": "x"}, "prompt", "Unknown parameter: 'prompt'."),
    ],
)
async def test_a_wrong_parameter_is_a_400_that_names_it(served: Served, body, param, message):
    status, error = await served.refused("/v1/chat/completions", **{"messages": MESSAGES, **body})
    assert (status, error["param"]) == (400, param)
    assert message in error["message"]


async def test_what_the_template_refuses_is_a_400_that_names_messages(tmp_path):
    async with serve(tmp_path) as served:
        (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    async with serve(tmp_path) as served:
        status, error = await served.refused("/v1/chat/completions", messages=MESSAGES)
        assert (status, error["param"]) == (400, "messages")
        assert "roles must alternate" in error["message"]


async def test_variables_reach_the_template(tmp_path):
    async with serve(tmp_path):
        (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ 'yes' if enable_thinking else 'no' }}")
    async with serve(tmp_path) as served:
        for value, text in ((True, "yes"), (False, "no")):
            answer = await served.chat("hi", chat_template_kwargs={"enable_thinking": value})
            assert answer["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("where", ["name", "variable"])
async def test_long_names_and_variables_are_rendered_and_tokenized_beside_the_event_loop(tmp_path, monkeypatch, where):
    source = "{{ note }}{{ messages[0]['name'] }}"
    make_tokenizer_files(tmp_path / "tokenizer", chat_template=source)
    async with serve(tmp_path) as served:
        tokenizer = served.app.state.context.tokenizer
        encode, threads = tokenizer.encode, set()

        def noted(*args, **kwargs):
            threads.add(threading.current_thread())
            return encode(*args, **kwargs)

        monkeypatch.setattr(tokenizer, "encode", noted)
        text = "one two " * 600
        message = {"role": "user", "content": "a", **({"name": text} if where == "name" else {})}
        variables = {"note": text} if where == "variable" else None
        body = {"messages": [message], "chat_template_kwargs": variables}
        assert (await served.http.post("/tokenize", json=body)).json()["count"] > 600
    assert threads
    assert threading.main_thread() not in threads


async def test_a_model_without_a_template_says_so(tmp_path):
    async with serve(tmp_path, chat_template=False) as served:
        status, error = await served.refused("/v1/chat/completions", messages=MESSAGES)
        assert (status, error["param"]) == (400, "messages")
        assert "'base' has no chat template" in error["message"]
        assert "/v1/completions" in error["message"]
