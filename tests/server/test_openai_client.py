"""The official client against a real server on a loopback socket."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from pomona.server.config import ServerConfig
from support.driver import make_adapter, until
from support.server import BASE, Served, listen, serve

USER = [{"role": "user", "content": "The quick brown 🙂 fox"}]
ECHO = "user\nThe quick brown 🙂 fox\nassistant\n"


@dataclass
class Live:
    served: Served
    url: str
    api: openai.AsyncOpenAI


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[Live]:
    config = ServerConfig(api_key="sk-live")
    async with (
        serve(tmp_path, config, max_num_seqs=64) as served,
        listen(served.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-live", max_retries=0) as api,
    ):
        # until_idle asks the application itself; let it pass.
        served.http.headers["authorization"] = "Bearer sk-live"
        yield Live(served, url, api)


async def test_chat(live: Live):
    answer = await live.api.chat.completions.create(model=BASE, messages=USER, temperature=0, n=2)
    assert [choice.message.content for choice in answer.choices] == [ECHO, ECHO]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer._request_id == answer.id.removeprefix("chatcmpl-")


async def test_chat_streamed_with_usage(live: Live):
    stream = await live.api.chat.completions.create(
        model=BASE, messages=USER, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ECHO
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-2].choices[0].finish_reason == "stop"


async def test_the_clients_own_stream_helper(live: Live):
    async with live.api.chat.completions.stream(model=BASE, messages=USER, temperature=0) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == ECHO


async def test_chat_log_probabilities(live: Live):
    answer = await live.api.chat.completions.create(
        model=BASE, messages=USER, temperature=0, logprobs=True, top_logprobs=3, max_completion_tokens=5
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 3 for entry in content)
    assert b"".join(bytes(entry.bytes) for entry in content) == answer.choices[0].message.content.encode()


async def test_completions_with_everything(live: Live):
    answer = await live.api.completions.create(
        model=BASE,
        prompt=["one two three", "four five six"],
        temperature=0,
        n=2,
        echo=True,
        logprobs=2,
        stop=[" three"],
        max_tokens=20,
        seed=3,
        user="me",
        extra_body={"top_k": 5, "min_p": 0.01, "ignore_eos": False},
    )
    assert [choice.text for choice in answer.choices] == ["one two threeone two"] * 2 + [
        "four five sixfour five six"
    ] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.token_logprobs[0] is None


async def test_completions_streamed(live: Live):
    stream = await live.api.completions.create(model=BASE, prompt="one two", temperature=0, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "one two"


async def test_the_blocking_client_works_too(live: Live):
    def ask() -> str:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="sk-live", max_retries=0) as api:
            stream = api.chat.completions.create(model=BASE, messages=USER, temperature=0, stream=True)
            return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)

    assert await asyncio.to_thread(ask) == ECHO


async def test_models_and_adapters(live: Live):
    await live.served.adapters.load("team/legal", make_adapter(live.served.folder / "one"))
    models = [model async for model in live.api.models.list()]
    assert [(model.id, model.parent) for model in models] == [(BASE, None), ("team/legal", BASE)]
    assert (await live.api.models.retrieve("team/legal")).id == "team/legal"
    answer = await live.api.completions.create(model="team/legal", prompt="one two three", temperature=0)
    assert answer.model == "team/legal"


@pytest.mark.parametrize(
    ("parameters", "error", "code", "param"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"max_tokens": 10_000}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            openai.BadRequestError,
            "invalid_value",
            "tools",
        ),
        ({"extra_body": {"unheard_of": 1}}, openai.BadRequestError, "invalid_value", "unheard_of"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_arrive_as_the_clients_own(live: Live, parameters, error, code, param, stream):
    with pytest.raises(error) as caught:
        await live.api.chat.completions.create(**{"model": BASE, "messages": USER, "stream": stream, **parameters})
    assert (caught.value.code, caught.value.param) == (code, param)


async def test_a_wrong_key_is_an_authentication_error(live: Live):
    with pytest.raises(openai.AuthenticationError) as caught:
        await live.api.with_options(api_key="sk-wrong").models.list()
    assert caught.value.code == "invalid_api_key"


async def test_a_failure_in_the_middle_of_a_stream_is_an_api_error(live: Live):
    live.served.executor.pause_at_token = 3
    stream = await live.api.completions.create(
        model=BASE, prompt="one two", stream=True, max_tokens=400, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    live.served.executor.fail_with = "it broke"
    live.served.executor.gate.set()
    with pytest.raises(openai.APIError, match="it broke"):
        [chunk async for chunk in stream]


async def test_64_streams_with_disconnects_leave_nothing_behind(live: Live):
    names = [BASE]
    for name in ("a", "b", "c"):
        await live.served.adapters.load(name, make_adapter(live.served.folder / name, name))
        names.append(name)

    async def ask(number: int) -> int:
        stream = await live.api.chat.completions.create(
            model=names[number % 4],
            messages=[{"role": "user", "content": f"{number} " * 20}],
            stream=True,
            n=1 + number % 2,
            max_tokens=150,
            extra_body={"ignore_eos": True},
        )
        num_chunks = 0
        async for _ in stream:
            num_chunks += 1
            if number % 2 and num_chunks > number % 7:
                await stream.close()
                break
        return num_chunks

    counts = await asyncio.gather(*(ask(number) for number in range(64)))
    assert all(counts)
    await live.served.until_idle()
    entries = live.served.adapters.entries
    await until(lambda: all(live.served.adapters.num_requests(entry) == 0 for entry in entries), "leases end")
    for entry in entries:
        await live.served.adapters.unload(entry.name)
    assert live.served.client._parts.adapter_host.staged == set()
