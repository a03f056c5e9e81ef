"""Clients that are slow, silent or endless: each is let go of, and nobody else waits for them."""

import asyncio
import contextlib
import json
import resource
import time

import httpx
import pytest

from pomona.server.config import ServerConfig
from pomona.server.connections import ConnectionLimits, GuardedProtocol
from support.driver import until
from support.server import BASE, listen, serve

LIMITS = ConnectionLimits(
    max_head_bytes=8192, head_timeout_s=0.5, body_timeout_s=0.5, body_chunk_bytes=1024, write_timeout_s=0.5
)


class Impatient(GuardedProtocol):
    limits = LIMITS


class Client:
    """A raw connection."""

    def __init__(self, url: str) -> None:
        self._port = int(url.rsplit(":", 1)[1])

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_):
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def rest(self) -> bytes:
        """Everything until the server closes the connection."""
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                return await self.reader.read()
            return b""


@pytest.fixture
async def url(tmp_path):
    async with serve(tmp_path) as served, listen(served.app, protocol=Impatient) as url:
        yield url


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def test_a_connection_that_says_nothing_is_closed(url):
    async with Client(url) as client:
        assert await client.rest() == b""


async def test_an_offer_of_another_protocol_is_not_taken_and_the_body_is_the_requests_own(url):
    """As Java's client makes it with every request; the body may come behind the head."""
    body = json.dumps({"model": BASE, "prompt": "one two", "max_tokens": 2}).encode()
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEA\r\n"
    head = HEAD + offer + b"content-length: %d\r\n\r\n" % len(body)
    async with Client(url) as client:
        for pause_s in (0.0, 0.1, 0.0):
            client.send(head)
            await asyncio.sleep(pause_s)
            client.send(body)
            async with asyncio.timeout(20):
                assert (await client.reader.readline()).startswith(b"HTTP/1.1 200 ")
                await client.reader.readuntil(b'"system_fingerprint":null}')


async def test_an_offer_of_another_protocol_may_come_in_pieces(url):
    body = json.dumps({"model": BASE, "prompt": "one two", "max_tokens": 2}).encode()
    head = HEAD + b"Connection: Upgrade\r\ncontent-length: %d" % len(body)
    offer = b"\r\nUpgrade: h2c\r\n\r\n"
    async with Client(url) as client:
        for cut in range(1, 14):
            client.send(head + offer[:cut])
            await asyncio.sleep(0.01)
            client.send(offer[cut:] + body)
            async with asyncio.timeout(20):
                assert (await client.reader.readline()).startswith(b"HTTP/1.1 200 ")
                await client.reader.readuntil(b'"system_fingerprint":null}')


@pytest.mark.parametrize("cut", range(5))
async def test_a_body_is_left_as_it_is_however_its_head_came(tmp_path, cut):
    """A line of it may look like a header."""
    head, body = HEAD + b"content-length: 14\r\n\r\n", b"\r\nupgrade: h2c"
    bodies = []

    async def app(scope, receive, send):
        bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async with listen(app, protocol=Impatient) as url, Client(url) as client:
        client.send(head[: len(head) - cut])
        await asyncio.sleep(0.01)
        client.send(head[len(head) - cut :] + body)
        await client.reader.readuntil(b"\r\n\r\n")
    assert bodies == [body]


async def test_requests_that_come_in_one_piece_have_their_offers_ignored_each(url, caplog):
    offer = b"GET /ready HTTP/1.1\r\nhost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    async with Client(url) as client:
        client.send(b"\r\n" + 3 * offer)
        for _ in range(3):
            async with asyncio.timeout(20):
                assert (await client.reader.readuntil(b"}")).lstrip().startswith(b"HTTP/1.1 200 ")
    assert not caplog.messages


async def test_a_client_of_http_1_0_gets_a_stream_that_ends_with_the_connection(url):
    """It does not know what chunks are."""
    fields = {"model": BASE, "prompt": "one two", "max_tokens": 4, "temperature": 0}
    answers = []
    for is_stream in (False, True):
        body = json.dumps({**fields, "stream": is_stream}).encode()
        async with Client(url) as client:
            client.send(HEAD.replace(b"1.1", b"1.0") + b"content-length: %d\r\n\r\n" % len(body) + body)
            answers.append((await client.rest()).partition(b"\r\n\r\n"))
    (whole_head, _, whole), (head, _, events) = answers
    assert b"content-length: %d" % len(whole) in whole_head
    assert json.loads(whole)["choices"][0]["text"]
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert events.startswith(b"data: {")
    assert events.endswith(b"}\n\ndata: [DONE]\n\n")


async def test_a_head_that_never_ends_is_refused(url):
    async with Client(url) as client:
        client.send(b"GET /health HTTP/1.1\r\n")
        for _ in range(4):
            client.send(b"x-slow: 1\r\n")
            await asyncio.sleep(0.05)
        assert (await client.rest()).startswith(b"HTTP/1.1 408 ")


