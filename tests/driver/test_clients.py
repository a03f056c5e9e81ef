"""What both clients promise: the same tests over an engine in a thread and over one in a process of its own."""

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from pomona.core.errors import (
    AdapterError,
    AdapterNotFoundError,
    AdapterUnavailableError,
    EngineUnavailableError,
    InvalidRequestError,
    PomonaError,
    PromptTooLongError,
    QueueFullError,
)
from pomona.core.request import FinishReason
from pomona.driver.client import ProcessClient
from pomona.driver.config import DriverConfig
from pomona.driver.local_client import LocalClient
from support.driver import (
    RAISE_TOKEN,
    TinyBuilder,
    expected_tokens,
    is_idle,
    make_adapter,
    make_request,
    read,
    until,
)

Client: TypeAlias = LocalClient | ProcessClient
Open: TypeAlias = Callable[..., contextlib.AbstractAsyncContextManager[Client]]


@pytest.fixture(params=["thread", "process"])
def open_client(request) -> Open:
    """Start a client over a tiny engine; close it after the block."""

    def make(builder: TinyBuilder | None = None, config: DriverConfig | None = None) -> Client:
        builder = builder or TinyBuilder()
        return LocalClient(builder.build(), config) if request.param == "thread" else ProcessClient(builder, config)

    return make


async def test_outputs_arrive_in_order_and_end_once(open_client: Open):
    async with open_client() as client:
        requests = [make_request(str(index), (index + 1, 2), max_tokens=20 + index) for index in range(20)]
        answers = await asyncio.gather(*(read(client.submit(request)) for request in requests))
        assert [tokens for tokens, _ in answers] == [expected_tokens(request) for request in requests]
        assert {reason for _, reason in answers} == {FinishReason.LENGTH}
        await until(lambda: is_idle(client), "idle")
        assert client.stats().num_output_tokens == sum(request.sampling.max_tokens for request in requests)


async def test_an_idle_client_is_ready_and_says_so(open_client: Open):
    async with open_client() as client:
        assert client.is_ready
        assert client.state == "ready"
    assert not client.is_ready
    assert client.state == "closed"
    with pytest.raises(EngineUnavailableError, match="closed"):
        client.submit(make_request("late"))


async def test_closing_twice_is_harmless(open_client: Open):
    async with open_client() as client:
        await client.close()


async def test_64_streams_closed_at_random_leave_nothing_in_the_engine(open_client: Open):
    rng = random.Random(1)
    async with open_client(TinyBuilder(step_s=0.0005, max_num_seqs=16)) as client:

        async def leave_early(index: int) -> None:
            stream = client.submit(make_request(str(index), (index + 1,), max_tokens=200))
            for _ in range(rng.randrange(5)):
                await anext(stream)
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

        await asyncio.gather(*(leave_early(index) for index in range(64)))
        # An answer that comes after those aborts proves that the snapshot does too.
        request = make_request("last")
        assert (await read(client.submit(request)))[0] == expected_tokens(request)
        await until(lambda: is_idle(client), "idle")
        assert client.stats().num_output_tokens < 64 * 200


@pytest.mark.parametrize("how", ["cancel", "drop"])
async def test_a_reader_that_is_cancelled_or_dropped_aborts_its_request(open_client: Open, how):
    async with open_client(TinyBuilder(step_s=0.001)) as client:
        stream = client.submit(make_request("r", max_tokens=4000))
        await anext(stream)
        if how == "cancel":
            reader = asyncio.create_task(read(stream))
            await asyncio.sleep(0.01)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
        del stream
        await until(lambda: is_idle(client), "idle")
        assert client.stats().num_output_tokens < 4000


async def test_abort_ends_a_stream_with_its_terminal_output(open_client: Open):
    async with open_client(TinyBuilder(step_s=0.001)) as client:
        request = make_request("r", max_tokens=4000)
        stream = client.submit(request)
        first = await anext(stream)
        await client.abort(request.request_id)
        await client.abort(make_request("unknown").request_id)
        tokens, reason = await read(stream)
        assert reason is FinishReason.ABORT
        tokens = [*first.new_token_ids, *tokens]
        assert tokens == expected_tokens(request)[: len(tokens)]


