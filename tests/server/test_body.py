import json
import time

import pytest
from openai.types.chat import ChatCompletionMessage

from pomona.core.errors import InvalidRequestError
from pomona.server.account_types import ShareRequest
from pomona.server.body import parse_object, validate
from pomona.server.errors import BodyError
from pomona.server.protocol import ChatCompletionRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "hi"}]
NAN, INF = float("nan"), float("inf")


def _chat(**fields):
    return {"model": "base", "messages": MESSAGES, **fields}


def _completion(prompt):
    return {"model": "base", "prompt": prompt}


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (_chat(foo=1), "foo", "Unknown parameter: 'foo'."),
        (_chat(temperature="1"), "temperature", "temperature is '1': must be a number"),
        (_chat(temperature=NAN), "temperature", "temperature is nan: must be a finite number"),
        (_chat(top_p=INF), "top_p", "top_p is inf: must be a finite number"),
        (_chat(max_tokens=1.5), "max_tokens", "max_tokens is 1.5: must be an integer"),
        (_chat(max_tokens=True), "max_tokens", "max_tokens is true: must be an integer"),
        (_chat(stream=1), "stream", "stream is 1: must be true or false"),
        (_chat(messages=[]), "messages", "messages is a list: must not be empty"),
        (_chat(messages=MESSAGES * 10_001), "messages", "messages has 10001 entries: at most 10000 are allowed"),
        (_chat(messages=[{"role": "assistant", "annotations": [{}]}]), "annotations", "annotations is not supported"),
        (_chat(messages="hi"), "messages", "messages is 'hi': must be a list"),
        (_chat(messages=[{"content": "x"}]), "messages[0].role", "messages[0].role is missing"),
        (_chat(messages=[*MESSAGES, {"role": "tool", "content": "x"}]), "messages[1].role", "is 'tool': must be"),
        (_chat(messages=[{"role": "user", "content": 5}]), "messages[0].content", "must be a string or a list of text"),
        (
            _chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "messages[0].content",
            "messages[0].content has part 0 of type 'image_url': only 'text' parts are supported",
        ),
        (_chat(messages=[{"role": "user", "content": "a", "cache": 1}]), "messages[0].cache", "Unknown parameter"),
        (_chat(stop=["a", ""]), "stop", "stop holds a string of 0 characters: must be 1 to 1024"),
        (_chat(stop=["a"] * 17), "stop", "stop has 17 strings: at most 16 are allowed"),
        (_chat(stop=["a", 1]), "stop", "stop must be a string or a list of strings"),
        (_chat(stop_token_ids=[1, -2]), "stop_token_ids", "stop_token_ids[1] is -2: must be a token id"),
        (_chat(stop_token_ids=list(range(2000))), "stop_token_ids", "stop_token_ids has 2000 entries: at most 1024"),
        (_chat(logit_bias={"x": 1}), "logit_bias", "logit_bias has the key 'x': must be a token id"),
        (_chat(logit_bias={"5": "1"}), "logit_bias", "logit_bias[5] is a string: must be a number"),
        (_chat(logit_bias=[1]), "logit_bias", "logit_bias is a list: must be an object"),
        (_chat(metadata={"a": 1}), "metadata", "metadata.a is a number: must be a string"),
        (_chat(chat_template_kwargs={"a": [NAN]}), "chat_template_kwargs", "holds a number that is not finite"),
        (_chat(stream_options={"x": 1}), "stream_options.x", "Unknown parameter: 'stream_options.x'."),
        ({"messages": MESSAGES}, "model", "model is missing"),
        ({"model": "base"}, "messages", "messages is missing"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_chat_is_named_with_its_value(body, field, message):
    with pytest.raises(InvalidRequestError) as caught:
        validate(ChatCompletionRequest, parse_object(json.dumps(body).encode()))
    assert caught.value.field == field
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("function_call", "auto"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("store", True),
        ("store", 0),
        ("web_search_options", {}),
    ],
)
def test_openai_parameters_that_would_change_the_answer_are_refused_by_name(name, value):
    with pytest.raises(InvalidRequestError, match=f"{name} is not supported by this server") as caught:
        validate(ChatCompletionRequest, _chat(**{name: value}))
    assert caught.value.field == name


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"]},
        {"store": False, "service_tier": "flex", "user": "me", "metadata": {"a": "b"}},
        {"prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "medium"},
        {name: None for name in ChatCompletionRequest.model_fields if name not in ("model", "messages")},
    ],
)
def test_values_without_effect_are_accepted(fields):
    validate(ChatCompletionRequest, _chat(**fields))


