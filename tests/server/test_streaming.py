import json
import re
from pathlib import Path

import pytest

from pomona.core.errors import EngineUnavailableError, QueueFullError
from pomona.core.plan import TokenLogprobs
from pomona.core.request import FinishReason
from support.server import Connection, ScriptedClient, Served, output, scripted_app

GOLDEN = Path(__file__).parents[1] / "golden"
EOS = 2
MESSAGES = [{"role": "user", "content": "hi"}]
HELD_BACK = "fo"


def _events(text: str) -> list[dict]:
    """The JSON of every event; checks the framing."""
    frames = text.split("\n\n")
    assert frames[-1] == ""
    assert frames[-2] == "data: [DONE]"
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames[:-1])
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def _joined(events: list[dict], index: int, part) -> str:
    return "".join(part(choice) for event in events for choice in event["choices"] if choice["index"] == index)


async def _stream(served: Served, path: str, **body) -> list[dict]:
    response = await served.http.post(
        path, json={"model": "base", "temperature": 0, "max_tokens": 64, "stream": True, **body}
    )
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    return _events(response.text)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"n": 2},
        {"stop": ["wn f"]},
        {"stop": ["wn f"], "include_stop_str_in_output": True},
        {"logprobs": True, "top_logprobs": 1, "stop": ["zzz", "wn f"]},
        {"max_tokens": 3},
    ],
)
async def test_a_streamed_chat_is_the_same_as_a_whole_one(served: Served, parameters):
    content = "The quick brown 你好 🙂 fox"
    whole = await served.chat(content, **parameters)
    messages = [{"role": "user", "content": content}]
    events = await _stream(
        served, "/v1/chat/completions", messages=messages, stream_options={"include_usage": True}, **parameters
    )
    assert len({event["id"] for event in events}) == 1
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    *chunks, last = events
    assert last["choices"] == []
    assert last["usage"] == whole["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}
    assert all(event["usage"] is None for event in chunks)
    for choice in whole["choices"]:
        own = [part for event in chunks for part in event["choices"] if part["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[-1]["delta"] == {}
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert own[-1]["stop_reason"] == choice["stop_reason"]
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        if "logprobs" in parameters:
            streamed = [entry for part in own if part["logprobs"] for entry in part["logprobs"]["content"]]
            assert streamed == choice["logprobs"]["content"]


@pytest.mark.parametrize(
    "parameters",
    [{}, {"n": 2}, {"echo": True}, {"echo": True, "logprobs": 1}, {"logprobs": 0, "stop": ["row"]}, {"max_tokens": 1}],
)
async def test_a_streamed_completion_is_the_same_as_a_whole_one(served: Served, parameters):
    prompts = ["The quick brown fox", "你好 🙂"]
    whole = await served.complete(prompts, **parameters)
    events = await _stream(served, "/v1/completions", prompt=prompts, **parameters)
    assert all(event["object"] == "text_completion" and "usage" not in event for event in events)
    for choice in whole["choices"]:
        own = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        if "logprobs" in parameters:
            for name, values in choice["logprobs"].items():
                assert [value for part in own if part["logprobs"] for value in part["logprobs"][name]] == values


async def test_half_a_character_is_never_sent(served: Served):
    app, tokenizer = served.app, served.tokenizer
    token_ids = tokenizer.encode("a🙂é")
    client = ScriptedClient(
        [[*(output(token_id) for token_id in token_ids), output(finish_reason=FinishReason.LENGTH)]]
    )
    app = scripted_app(client, served.folder)
    connection = Connection(app, "/v1/completions", {"model": "base", "prompt": "x", "stream": True})
    await connection.done
    texts = [event["choices"][0]["text"] for event in _events(connection.body.decode())]
    assert "".join(texts) == "a🙂é"
    assert "\ufffd" not in "".join(texts)


async def test_a_refusal_comes_before_the_stream_with_its_status(served: Served):
    status, error = await served.refused("/v1/chat/completions", messages=MESSAGES, stream=True, temperature=-1)
    assert (status, error["param"]) == (400, "temperature")


@pytest.mark.parametrize(("error", "status"), [(QueueFullError("full"), 429), (EngineUnavailableError("gone"), 503)])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_request_that_is_not_admitted_has_an_http_status_also_when_streamed(tmp_path, error, status, n):
    app = scripted_app(ScriptedClient([[error]] + [[None]] * (n - 1)), tmp_path)
    connection = Connection(app, "/v1/completions", {"model": "base", "prompt": "x", "stream": True, "n": n})
    await connection.done
    assert connection.messages[0]["status"] == status
    assert dict(connection.messages[0]["headers"])[b"retry-after"]


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        (output(finish_reason=FinishReason.FAIL, error="logits are not finite"), "request_failed"),
        (output(finish_reason=FinishReason.ABORT), "request_aborted"),
        (EngineUnavailableError("the engine died"), "engine_unavailable"),
    ],
)
async def test_a_failure_in_the_middle_is_the_last_event(tmp_path, ending, code):
    client = ScriptedClient([[output(40), ending], [output(41), None]])
    app = scripted_app(client, tmp_path)
    connection = Connection(app, "/v1/completions", {"model": "base", "prompt": "x", "stream": True, "n": 2})
    await connection.done
    *_, last = _events(connection.body.decode())
    assert last["error"]["code"] == code
    # The sibling did not fail, but its answer is of no use any more.
    assert client.num_open == 0
    assert client.submitted[1].request_id in client.aborted


GOLDEN_CASES = {
    "chat_stream": (
        "/v1/chat/completions",
        {"messages": MESSAGES, "stop": ["fox"], "stream_options": {"include_usage": True}},
        ["The", " quick", " ", HELD_BACK, "am", None],
    ),
    "completion_stream_logprobs": ("/v1/completions", {"prompt": "x", "logprobs": 1}, ["The", "é", None]),
}


@pytest.mark.parametrize("name", GOLDEN_CASES)
async def test_the_bytes_of_a_stream_are_those_on_file(tmp_path, tokenizer, name):
    """tests/golden: the wire as clients see it, one event per step. To change it on purpose, edit the file."""
    path, body, texts = GOLDEN_CASES[name]
    script = []
    for text in texts:
        if text is None:
            script.append(output(EOS, finish_reason=FinishReason.STOP, stop_token_id=EOS, logprobs=_logprobs([EOS])))
            continue
        script.extend(
            output(token_id, logprobs=_logprobs([token_id]), num_cached_tokens=16)
            for token_id in tokenizer.encode(text)
        )
    app = scripted_app(ScriptedClient([script]), tmp_path)
    connection = Connection(app, path, {"model": "base", "stream": True, **body})
    await connection.done
    transcript = connection.body.decode()
    transcript = re.sub(r'"id":"(\w+)-[0-9a-f]{32}"', r'"id":"\1-ID"', transcript)
    transcript = re.sub(r'"created":\d+', '"created":0', transcript)
    assert transcript == (GOLDEN / f"{name}.txt").read_text()


def _logprobs(token_ids) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token_id, -0.25, 1, ((token_id, -0.25),)) for token_id in token_ids)
