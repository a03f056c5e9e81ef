"""Adapters as the API has them: names that requests may use, brought in when one does; loads, replacements, unloads.

Joins where adapters come from (``adapters.sources``, ``adapters.stores``), what names mean (``adapters.catalogue``) and
the engine's memory (``server.host_tier``). A name is resolved once, when a request is accepted; from then on the
request holds that very version. Belongs to one event loop.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass

from pomona.adapters.catalogue import AdapterState, Catalogue, CatalogueEntry
from pomona.adapters.sources import AdapterSources
from pomona.adapters.stores import AdapterStore, StoredAdapter
from pomona.adapters.unknown_names import UnknownNames
from pomona.core.errors import (
    AdapterError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
    PomonaError,
)
from pomona.core.ids import AdapterId
from pomona.core.interfaces import EngineClient
from pomona.server.adapter_loading import AdapterLoading, ResidencyLimits
from pomona.server.adapter_record import AdapterRecord, Tier
from pomona.server.errors import UnknownAdapterError
from pomona.server.host_tier import HostTier
from pomona.server.tasks import Tasks

_LOGGER = logging.getLogger(__name__)
_MAX_SHOWN_CHARS = 200
_HOT_S = 120.0
"""What was used so recently is staged again when the engine was started again; the rest when it is asked for."""


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


async def _nothing() -> None:
    """What a name needs besides on a server without accounts."""


class AdapterService:
    """Brings in, replaces, unloads and lends adapters.

    Args:
        client: the engine.
        sources: where clients of the API, and the stores, may have adapters.
        catalogue: owned by this service from now on.
        stores: asked for names that the catalogue does not have.
        limits: of memory and patience.
    """

    def __init__(
        self,
        client: EngineClient,
        sources: AdapterSources,
        catalogue: Catalogue,
        stores: tuple[AdapterStore, ...] = (),
        limits: ResidencyLimits = ResidencyLimits(),  # frozen
    ) -> None:
        self._sources = sources
        self._catalogue = catalogue
        self._stores = stores
        self._lease_ended = asyncio.Event()
        self._tasks = Tasks(self._lease_ended.set)
        self._loading = AdapterLoading(client, catalogue, limits, self._tasks)
        self._unknown = UnknownNames()
        self._removed: set[str] = set()
        """Names of stores that were unloaded: not there until they are loaded."""
        self._created_s: dict[str, int] = {}
        self._started_s = int(time.time())  # noqa: TID251  # a date for people
        self._num_name_leases: Counter[str] = Counter()
        self._name_locks: dict[str, _HeldLock] = {}

    @property
    def host(self) -> HostTier:
        """What is in host memory."""
        return self._loading.host

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
        return self._catalogue.num_ready

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their adapter."""
        return self._loading.num_waiting

    def record(self, name: str) -> AdapterRecord:
        """What is known of a name's past."""
        return self._loading.recorded(name)

    def totals(self) -> dict[str, float]:
        """Sums over all names, by the ``stat`` of ``metrics.registry.RESIDENCY_METRICS``."""
        records, cache = self._loading.records, self.host.cache
        return {
            "host_bytes": cache.num_bytes,
            "host_budget_bytes": cache.max_bytes,
            "staged": len(cache.ids),
            "waiting": self.num_waiting,
            "failed": sum(record.error is not None for record in records),
            "hits": self._loading.num_hits,
            "misses": self._loading.num_misses,
            "loads": self._loading.num_loads,
            "failures": self._loading.num_failures,
            "load_seconds": self._loading.load_s,
            "evictions": cache.num_evictions,
        }

    def get(self, name: str) -> CatalogueEntry:
        """Look up one name, in any state.

        Raises:
            UnknownAdapterError: there is no such name.
        """
        try:
            return self._catalogue.get(name)
        except ModelNotFoundError as error:
            raise UnknownAdapterError(f"No adapter is called {name[:_MAX_SHOWN_CHARS]!r}.") from error

    def tier(self, entry: CatalogueEntry, resident: frozenset[AdapterId] = frozenset()) -> Tier:
        """Where an entry's adapter is now.

        Args:
            entry: of the catalogue.
            resident: what the engine has on the device, if that is known.
        """
        record = self.record(entry.name)
        if entry.state is AdapterState.DRAINING:
            return Tier.DRAINING
        if entry.info is not None and self.host.is_staged(entry.info.adapter_id):
            return Tier.RESIDENT if entry.info.adapter_id in resident else Tier.STAGED
        if record.step is not None:
            return record.step
        return Tier.REGISTERED if record.error is None else Tier.FAILED

    def num_requests(self, entry: CatalogueEntry) -> int:
        """Count the requests in flight that asked for the entry's name."""
        return self._num_name_leases[entry.name]

    def created_s(self, name: str) -> int:
        """Return the Unix time at which the current version of ``name`` came, as far as this server knows."""
        return self._created_s.get(name, self._started_s)

    def announce(self, stored: Iterable[StoredAdapter], sources: AdapterSources | None = None) -> None:
        """Let requests use these names; nothing is read.

        Args:
            stored: names and sources; those that cannot be names are left out, with a warning.
            sources: what the sources may be, if not what clients of the API may load.
        """
        for adapter in stored:
            try:
                self._catalogue.announce(adapter.name, adapter.source, adapter.adapter_id)
            except InvalidRequestError as error:
                _LOGGER.warning("Adapter %r is not served: %s", adapter.name, error)
                continue
            self._loading.allow(adapter.name, sources or self._sources)

    async def find(self, model: str) -> CatalogueEntry | None:
        """Return what ``model`` means now, without bringing it in; None for the base model.

        Raises:
            ModelNotFoundError: neither the base nor an adapter that requests may use.
        """
        model = model[:_MAX_SHOWN_CHARS]
        try:
            return self._catalogue.find(model)
        except ModelNotFoundError:
            name = model.removeprefix(self._catalogue.base_name + ":")
            if not await self._discover(name):
                raise
            return self._catalogue.find(model)

    @contextlib.asynccontextmanager
    async def lease(self, model: str) -> AsyncIterator[Lease]:
        """Resolve ``model``, bring its adapter in, and keep it until the end of the block.

        Raises:
            ModelNotFoundError: neither the base nor an adapter that requests may use; or nothing is at its source.
            AdapterUnavailableError: its source fails for now, or it takes too long.
            AdapterFailedError: what is at its source cannot be used.
            EngineUnavailableError: the engine is not there.
        """
        entry = await self.find(model)
        if entry is None:
            yield Lease(None, None)
            return
        name = entry.name
        self._num_name_leases[name] += 1
        try:
            adapter_id = await self._loading.hold(entry, model)
            try:
                yield Lease(adapter_id, name)
            finally:
                self.host.release(adapter_id)
        finally:
            self._num_name_leases[name] -= 1
            if not self._num_name_leases[name]:
                del self._num_name_leases[name]
                self._lease_ended.set()

    async def load(
        self,
        name: str,
        source: str,
        sources: AdapterSources | None = None,
        write_down: Callable[[], Awaitable[None]] = _nothing,
    ) -> CatalogueEntry:
        """Load an adapter under ``name``, replacing what the name meant; returns when requests can use it.

        Requests in flight keep the version they were accepted with. A load goes on if its caller is cancelled.

        Args:
            name: under which it will be served.
            source: folder, URL or hub id.
            sources: what ``source`` may be, if not what clients of the API may load.
            write_down: awaited once the adapter can be used, before the name means it; no other load or unload of the
                name is under way then. If it raises, everything is as it was before.

        Raises:
            InvalidRequestError: the name is malformed or the base model's.
            AdapterError: refused; everything is as it was before.
            EngineUnavailableError: the engine is not there; everything is as it was before.
        """
        self._catalogue.validate_name(name)
        replacing = self._replace(name, source, sources or self._sources, write_down)
        return await asyncio.shield(self._tasks.spawn(replacing))

    async def unload(self, name: str, strike_out: Callable[[], Awaitable[None]] = _nothing) -> None:
        """Take no new requests for ``name``, let running ones finish, free its memory; then return.

        Args:
            name: of an adapter.
            strike_out: the counterpart of ``load``'s ``write_down``: awaited first. If it raises, nothing has changed.

        Raises:
            UnknownAdapterError: there is no such name.
        """
        self.get(name)
        await asyncio.shield(self._tasks.spawn(self._unload(name, strike_out)))

    def pin(self, name: str, *, is_pinned: bool) -> None:
        """Keep a name's adapter in host memory once it is there, or let it be evicted like others.

        Raises:
            UnknownAdapterError: there is no such name.
            InvalidRequestError: half of the budget is pinned already.
        """
        self.get(name)
        self._loading.pin(name, is_pinned=is_pinned)

    def restage(self) -> None:
        """The engine may be a new one: stage again what was used lately, the most valuable first."""
        lost = self.host.forget_if_restarted()
        now_s = time.time()  # noqa: TID251
        named = {entry.info.adapter_id: entry for entry in self.entries if entry.info is not None}
        hot = [
            named[adapter_id]
            for adapter_id in lost
            if adapter_id in named and now_s - (self.record(named[adapter_id].name).last_used_s or 0.0) < _HOT_S
        ]
        if hot:
            self._tasks.spawn(self._restage(hot))

    async def close(self) -> None:
        """Stop what is under way."""
        await self._tasks.close()
        await self._loading.close()

    async def _discover(self, name: str) -> bool:
        """Ask the stores for a name that the catalogue does not have."""
        now_s = time.monotonic()
        if not self._stores or not self._is_sought(name) or self._unknown.knows(name, now_s):
            return False
        try:
            self._catalogue.validate_name(name)
        except InvalidRequestError:
            return False
        for number, store in enumerate(self._stores):
            try:
                found = await self._loading.lanes.run(f"store {number}", store.find, name)
            except PomonaError as error:
                _LOGGER.warning("A store cannot be asked for %r: %s", name, error)
                continue
            if not self._is_sought(name):  # it was loaded or unloaded meanwhile
                return self._catalogue.has(name)
            if found is not None:
                self.announce((found,))
                return True
        self._unknown.note(name, now_s)
        return False

    def _is_sought(self, name: str) -> bool:
        """True if a store may say what the name means: nobody else has, and nobody has unloaded it or just does."""
        return name not in self._removed and not self._catalogue.has(name)

    async def _replace(
        self, name: str, source: str, sources: AdapterSources, write_down: Callable[[], Awaitable[None]]
    ) -> CatalogueEntry:
        async with self._name_lock(name):
            if not self._catalogue.has(name):
                self._created_s[name] = int(time.time())  # noqa: TID251
            self._catalogue.begin_load(name, source)
            record = self._loading.record(name)
            try:
                read = CatalogueEntry(name, source, AdapterState.LOADING, 0, None)
                info = await self._loading.fetch_and_stage(read, sources)
                try:
                    await write_down()
                except BaseException:
                    self._loading.let_go(info)
                    raise
            except BaseException as error:
                self._catalogue.abandon_load(name)
                if isinstance(error, AdapterError):
                    self._loading.count_failure(record)
                if not self._catalogue.has(name):
                    self._created_s.pop(name, None)
                    self._loading.forget(name)
                raise
            finally:
                record.step = None
            self._loading.mean(self._catalogue.register(name, info, source), info)
            self.host.release(info.adapter_id)
            self._loading.count_success(record)
            self._removed.discard(name)
            self._unknown.forget(name)
            self._loading.allow(name, sources)
            self._created_s[name] = int(time.time())  # noqa: TID251
            return self._catalogue.get(name)

    async def _unload(self, name: str, strike_out: Callable[[], Awaitable[None]]) -> None:
        async with self._name_lock(name):
            self.get(name)  # it may have been unloaded meanwhile
            await strike_out()
            self._catalogue.begin_unload(name)
            while self._num_name_leases[name] or self._loading.is_loading(name):
                self._lease_ended.clear()
                await self._lease_ended.wait()
            orphan = self._catalogue.remove(name)
            self._created_s.pop(name, None)
            self._loading.forget(name)
            if self._stores:
                self._removed.add(name)
            if orphan is not None:
                await self.host.free(orphan)

    async def _restage(self, entries: list[CatalogueEntry]) -> None:
        for entry in entries:
            is_current = self._catalogue.is_current(entry)  # else it was unloaded or replaced while others were staged
            if is_current and entry.info is not None and not self.host.is_staged(entry.info.adapter_id):
                with contextlib.suppress(AdapterError, EngineUnavailableError):
                    await asyncio.shield(self._loading.begin(entry).task)

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