async def test_a_slow_reader_gets_every_token_in_fewer_outputs(open_client: Open):
    async with open_client() as client:
        request = make_request("slow", max_tokens=2000)
        stream = client.submit(request)
        outputs = [await anext(stream)]
        await until(lambda: client.stats().num_output_tokens == 2000, "the answer's end")
        outputs += [output async for output in stream]
        assert [token for output in outputs for token in output.new_token_ids] == expected_tokens(request)
        assert len(outputs) < 100


@pytest.mark.parametrize(
    ("request_", "error", "field"),
    [
        (make_request("r", tuple(range(5000))), PromptTooLongError, "prompt"),
        (make_request("r", adapter_id="00ff"), InvalidRequestError, "model"),
    ],
)
async def test_a_rejected_request_raises_the_engines_own_error(open_client: Open, request_, error, field):
    async with open_client() as client:
        stream = client.submit(request_)
        with pytest.raises(error) as caught:
            await anext(stream)
        assert type(caught.value) is error
        assert caught.value.field == field
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_full_queue_rejects_and_serves_the_rest(open_client: Open):
    async with open_client(TinyBuilder(step_s=0.002, max_waiting=4, max_num_seqs=1)) as client:
        requests = [make_request(str(index), max_tokens=10) for index in range(32)]
        answers = await asyncio.gather(*(read(client.submit(request)) for request in requests), return_exceptions=True)
        served = [answer for answer in answers if not isinstance(answer, BaseException)]
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert served
        assert all(answer == (expected_tokens(requests[0]), FinishReason.LENGTH) for answer in served)
        assert refused
        assert {type(error) for error in refused} == {QueueFullError}


async def test_requests_are_refused_at_once_while_too_many_wait_for_a_busy_engine(open_client: Open):
    async with open_client(TinyBuilder(), DriverConfig(max_unanswered_commands=8)) as client:
        streams = []
        with pytest.raises(QueueFullError, match="the limit is 8"):
            streams.extend(client.submit(make_request(str(index))) for index in range(9))
        assert len(streams) <= 8
        for stream in streams:
            await read(stream)
        await read(client.submit(make_request("later")))


async def test_a_loaded_adapter_changes_the_answer_and_an_unloaded_one_is_refused(open_client: Open, tmp_path: Path):
    async with open_client() as client:
        info = await client.load_adapter(make_adapter(tmp_path / "a"))
        request = make_request("with", adapter_id=info.adapter_id)
        assert (await read(client.submit(request)))[0] == expected_tokens(request)
        assert expected_tokens(request) != expected_tokens(make_request("without"))
        await client.unload_adapter(info.adapter_id)
        assert client.stats().num_resident_adapters == 0
        with pytest.raises(InvalidRequestError):
            await read(client.submit(make_request("after", adapter_id=info.adapter_id)))
        await client.unload_adapter(info.adapter_id)


@pytest.mark.parametrize(
    ("content", "num_pages", "error", "text"),
    [
        (None, 1, AdapterNotFoundError, "holds no adapter"),
        ("big", 17, AdapterError, "17 adapter pages"),
        ("bug", 1, PomonaError, "ZeroDivisionError: a bug in the host"),
    ],
)
async def test_an_adapter_that_cannot_be_used_is_refused_and_nothing_changes(
    open_client: Open, tmp_path: Path, content, num_pages, error, text
):
    async with open_client() as client:
        good = await client.load_adapter(make_adapter(tmp_path / "good", "good"))
        path = str(tmp_path) if content is None else make_adapter(tmp_path / "bad", content, num_pages=num_pages)
        with pytest.raises(error, match=text) as caught:
            await client.load_adapter(path)
        assert type(caught.value) is error
        request = make_request("r", adapter_id=good.adapter_id)
        assert (await read(client.submit(request)))[0] == expected_tokens(request)