def test_an_answer_as_openais_client_has_it_may_be_sent_back():
    for fields in ({}, {"annotations": [], "tool_calls": []}):
        message = ChatCompletionMessage(role="assistant", content="hello", **fields).model_dump()
        assert {"annotations", "audio", "function_call", "refusal", "tool_calls"} <= message.keys()
        assert validate(ChatCompletionRequest, _chat(messages=[*MESSAGES, message])).messages[1].content == "hello"


@pytest.mark.parametrize("entries", [[1] * 1_000_000, ["bolt"] * 1_000_000])
def test_a_million_entries_of_a_share_make_one_error(entries):
    started_s = time.perf_counter()
    with pytest.raises(InvalidRequestError, match=r"must be a string|1000000 entries: at most 1000 ") as caught:
        validate(ShareRequest, {"name": "legal", "tenants": entries})
    assert time.perf_counter() - started_s < 1.0  # the event loop waits meanwhile
    assert len(caught.value.__cause__.errors()) == 1


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = validate(ChatCompletionRequest, _chat(messages=[{"role": "user", "content": parts}]))
    assert body.messages[0].content == "a\nb"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_may_have_four_forms(prompt, expected):
    assert validate(CompletionRequest, _completion(prompt)).prompt == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt is null: must be a string"),
        (5, "prompt is a number: must be a string"),
        ([], "prompt is an empty list: at least one prompt is needed"),
        (["a", 1], "prompt is a list of a string and others"),
        ([1, "a"], r"prompt\[1\] is a string: must be a token id"),
        ([1, True], r"prompt\[1\] is True: must be a token id"),
        ([[1.5]], r"prompt\[0\]\[0\] is 1.5: must be a token id"),
        ([[2**40]], r"prompt\[0\]\[0\] is 1099511627776: must be a token id"),
    ],
)
def test_other_prompts_are_refused(prompt, message):
    with pytest.raises(InvalidRequestError, match=message):
        validate(CompletionRequest, _completion(prompt))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON: EOF"),
        (b"{", "not valid JSON: EOF"),
        (b'{"a":1}x', "not valid JSON: trailing characters"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"\xff", "not valid UTF-8: invalid start byte at byte 0"),
        (b'{"a":"\xe4\xbd"}', "not valid UTF-8: .* at byte 6"),
        (b'{"a":"\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON: recursion limit"),
        (b'{"a":' * 100_000, "not valid JSON: recursion limit"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON: number out of range"),
    ],
)
def test_a_broken_body_says_how_it_is_broken(body, message):
    with pytest.raises(BodyError, match=message):
        parse_object(body)


@pytest.mark.parametrize(
    "body",
    [
        b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}",
        b'{"model":"m","messages":[' + b",".join([b"{}"] * 99_000) + b"]}",
        b'{"model":"m","messages":[{' + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}]}",
        b'{"model":"m","metadata":{' + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}}",
    ],
)
def test_a_million_mistakes_make_one_error(body):
    """A record per mistake would take a thousand times the memory of the body; the bound here is generous."""
    with pytest.raises(InvalidRequestError) as caught:
        validate(ChatCompletionRequest, parse_object(body))
    assert len(str(caught.value)) < 300
    cause = caught.value.__cause__
    assert cause is None or len(cause.errors()) < 10


@pytest.mark.parametrize("text", ["[{", '\\"[', "\\\\{"])
def test_brackets_in_texts_are_no_lists_and_objects(text):
    content = {"prompt": [text * 60_000, "}]"], "stop": [text]}
    assert parse_object(json.dumps(content).encode()) == content
    with pytest.raises(BodyError, match="more than 100000 lists and objects"):
        parse_object(json.dumps(content | {"more": [[]] * 100_000}).encode())
