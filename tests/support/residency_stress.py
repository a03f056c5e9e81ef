"""The real application on a socket and the bundled model in an engine process of its own, with memory for about half of
the adapters; a storm over them (``support.storm``); then what is left is counted."""

import asyncio
import contextlib
import gc
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from pomona.adapters.catalogue import Catalogue
from pomona.adapters.sources import AdapterSources
from pomona.adapters.stores import FolderStore
from pomona.cli.build import engine_builder
from pomona.cli.config import BUNDLED_MODEL, load_config
from pomona.driver.client import ProcessClient
from pomona.driver.config import DriverConfig
from pomona.server.adapter_loading import ResidencyLimits
from pomona.server.adapter_service import AdapterService
from pomona.server.app import create_app
from pomona.server.config import ServedModel, ServerConfig
from pomona.text.tokenizer import Tokenizer
from support.driver import is_idle, until
from support.server import listen
from support.storm import LIMIT_S, Question, Scale, Storm
from support.versions import make_version
from support.watched_engine import Handles, WatchedBuild, open_files

_RANKS = (2, 4, 8) * 4
_QUESTIONS = tuple(
    Question(prompt, num_tokens)
    for prompt, num_tokens in (
        ("The quick brown fox jumps over", 8),
        ("The quick brown fox jumps over", 24),
        ("The quick brown fox is not amused by dogs", 12),
    )
)
_PAGE_BYTES = 2**18
"""Of four rank rows of all modules, in float32."""
_HOST_BYTES = 13 * _PAGE_BYTES
"""Half of it may be pinned; the other half must do for a load of rank 8, which reserves three times its file."""


_SETTINGS = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 12,
    "max_num_batched_tokens": 64,
    "kv_cache_bytes": 2**21,
    "adapter_bytes": 6 * _PAGE_BYTES,
    "adapter_link_bytes_per_s": 3e7,
    "adapter_wait_limit_s": 0.2,
    "num_threads": 1,
}