async def test_an_adapter_that_no_thread_can_be_started_for_is_refused_and_can_be_loaded_later(tmp_path, monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    path = make_adapter(tmp_path / "a")
    async with LocalClient(TinyBuilder().build()) as client:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(AdapterUnavailableError, match="can't start new thread"):
                await client.load_adapter(path)
        info = await client.load_adapter(path)
        request = make_request("r", adapter_id=info.adapter_id)
        assert (await read(client.submit(request)))[0] == expected_tokens(request)


async def test_the_same_adapter_loaded_many_times_at_once_is_one_adapter(open_client: Open, tmp_path: Path):
    paths = [make_adapter(tmp_path / str(index), "same", seconds=0.02) for index in range(4)]
    async with open_client() as client:
        infos = await asyncio.gather(*(client.load_adapter(path) for path in paths))
        assert len(set(infos)) == 1
        await client.unload_adapter(infos[0].adapter_id)
        assert (await client.load_adapter(paths[0])) == infos[0]


async def test_requests_are_answered_while_an_adapter_is_being_staged(open_client: Open, tmp_path: Path):
    async with open_client() as client:
        load = asyncio.create_task(client.load_adapter(make_adapter(tmp_path / "a", seconds=0.5)))
        for index in range(3):
            await read(client.submit(make_request(str(index), max_tokens=20)))
        assert not load.done()
        await load


async def test_unload_waits_for_running_requests_and_a_load_meanwhile_for_the_unload(open_client: Open, tmp_path: Path):
    path = make_adapter(tmp_path / "a")
    async with open_client(TinyBuilder(step_s=0.002)) as client:
        info = await client.load_adapter(path)
        running = make_request("running", max_tokens=50, adapter_id=info.adapter_id)
        stream = client.submit(running)
        first = await anext(stream)
        unloads = [asyncio.create_task(client.unload_adapter(info.adapter_id)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequestError):
            await read(client.submit(make_request("new", adapter_id=info.adapter_id)))
        load = asyncio.create_task(client.load_adapter(path))
        tokens, reason = await read(stream)
        assert [*first.new_token_ids, *tokens] == expected_tokens(running)
        assert reason is FinishReason.LENGTH
        await asyncio.gather(*unloads)
        assert await load == info
        again = make_request("again", adapter_id=info.adapter_id)
        assert (await read(client.submit(again)))[0] == expected_tokens(again)


@pytest.mark.parametrize("seed", range(3))
async def test_loads_unloads_and_requests_in_any_order_never_serve_wrong_tokens(tmp_path: Path, seed):
    rng = random.Random(seed)
    paths = [make_adapter(tmp_path / str(index), f"adapter {index % 3}", seconds=0.001) for index in range(5)]
    parts = TinyBuilder(step_s=0.0002).build()
    async with LocalClient(parts, DriverConfig(num_staging_threads=3)) as client:
        known = [(await client.load_adapter(path)).adapter_id for path in paths]

        async def act(index: int) -> None:
            await asyncio.sleep(rng.random() * 0.3)
            kind = rng.randrange(4)
            if kind == 0:
                assert (await client.load_adapter(paths[index % 5])).adapter_id == known[index % 5]
            elif kind == 1:
                await client.unload_adapter(rng.choice(known))
            else:
                request = make_request(str(index), (index + 1,), rng.randrange(1, 40), rng.choice(known))
                with contextlib.suppress(InvalidRequestError):
                    assert (await read(client.submit(request)))[0] == expected_tokens(request)

        await asyncio.gather(*(act(index) for index in range(300)))
        await asyncio.gather(*(client.unload_adapter(adapter_id) for adapter_id in known))
        assert is_idle(client)
        assert client.stats().num_adapter_pages_used == 0
        assert parts.adapter_host.staged == set()


async def test_shutdown_while_busy_fails_the_requests_in_flight(open_client: Open):
    async with open_client(TinyBuilder(step_s=0.001)) as client:
        streams = [client.submit(make_request(str(index), max_tokens=4000)) for index in range(8)]
        await anext(streams[0])
        readers = [asyncio.create_task(read(stream)) for stream in streams]
        await asyncio.sleep(0)
        await client.close()
        assert {reason for _, reason in await asyncio.gather(*readers)} == {FinishReason.FAIL}


async def test_an_engine_that_raises_in_a_thread_fails_its_requests_and_stays_failed():
    async with LocalClient(TinyBuilder().build()) as client:
        outputs = [output async for output in client.submit(make_request("r", (RAISE_TOKEN,)))]
        assert outputs[-1].finish_reason is FinishReason.FAIL
        assert outputs[-1].error == "the engine failed: RuntimeError"
        assert client.state == "failed: the engine failed: RuntimeError"
        assert not client.is_ready
        with pytest.raises(EngineUnavailableError):
            client.submit(make_request("next"))
