"""Adapters as the API has them: loads, replaces and unloads names, and lends adapters to requests.

Joins where adapters come from (``adapters.sources``), what names mean (``adapters.catalogue``) and the engine. A name
is resolved once, when a request is accepted; from then on the request holds a lease on that very version. Belongs to
one event loop.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from pomona.adapters.catalogue import AdapterState, Catalogue, CatalogueEntry
from pomona.adapters.sources import AdapterSources
from pomona.core.errors import EngineUnavailableError, ModelNotFoundError, PomonaError
from pomona.core.ids import AdapterId
from pomona.core.interfaces import EngineClient
from pomona.server.errors import UnknownAdapterError

_Result = TypeVar("_Result")
_LOGGER = logging.getLogger(__name__)
_MAX_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class Lease:
    """What one request's ``model`` meant when it was accepted."""

    adapter_id: AdapterId | None
    """None is the base model alone."""
    adapter_name: str | None


@dataclass(slots=True)
class _HeldLock:
    lock: asyncio.Lock
    num_users: int = 0


class AdapterService:
    """Loads, replaces, unloads and lends adapters.

    Args:
        client: the engine.
        sources: where clients of the API may load adapters from.
        catalogue: owned by this service from now on.
        retry_delay_s: pause before an unload that found the engine restarting is tried again.
    """

    def __init__(
        self, client: EngineClient, sources: AdapterSources, catalogue: Catalogue, *, retry_delay_s: float = 1.0
    ) -> None:
        self._client = client
        self._sources = sources
        self._catalogue = catalogue
        self._retry_delay_s = retry_delay_s
        self._created_s: dict[str, int] = {}
        self._num_leases: Counter[AdapterId] = Counter()
        self._num_name_leases: Counter[str] = Counter()
        self._staged: set[AdapterId] = set()
        self._wakeups: set[asyncio.Event] = set()
        self._name_locks: dict[str, _HeldLock] = {}
        self._unload_lock = asyncio.Lock()
        self._unloads_seen: list[set[AdapterId]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def sources(self) -> AdapterSources:
        """Where clients of the API may load adapters from."""
        return self._sources

    @property
    def entries(self) -> tuple[CatalogueEntry, ...]:
        """All names, sorted."""
        return self._catalogue.list()

    @property
    def num_ready(self) -> int:
        """Names that requests may use."""
        return sum(entry.state is AdapterState.READY for entry in self._catalogue.list())

    def get(self, name: str) -> CatalogueEntry:
        """Look up one name, in any state.

        Raises:
            UnknownAdapterError: there is no such name.
        """
        try:
            return self._catalogue.get(name)
        except ModelNotFoundError as error:
            raise UnknownAdapterError(f"No adapter is called {name[:_MAX_SHOWN_CHARS]!r}.") from error

    def num_requests(self, entry: CatalogueEntry) -> int:
        """Count the requests in flight that asked for the entry's name."""
        return self._num_name_leases[entry.name]

    def created_s(self, name: str) -> int:
        """Return the Unix time at which the current version of ``name`` was loaded, or began to be."""
        return self._created_s.get(name, 0)

    @contextlib.contextmanager
    def lease(self, model: str) -> Iterator[Lease]:
        """Resolve ``model`` and keep its adapter from being unloaded until the end of the block.

        Raises:
            ModelNotFoundError: neither the base nor an adapter that is ready.
        """
        adapter_id = self.resolve(model)
        if adapter_id is None:
            yield Lease(None, None)
            return
        name = model.removeprefix(self._catalogue.base_name + ":")
        self._num_leases[adapter_id] += 1
        self._num_name_leases[name] += 1
        try:
            yield Lease(adapter_id, name)
        finally:
            self._num_name_leases[name] -= 1
            if not self._num_name_leases[name]:
                del self._num_name_leases[name]
            self._num_leases[adapter_id] -= 1
            if not self._num_leases[adapter_id]:
                del self._num_leases[adapter_id]
                self._wake()

    def resolve(self, model: str) -> AdapterId | None:
        """Return what ``model`` means now, without a lease.

        Raises:
            ModelNotFoundError: neither the base nor an adapter that is ready.
        """
        return self._catalogue.resolve_model(model[:_MAX_SHOWN_CHARS])

    async def load(self, name: str, source: str, sources: AdapterSources | None = None) -> CatalogueEntry:
        """Load an adapter under ``name``, replacing what the name meant; returns when requests can use it.

        Requests in flight keep the version they were accepted with. A load goes on if its caller is cancelled.

        Args:
            name: under which it will be served.
            source: folder or hub id.
            sources: what ``source`` may be, if not what clients of the API may load.

        Raises:
            InvalidRequestError: the name is malformed or the base model's.
            AdapterError: refused; everything is as it was before.
            EngineUnavailableError: the engine is not there; everything is as it was before.
        """
        self._catalogue.validate_name(name)
        return await asyncio.shield(self._spawn(self._load(name, source, sources or self._sources)))

    async def unload(self, name: str) -> None:
        """Take no new requests for ``name``, let running ones finish, free its memory; then return.

        Raises:
            UnknownAdapterError: there is no such name.
        """
        self.get(name)
        await asyncio.shield(self._spawn(self._unload(name)))

    def forget_lost(self, adapter_id: AdapterId, reason: str) -> None:
        """Take back the names of an adapter that a restarted engine could not load again."""
        for entry in self._catalogue.list():
            if entry.info is not None and entry.info.adapter_id == adapter_id:
                _LOGGER.error("Adapter %s is no longer served: %s", entry.name, reason)
                self._catalogue.remove(entry.name)
        self._staged.discard(adapter_id)
        self._wake()

    async def close(self) -> None:
        """Stop what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _load(self, name: str, source: str, sources: AdapterSources) -> CatalogueEntry:
        async with self._name_lock(name):
            self._catalogue.begin_load(name, source)
            self._created_s.setdefault(name, int(time.time()))  # noqa: TID251  # a date for people
            try:
                path = await asyncio.to_thread(sources.resolve, source)
                replaced = await self._stage(name, source, path)
            except BaseException:
                self._catalogue.abandon_load(name)
                if all(entry.name != name for entry in self._catalogue.list()):
                    self._created_s.pop(name, None)
                raise
            self._created_s[name] = int(time.time())  # noqa: TID251
            entry = self._catalogue.get(name)
        if replaced is not None:
            self._spawn(self._free(replaced))
        self._wake()
        return entry

    async def _stage(self, name: str, source: str, path: str) -> AdapterId | None:
        """Have the engine load ``path`` and give it the name; return the id that lost its last name."""
        unloads_seen: set[AdapterId] = set()
        self._unloads_seen.append(unloads_seen)
        try:
            while True:
                info = await self._client.load_adapter(path)
                # The same bytes may have been unloaded under another name since the engine answered.
                async with self._unload_lock:
                    if info.adapter_id not in unloads_seen:
                        self._staged.add(info.adapter_id)
                        return self._catalogue.register(name, info, source)
                    unloads_seen.clear()
        finally:
            self._unloads_seen.remove(unloads_seen)

    async def _unload(self, name: str) -> None:
        async with self._name_lock(name):
            try:
                adapter_id = self._catalogue.begin_unload(name)
            except ModelNotFoundError as error:
                raise UnknownAdapterError(f"No adapter is called {name[:_MAX_SHOWN_CHARS]!r}.") from error
            if adapter_id is not None:
                await self._until(lambda: not self._num_leases[adapter_id] or self._has_other_name(name, adapter_id))
            self._created_s.pop(name, None)
            try:
                orphan = self._catalogue.remove(name)
            except ModelNotFoundError:  # lost by the engine meanwhile
                return
            if orphan is not None:
                await self._free(orphan)

    def _has_other_name(self, name: str, adapter_id: AdapterId) -> bool:
        return any(
            entry.info is not None and entry.info.adapter_id == adapter_id and entry.name != name
            for entry in self._catalogue.list()
        )

    async def _free(self, adapter_id: AdapterId) -> None:
        """Unload an adapter that has no name, once nobody uses it; does nothing if it gets a name again."""
        while True:
            await self._until(lambda: not self._num_leases[adapter_id])
            async with self._unload_lock:
                if adapter_id in self._catalogue.adapter_ids or adapter_id not in self._staged:
                    return
                if self._num_leases[adapter_id]:
                    continue
                try:
                    await self._client.unload_adapter(adapter_id)
                except EngineUnavailableError:
                    _LOGGER.warning("Unloading adapter %s waits for the engine", adapter_id)
                else:
                    self._staged.discard(adapter_id)
                    for seen in self._unloads_seen:
                        seen.add(adapter_id)
                    return
            await asyncio.sleep(self._retry_delay_s)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition on leases and names; ``_wake`` makes it look again."""
        wakeup = asyncio.Event()
        self._wakeups.add(wakeup)
        try:
            while not condition():
                wakeup.clear()
                await wakeup.wait()
        finally:
            self._wakeups.discard(wakeup)

    def _wake(self) -> None:
        for wakeup in self._wakeups:
            wakeup.set()

    @contextlib.asynccontextmanager
    async def _name_lock(self, name: str) -> AsyncIterator[None]:
        """Let one operation per name run at a time; names are forgotten when nobody operates on them."""
        held = self._name_locks.setdefault(name, _HeldLock(asyncio.Lock()))
        held.num_users += 1
        try:
            async with held.lock:
                yield
        finally:
            held.num_users -= 1
            if not held.num_users:
                del self._name_locks[name]

    def _spawn(self, work: Coroutine[Any, Any, _Result]) -> "asyncio.Task[_Result]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return task

    def _end_task(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        # Whoever waits for the task gets its error too; but nobody may be waiting any more.
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, PomonaError):
            _LOGGER.error("An adapter operation failed", exc_info=error)
