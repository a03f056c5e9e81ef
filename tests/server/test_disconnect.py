import asyncio

import pytest

from pomona.core.errors import QueueFullError
from pomona.core.request import FinishReason
from support.driver import until
from support.server import BASE, Connection, ScriptedClient, Served, output, scripted_app

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
PROMPTS = {"prompt": ["one", "two"], "max_tokens": 400, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_goes_away_ends_all_its_work(served: Served, stream, n):
    connection = Connection(served.app, "/v1/completions", {"model": BASE, "n": n, "stream": stream, **PROMPTS})
    await until(lambda: len(served.executor.seen) == 2 * n, "all choices run")
    await connection.disconnect()
    await served.until_idle()
    if not stream:
        assert connection.messages == []


async def test_a_client_that_goes_away_while_it_waits_in_the_queue_ends_its_work(served: Served):
    served.executor.gate.clear()
    connections = [Connection(served.app, "/v1/completions", {"model": BASE, **PROMPTS}) for _ in range(3)]
    await asyncio.sleep(0.05)
    for connection in connections:
        await connection.disconnect()
    served.executor.gate.set()
    await served.until_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_every_engine_request_of_a_gone_client_is_aborted_once_or_more(tmp_path, stream):
    client = ScriptedClient([[output(40), None], [output(41), None], [output(42, finish_reason=FinishReason.LENGTH)]])
    app = scripted_app(client, tmp_path)
    connection = Connection(app, "/v1/completions", {"model": BASE, "prompt": "x", "n": 3, "stream": stream})
    await until(lambda: len(client.submitted) == 3 and client.num_open == 2, "two choices wait for ever")
    await asyncio.sleep(0.01)
    await connection.disconnect()
    assert client.num_open == 0
    # The one that had ended is left alone.
    assert set(client.aborted) == {client.submitted[0].request_id, client.submitted[1].request_id}


async def test_if_one_choice_is_not_admitted_the_others_are_aborted(tmp_path):
    client = ScriptedClient([[None], [QueueFullError("full")], [None]])
    app = scripted_app(client, tmp_path)
    connection = Connection(app, "/v1/completions", {"model": BASE, "prompt": "x", "n": 3})
    await connection.done
    assert connection.messages[0]["status"] == 429
    assert client.num_open == 0
    assert {client.submitted[0].request_id, client.submitted[2].request_id} <= set(client.aborted)


async def test_a_stop_string_ends_the_engines_request_and_not_its_siblings(tmp_path, tokenizer):
    fox, dog = tokenizer.encode("fox")[0], tokenizer.encode("dog")[0]
    client = ScriptedClient([[output(fox), None], [output(dog), output(dog, finish_reason=FinishReason.LENGTH)]])
    app = scripted_app(client, tmp_path)
    stop = tokenizer.token_text(fox)
    connection = Connection(app, "/v1/completions", {"model": BASE, "prompt": "x", "n": 2, "stop": stop})
    await connection.done
    assert client.aborted == [client.submitted[0].request_id]
    assert client.num_open == 0
    assert b'"finish_reason":"stop"' in connection.body
    assert b'"finish_reason":"length"' in connection.body


async def test_the_adapter_of_a_gone_client_can_be_unloaded(served: Served):
    (served.folder / "a").mkdir()
    (served.folder / "a" / "weights").write_text("one")
    await served.adapters.load("a", str(served.folder / "a"))
    served.executor.gate.clear()
    connection = Connection(served.app, "/v1/completions", {"model": "a", "stream": True, **PROMPTS})
    await until(lambda: served.adapters.num_requests(served.adapters.get("a")) == 1, "the adapter is in use")
    unloading = asyncio.create_task(served.adapters.unload("a"))
    await connection.disconnect()
    served.executor.gate.set()
    await asyncio.wait_for(unloading, 30)
    await served.until_idle()


async def test_a_chat_that_is_left_alone_is_answered_after_another_was_dropped(served: Served):
    dropped = Connection(served.app, "/v1/chat/completions", {"model": BASE, "stream": True, **CHAT})
    kept = asyncio.create_task(served.chat("hello"))
    await dropped.disconnect()
    assert (await kept)["choices"][0]["message"]["content"] == "user\nhello\nassistant\n"
    await served.until_idle()