async def test_the_second_request_of_a_connection_has_a_clock_of_its_own(url):
    async with Client(url) as client:
        client.send(b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")
        await client.reader.readuntil(b"}")
        await asyncio.sleep(0.7)  # longer than a head may take, but none has begun
        client.send(b"GET /ready HTTP/1.1\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 408 ")


async def test_empty_lines_do_not_keep_a_connection(url):
    async with Client(url) as client:
        client.send(b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")
        await client.reader.readuntil(b"}")
        for _ in range(4):
            client.send(b"\r\n")
            await asyncio.sleep(0.05)
        assert (await client.rest()).startswith(b"HTTP/1.1 408 ")


async def test_a_body_that_never_ends_is_refused(url):
    async with Client(url) as client:
        client.send(HEAD + b"content-length: 1000\r\n\r\n{")
        started_s = time.monotonic()
        assert (await client.rest()).startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - started_s < 15


async def test_a_body_that_comes_slowly_but_surely_is_read(url):
    body = json.dumps({"model": BASE, "prompt": "x" * 4000, "max_tokens": 1, "add_special_tokens": False}).encode()
    async with Client(url) as client:
        client.send(HEAD + b"connection: close\r\ncontent-length: " + str(len(body)).encode() + b"\r\n\r\n")
        for start in range(0, len(body), 1024):
            client.send(body[start : start + 1024])
            await asyncio.sleep(0.2)
        assert (await client.rest()).startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize("extra", [b"x-long: " + b"a" * 20_000, b"\r\n".join(b"x-%d: 1" % n for n in range(3000))])
async def test_huge_heads_are_refused(url, extra):
    async with Client(url) as client:
        client.send(b"GET /health HTTP/1.1\r\n" + extra + b"\r\n\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 431 ")


async def test_nonsense_is_refused(url):
    async with Client(url) as client:
        client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 nonsense\r\n\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"model":"base","prompt":[' + b"[]," * 1_000_000 + b"[]]}",
        b'{"model":"base","messages":['
        + b'{"role":"user","content":"x"},' * 100_000
        + b'{"role":"user","content":"x"}]}',
    ],
)
async def test_deep_and_wide_bodies_are_refused_quickly(url, body):
    path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        response = await http.post(path, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


async def test_a_client_that_does_not_read_is_let_go_of_and_nothing_is_left_of_it(tmp_path):
    async with serve(tmp_path) as served, listen(served.app, protocol=Impatient) as url, Client(url) as client:
        client.writer.transport.pause_reading()
        # The answer is longer than all buffers between here and there: every token with its twenty alternatives.
        body = {"model": BASE, "prompt": [5] * 200, "max_tokens": 300, "ignore_eos": True, "stream": True}
        content = json.dumps({**body, "n": 100, "logprobs": 20, "temperature": 0}).encode()
        client.send(HEAD + b"content-length: " + str(len(content)).encode() + b"\r\n\r\n" + content)
        async with asyncio.timeout(60):
            while b'status="200"' not in served.app.state.context.metrics.render():  # counted when it is over
                await asyncio.sleep(0.1)
        client.writer.transport.resume_reading()
        assert b"[DONE]" not in await client.rest()
        await served.until_idle()


async def test_a_client_that_leaves_the_end_of_an_answer_unread_is_let_go_of_too(tmp_path):
    made: list[Impatient] = []

    class Noted(Impatient):
        def connection_made(self, transport):
            super().connection_made(transport)
            made.append(self)

    async with serve(tmp_path) as served, listen(served.app, protocol=Noted) as url, Client(url) as client:
        client.writer.transport.pause_reading()
        num_unread = 0
        for num_answers in range(1, 5000):
            client.send(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n")
            await until(lambda: bool(made) and made[0].server_state.total_requests >= num_answers, "an answer")  # noqa: B023
            await asyncio.sleep(0.005)
            num_unread = made[0].transport.get_write_buffer_size()
            if num_unread:
                break
        assert 0 < num_unread < 2**16
        # uvicorn closes idle connections, but what is unread would keep it open for ever.
        await until(lambda: not made[0].connections, "the connection is gone")


async def test_a_client_that_goes_away_with_a_further_request_behind_the_one_that_runs_ends_both(tmp_path):
    body = json.dumps({"model": BASE, "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    request = HEAD + b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    async with serve(tmp_path) as served, listen(served.app) as url:
        served.executor.pause_at_token = 10
        async with Client(url) as client:
            client.send(request)
            await client.reader.readuntil(b"data:")
            client.send(request)
            await until(lambda: not served.executor.gate.is_set(), "it runs")
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.1)
        served.executor.gate.set()
        await served.until_idle()
        assert served.client.stats().num_output_tokens < 400


async def test_a_thousand_idle_connections_stop_nobody(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    async with (
        serve(tmp_path, ServerConfig()) as served,
        listen(served.app) as url,
        contextlib.AsyncExitStack() as stack,
    ):
        for index in range(1000):
            client = await stack.enter_async_context(Client(url))
            if index % 2:
                client.send(b"GET /health HTTP/1.1\r\nx-slow:")
        async with httpx.AsyncClient(base_url=url, timeout=30) as http:
            for _ in range(5):
                body = {"model": BASE, "prompt": "one two", "max_tokens": 4}
                assert (await http.post("/v1/completions", json=body)).status_code == 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
