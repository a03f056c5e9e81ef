"""The server while the engine's process dies and comes back."""

import asyncio
import json
import os
import signal
from pathlib import Path

import httpx
from starlette.types import Message

from pomona.adapters.catalogue import Catalogue
from pomona.adapters.sources import AdapterSources
from pomona.adapters.stores import StoredAdapter
from pomona.driver.client import ProcessClient
from pomona.driver.config import DriverConfig
from pomona.server.adapter_service import AdapterService
from pomona.server.app import create_app
from pomona.server.config import ServedModel, ServerConfig
from pomona.text.tokenizer import Tokenizer
from support.driver import KILL_TOKEN, VOCAB_SIZE, TinyBuilder, make_adapter, until
from support.server import Connection
from support.tokenizers import make_tokenizer_files

LONG = {"model": "base", "prompt": [1, 2, 3], "max_tokens": 4000, "temperature": 0}


async def test_requests_fail_health_says_so_and_adapters_come_back(tmp_path: Path):
    tokenizer = Tokenizer.load(make_tokenizer_files(tmp_path / "tokenizer"))
    config = DriverConfig(restart_delay_s=0.3)
    async with ProcessClient(TinyBuilder(step_s=0.002), config) as client:
        service = AdapterService(client, AdapterSources((str(tmp_path),)), Catalogue("base"))
        model = ServedModel("base", 4096, VOCAB_SIZE, ())
        app = create_app(client, tokenizer, None, service, model, ServerConfig())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=60) as http:
            adapter = {"name": "a", "source": make_adapter(tmp_path / "one")}
            assert (await http.post("/v1/adapters", json=adapter)).status_code == 200
            ask = {"model": "a", "prompt": [1, 2], "max_tokens": 4}
            expected = (await http.post("/v1/completions", json=ask)).json()["choices"]
            running = asyncio.create_task(http.post("/v1/completions", json=LONG))
            await until(lambda: client.stats().num_running == 1, "a request runs")
            killer = await http.post("/v1/completions", json={**LONG, "prompt": [KILL_TOKEN]})
            assert (killer.status_code, killer.json()["error"]["code"]) == (503, "engine_died")
            assert (await running).json()["error"]["code"] == "engine_died"

            health = await http.get("/health")
            assert (health.status_code, health.json()["engine"].split(":")[0]) == (503, "restarting")
            refused = await http.post("/v1/completions", json=ask)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert refused.json()["error"]["code"] == "engine_unavailable"
            assert (await http.post("/v1/adapters", json={**adapter, "name": "b"})).status_code == 503
            assert [entry.name for entry in service.entries] == ["a"]
            # An unload that finds the engine away waits for it.
            deleting = asyncio.create_task(http.delete("/v1/adapters/a"))

            await until(lambda: client.is_ready, "the engine is back")
            assert (await http.get("/health")).status_code == 200
            assert "pomona_engine_restarts_total 1.0" in (await http.get("/metrics")).text
            assert (await deleting).status_code == 200
            assert (await http.post("/v1/adapters", json=adapter)).status_code == 200
            assert (await http.post("/v1/completions", json=ask)).json()["choices"] == expected
        await service.close()


async def test_a_request_whose_adapter_kills_the_engine_says_so(tmp_path: Path):
    tokenizer = Tokenizer.load(make_tokenizer_files(tmp_path / "tokenizer"))
    async with ProcessClient(TinyBuilder()) as client:
        service = AdapterService(client, AdapterSources((str(tmp_path),)), Catalogue("base"))
        service.announce([StoredAdapter("a", make_adapter(tmp_path / "a", "crash"))])
        app = create_app(client, tokenizer, None, service, ServedModel("base", 4096, VOCAB_SIZE, ()), ServerConfig())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=60) as http:
            answer = await http.post("/v1/completions", json={"model": "a", "prompt": [1, 2]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_died")
        await service.close()


async def test_requests_and_loads_that_a_server_gives_up_when_it_shuts_down_may_be_sent_again(tmp_path: Path):
    tokenizer = Tokenizer.load(make_tokenizer_files(tmp_path / "tokenizer"))
    async with ProcessClient(TinyBuilder(step_s=0.002), DriverConfig(stop_limit_s=0.1)) as client:
        service = AdapterService(client, AdapterSources((str(tmp_path),)), Catalogue("base"))
        app = create_app(client, tokenizer, None, service, ServedModel("base", 4096, VOCAB_SIZE, ()), ServerConfig())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server", timeout=60) as http:
            slow = {"name": "a", "source": make_adapter(tmp_path / "a", seconds=30)}
            loading = asyncio.create_task(http.post("/v1/adapters", json=slow))
            running = [asyncio.create_task(http.post("/v1/completions", json={**LONG, "n": n})) for n in (1, 2)]
            await until(lambda: client.stats().num_running == 3, "requests run")
            await client.close()
            for answer in await asyncio.gather(loading, *running):
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (503, "engine_unavailable"), error
                assert "shutting down" in error["message"]
                assert "x-should-retry" not in answer.headers
        await service.close()


class _SlowReader(Connection):
    """Takes the start of an answer, and the rest when it is told to."""

    reads: asyncio.Event

    async def _send(self, message: Message) -> None:
        await super()._send(message)
        if message["type"] == "http.response.body":
            await self.reads.wait()


async def test_a_slow_reader_is_told_that_its_request_died_also_when_the_engine_is_back(tmp_path: Path):
    tokenizer = Tokenizer.load(make_tokenizer_files(tmp_path / "tokenizer"))
    async with ProcessClient(TinyBuilder(step_s=0.002)) as client:
        service = AdapterService(client, AdapterSources((str(tmp_path),)), Catalogue("base"))
        app = create_app(client, tokenizer, None, service, ServedModel("base", 4096, VOCAB_SIZE, ()), ServerConfig())
        stream = _SlowReader(app, "/v1/completions", {**LONG, "stream": True})
        stream.reads = asyncio.Event()
        await until(lambda: len(stream.messages) > 1, "the answer begins")
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: client.num_restarts == 1, "the engine is back")
        stream.reads.set()
        await stream.done
        assert json.loads(stream.body.split(b"\n\n")[-3].removeprefix(b"data: "))["error"]["code"] == "engine_died"
        await service.close()