class ResidencyStress:
    """One server, one storm.

    Args:
        folder: for adapters and the engine's report.
    """

    def __init__(self, folder: Path) -> None:
        self.wrong: list[str] = []
        """What is not as it must be; empty is good."""
        self._folder = folder
        self._sources = {f"v{index}": str(folder / "versions" / f"v{index}") for index in range(len(_RANKS))}
        (folder / "versions").mkdir()
        for index, (source, lora_rank) in enumerate(zip(self._sources.values(), _RANKS, strict=True)):
            make_version(Path(source), lora_rank, seed=index)
        make_version(folder / "truncated", lora_rank=2, seed=100)
        weights = folder / "truncated" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])

    async def run(self, scale: Scale) -> Storm:
        """Start, blow, count; returns the storm when all is over, and judged."""
        gc.collect()
        before = open_files(), threading.active_count()
        async with self._serving() as (url, client, service):
            expected = await self._walk(url)
            if any(len(set(texts.values())) <= len(self._sources) for texts in expected.values()):
                self.wrong.append(f"two versions answer alike: {expected}")
            first = Handles.of(client.pid)
            bad_sources = {str(self._folder / "truncated"): 422, str(self._folder / "nothing"): 404}
            storm = Storm(url, client, service, _QUESTIONS, self._sources, bad_sources)
            await storm.run(scale)
            await self._empty(url, client, service)
            self._expect("answers after the storm", await self._walk(url), expected)
            await self._empty(url, client, service)
            self._expect("what the engine's process holds", Handles.of(client.pid), first)
            pid = client.pid
        self._expect("a process of the engine is left", Path(f"/proc/{pid}").exists(), False)
        await until(lambda: threading.active_count() <= before[1], "all threads end")
        gc.collect()
        self._expect("files that the server's process has left open", open_files() - before[0], set())
        self._check_report()
        storm.judge(expected)
        self.wrong += storm.wrong
        return storm

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[tuple[str, ProcessClient, AdapterService]]:
        services: list[AdapterService] = []

        def on_state(state: str) -> None:
            if state == "ready":
                for service in services:
                    service.restage()

        build = engine_builder(load_config(_SETTINGS))
        # Deaths do not add up: there will be many.
        config = DriverConfig(restart_delay_s=0.02, death_window_s=0.001)
        watched = WatchedBuild(build, str(self._folder / "left.json"))
        client = ProcessClient(watched, config, on_state=on_state)
        info = await client.start()
        store = FolderStore(self._folder / "versions")
        limits = ResidencyLimits(host_adapter_bytes=_HOST_BYTES, load_wait_s=LIMIT_S)
        service = AdapterService(
            client, AdapterSources((str(self._folder),)), Catalogue(BUNDLED_MODEL), (store,), limits
        )
        service.announce(store.list())
        services.append(service)
        model = ServedModel(BUNDLED_MODEL, info.max_model_len, info.vocab_size, info.eos_token_ids)
        tokenizer = Tokenizer.load(Path(build.model_path))
        app = create_app(client, tokenizer, None, service, model, ServerConfig())
        try:
            async with listen(app) as url:
                yield url, client, service
        finally:
            await service.close()
            await client.close()

    async def _walk(self, url: str) -> dict[Question, dict[str | None, str]]:
        """Load every version under its own name, all at once; then ask each, and the base, one by one."""

        async def post(path: str, body: dict[str, Any]) -> Any:
            async with asyncio.timeout(LIMIT_S), http.post(path, json=body) as answer:
                assert answer.status == 200, await answer.text()
                return await answer.json()

        async with aiohttp.ClientSession(url) as http:
            loads = [post("/v1/adapters", {"name": name, "source": source}) for name, source in self._sources.items()]
            await asyncio.gather(*loads)
            expected: dict[Question, dict[str | None, str]] = {}
            for question in _QUESTIONS:
                texts = expected[question] = {}
                for version in (None, *self._sources):
                    answer = await post("/v1/completions", question.body(version or BUNDLED_MODEL))
                    texts[version] = answer["choices"][0]["text"]
        return expected

    async def _empty(self, url: str, client: ProcessClient, service: AdapterService) -> None:
        """Unload everything; then nothing may be in use, anywhere."""
        async with aiohttp.ClientSession(url) as http, asyncio.timeout(2 * LIMIT_S):
            while service.entries:
                for entry in service.entries:
                    async with http.delete(f"/v1/adapters/{entry.name}") as answer:
                        if answer.status not in (200, 404):  # who gave up on a change left it to happen later
                            self.wrong.append(f"unloading {entry.name} is answered with {answer.status}")
                await asyncio.sleep(0.05)
        cache = service.host.cache
        left = {
            "staged": cache.ids,
            "bytes": cache.num_bytes,
            "reserved bytes": cache.num_reserved_bytes,
            "waiting": service.num_waiting,
            "pinned": [name for name in self._sources if service.record(name).is_pinned],
        }
        self._expect("left in host memory", {what: value for what, value in left.items() if value}, {})
        await until(lambda: is_idle(client), "no sequence is left")
        stats = client.stats()
        self._expect("adapter pages in use", (stats.num_adapter_pages_used, stats.num_resident_adapters), (0, 0))

    def _check_report(self) -> None:
        left = json.loads((self._folder / "left.json").read_text())
        for key in ("num_staged", "num_kv_blocks_used", "num_adapter_pages_used", "num_pinned_adapters", "num_running"):
            self._expect(f"at its end the engine's {key}", left[key], 0)
        if left["peak_bytes"] > _HOST_BYTES:
            self.wrong.append(f"{left['peak_bytes']} bytes were staged, the budget is {_HOST_BYTES}")

    def _expect(self, what: str, found: object, right: object) -> None:
        if found != right:
            self.wrong.append(f"{what}: {found}, not {right}")
