"""Requests, replacements, unloads, evictions, disconnects and engine restarts in any order, against a model of which
version each request may have been answered with. The engine is a fake that keeps the promises of EngineClient and
breaks nothing else: it checks that what runs is registered, that nothing in use is freed, and counts its bytes."""

import asyncio
import hashlib
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pomona.adapters.catalogue import Catalogue
from pomona.adapters.sources import AdapterSources
from pomona.adapters.stores import FolderStore
from pomona.core.adapter import AdapterInfo
from pomona.core.errors import AdapterError, EngineUnavailableError, PomonaError
from pomona.core.ids import AdapterId
from pomona.server.adapter_loading import ResidencyLimits
from pomona.server.adapter_service import AdapterService

BUDGET = 260
NUM_SOURCES = 5
NAMES = [f"s{index}" for index in range(NUM_SOURCES)]


def content_of(number: int) -> bytes:
    return bytes([number]) * (20 + 10 * number)


def id_of(number: int) -> AdapterId:
    return AdapterId(hashlib.sha256(content_of(number)).hexdigest())


class FakeEngine:
    """An EngineClient without requests of its own: users say themselves that they run."""

    def __init__(self) -> None:
        self.num_restarts = 0
        self.is_ready = True
        self.state = "ready"
        self.staged: dict[AdapterId, int] = {}
        self.running: Counter[AdapterId] = Counter()
        self.num_turns = 1
        """How long calls take; never no time at all: what was sent before has been sent when the answer comes."""

    async def load_adapter(self, path: str) -> AdapterInfo:
        life = self.num_restarts
        await self._turns(life)
        content = Path(path, "adapter_model.safetensors").read_bytes()
        if not content:
            raise AdapterError("truncated")
        adapter_id = AdapterId(hashlib.sha256(content).hexdigest())
        self.staged[adapter_id] = len(content)
        return AdapterInfo(adapter_id, lora_rank=4, num_pages=1, num_host_bytes=len(content))

    async def unload_adapter(self, adapter_id: AdapterId) -> None:
        assert not self.running[adapter_id], "what is in use is unloaded"
        life = self.num_restarts
        self.staged.pop(adapter_id, None)
        await self._turns(life)

    async def resident_adapters(self) -> frozenset[AdapterId]:
        return frozenset()

    async def _turns(self, life: int) -> None:
        for _ in range(self.num_turns):
            await asyncio.sleep(0)
            if life != self.num_restarts:
                raise EngineUnavailableError("it died")

    def restart(self) -> None:
        self.num_restarts += 1
        self.staged.clear()
        self.running.clear()


class ResidencyMachine(RuleBasedStateMachine):
    """Each request ends with a version that was current while it was being accepted, or an error it was promised."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        for number in range(NUM_SOURCES):
            (self.folder / f"s{number}").mkdir()
            (self.folder / f"s{number}" / "adapter_model.safetensors").write_bytes(content_of(number))
        self.engine = FakeEngine()
        self.runner.run(self._start())
        self.now = 0
        self.meanings: dict[str, list[tuple[int, int]]] = {name: [(0, index)] for index, name in enumerate(NAMES)}
        """Per name: (when at the earliest it came to mean, which source)."""
        self.replaced = dict.fromkeys(NAMES, 0)
        """Per name: the last replacement that was answered; nothing before it may be seen any more."""
        self.ends: list[asyncio.Event] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.jobs: list[asyncio.Task[None]] = []

    async def _start(self) -> None:
        store = FolderStore(self.folder)
        sources = AdapterSources((str(self.folder),))
        limits = ResidencyLimits(host_adapter_bytes=BUDGET, load_wait_s=30.0)
        self.service = AdapterService(self.engine, sources, Catalogue("base"), (store,), limits)  # type: ignore[arg-type]
        self.service.announce(store.list())

    def _turn(self, num_turns: int = 3) -> None:
        async def turn() -> None:
            for _ in range(num_turns):
                await asyncio.sleep(0.0005)

        self.runner.run(turn())

    async def _request(self, name: str, end: asyncio.Event) -> None:
        since = self.replaced[name]
        try:
            async with self.service.lease(name) as lease:
                adapter_id = lease.adapter_id
                assert adapter_id is not None
                allowed = {id_of(number) for when, number in self.meanings[name] if when >= since}
                assert adapter_id in allowed, "a version that was not current"
                assert adapter_id in self.engine.staged, "it would run without weights"
                life = self.engine.num_restarts
                self.engine.running[adapter_id] += 1
                try:
                    await end.wait()
                    if life == self.engine.num_restarts:
                        assert adapter_id in self.engine.staged, "its weights were taken away"
                finally:
                    if life == self.engine.num_restarts:
                        self.engine.running[adapter_id] -= 1
        except PomonaError:
            return

    @rule(name=st.sampled_from(NAMES), num_turns=st.integers(1, 4))
    def request(self, name: str, num_turns: int) -> None:
        self.engine.num_turns = num_turns
        end = asyncio.Event()

        async def begin() -> asyncio.Task[None]:
            return asyncio.create_task(self._request(name, end))

        self.tasks.append(self.runner.run(begin()))
        self.ends.append(end)

    @rule(index=st.integers(0, 100))
    def finish(self, index: int) -> None:
        if self.ends:
            self.ends[index % len(self.ends)].set()

    @rule(index=st.integers(0, 100))
    def disconnect(self, index: int) -> None:
        if self.tasks:
            self.tasks[index % len(self.tasks)].cancel()

    @rule(name=st.sampled_from(NAMES), number=st.integers(0, NUM_SOURCES - 1))
    def replace(self, name: str, number: int) -> None:
        self.now += 1
        self.meanings[name].append((self.now, number))
        now = self.now

        async def load() -> None:
            try:
                await self.service.load(name, str(self.folder / f"s{number}"))
                self.replaced[name] = now
            except PomonaError:
                return

        async def begin() -> asyncio.Task[None]:
            return asyncio.create_task(load())

        self.jobs.append(self.runner.run(begin()))

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        async def unload() -> None:
            try:
                await self.service.unload(name)
            except PomonaError:
                return

        async def begin() -> asyncio.Task[None]:
            return asyncio.create_task(unload())

        self.jobs.append(self.runner.run(begin()))

    @rule()
    def restart(self) -> None:
        async def restart() -> None:
            self.engine.restart()
            self.service.restage()

        self.runner.run(restart())

    @rule(num_turns=st.integers(1, 10))
    def turn(self, num_turns: int) -> None:
        self._turn(num_turns)

    @invariant()
    def the_engine_stays_within_the_budget(self) -> None:
        assert sum(self.engine.staged.values()) <= BUDGET

    def teardown(self) -> None:
        async def end_all() -> None:
            for end in self.ends:
                end.set()
            results = await asyncio.wait_for(asyncio.gather(*self.tasks, return_exceptions=True), 20)
            await asyncio.wait_for(asyncio.gather(*self.jobs), 20)
            for result in results:
                if isinstance(result, AssertionError):
                    raise result
            for entry in self.service.entries:
                await asyncio.wait_for(self.service.unload(entry.name), 20)
            cache = self.service.host.cache
            for _ in range(400):
                if not (cache.ids or cache.num_reserved_bytes or self.engine.staged):
                    break
                await asyncio.sleep(0.005)
            assert (cache.ids, cache.num_bytes, cache.num_reserved_bytes) == ((), 0, 0)
            assert self.engine.staged == {}
            assert all(cache.num_holds(id_of(number)) == 0 for number in range(NUM_SOURCES))
            assert self.service.num_waiting == 0
            await self.service.close()

        try:
            self.runner.run(end_all())
        finally:
            self.runner.close()
            shutil.rmtree(self.folder)


ResidencyMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestResidencyMachine = ResidencyMachine.TestCase


def test_an_engine_that_restarts_between_the_grant_and_the_turn_of_who_waited(monkeypatch):
    machine = ResidencyMachine()
    loading = machine.service._loading
    begin = loading.begin

    def begin_and_restart_at_its_end(entry):
        load = begin(entry)
        load.task.add_done_callback(lambda _: machine.engine.restart())
        return load

    monkeypatch.setattr(loading, "begin", begin_and_restart_at_its_end)

    async def ask() -> None:
        with pytest.raises(EngineUnavailableError, match="started again"):
            async with machine.service.lease("s1"):
                pass

    machine.runner.run(ask())
    monkeypatch.undo()
    machine.teardown()
