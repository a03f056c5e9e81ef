"""AdapterLoading: brings adapters in, once however many requests wait: source -> this machine -> the engine's memory.

Knows why what failed failed, and when it may be tried again. Called by ``server.adapter_service``, on its event loop.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from pomona.adapters.catalogue import Catalogue, CatalogueEntry
from pomona.adapters.sources import AdapterSources
from pomona.core.adapter import AdapterInfo
from pomona.core.errors import AdapterError, AdapterUnavailableError, EngineUnavailableError, InvalidRequestError
from pomona.core.ids import AdapterId
from pomona.core.interfaces import EngineClient
from pomona.server.adapter_fetch import FetchLanes
from pomona.server.adapter_record import AdapterRecord, Tier, refusal_of
from pomona.server.host_tier import HostTier
from pomona.server.tasks import Tasks

_LOGGER = logging.getLogger(__name__)
_MAX_PINNED_SHARE = 0.5
_STARTED_AGAIN = "the engine was started again while the adapter was brought in"


@dataclass(frozen=True, slots=True)
class ResidencyLimits:
    """How much, and how long."""

    host_adapter_bytes: int = 2**62
    """Of host memory for adapters."""
    load_wait_s: float = 30.0
    """A request waits so long for its adapter; then it is told to come back."""


class Load:
    """One adapter being brought in, and the requests that wait for it."""

    def __init__(self) -> None:
        self.num_waiters = 0
        self.is_granted = False
        """It is staged, and held once for every waiter."""
        self.task: asyncio.Task[AdapterInfo]


class AdapterLoading:
    """Adapters on their way into the engine's memory, and what is known of their past.

    Args:
        client: the engine.
        catalogue: what names mean; told what their sources turn out to hold.
        limits: of memory and patience.
        tasks: work that goes on when nobody waits for it.
    """

    def __init__(self, client: EngineClient, catalogue: Catalogue, limits: ResidencyLimits, tasks: Tasks) -> None:
        self.host = HostTier(client, limits.host_adapter_bytes, self._note_eviction)
        self._catalogue = catalogue
        self._limits = limits
        self._tasks = tasks
        self._lanes = FetchLanes()
        self._records: dict[str, AdapterRecord] = {}
        self._sources: dict[str, AdapterSources] = {}
        self._loads: dict[tuple[str, int], Load] = {}
        self._pinned_names: dict[str, None] = {}
        """In order of pinning."""
        # Over all names, those that are gone included.
        self.num_hits = 0
        self.num_misses = 0
        self.num_loads = 0
        self.num_failures = 0
        self.load_s = 0.0

    @property
    def lanes(self) -> FetchLanes:
        """Threads for what blocks."""
        return self._lanes

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their adapter."""
        return sum(load.num_waiters for load in self._loads.values())

    @property
    def records(self) -> Iterable[AdapterRecord]:
        """Of all names that were used, or tried."""
        return self._records.values()

    def is_loading(self, name: str) -> bool:
        """True while a version of the name is being brought in for requests."""
        return any(loading == name for loading, _ in self._loads)

    def record(self, name: str) -> AdapterRecord:
        """What is known of a name's past; made if need be."""
        record = self._records.get(name)
        if record is None:
            record = self._records[name] = AdapterRecord()
        return record

    def recorded(self, name: str) -> AdapterRecord:
        """What is known of a name's past, maybe nothing."""
        return self._records.get(name) or AdapterRecord()

    def sources_of(self, name: str) -> AdapterSources:
        """What the source of a name may be."""
        return self._sources[name]

    def allow(self, name: str, sources: AdapterSources) -> None:
        """Say what the source of a name may be."""
        self._sources[name] = sources

    def forget(self, name: str) -> None:
        """The name is gone."""
        self._records.pop(name, None)
        self._sources.pop(name, None)
        self._pinned_names.pop(name, None)
        self.apply_pins()

    def count_success(self, record: AdapterRecord) -> None:
        """An adapter was brought in."""
        record.succeed()
        self.num_loads += 1
        self.load_s += record.fetch_s + record.stage_s

    def count_failure(self, record: AdapterRecord) -> None:
        """A replacement was refused; what was there before stays usable."""
        record.num_failures += 1
        self.num_failures += 1

    def pin(self, name: str, *, is_pinned: bool) -> None:
        """Keep a name's adapter once it is there, or let it be evicted like others.

        Raises:
            InvalidRequestError: more than half of the budget would be pinned.
        """
        before = dict(self._pinned_names)
        if is_pinned:
            self._pinned_names[name] = None
        else:
            self._pinned_names.pop(name, None)
        num_bytes = sum(info.num_host_bytes for info in self._pinned().values())
        if is_pinned and num_bytes > self._max_pinned_bytes:
            self._pinned_names = before
            raise InvalidRequestError("pinned", f"{num_bytes} bytes would be pinned: more than half of the budget")
        self.record(name).is_pinned = is_pinned
        self.apply_pins()

    def apply_pins(self) -> None:
        """Names mean something else now, and so do pins; if that has become too much, the latest do not count."""
        kept, num_bytes = set(), 0
        for adapter_id, info in self._pinned().items():
            if num_bytes + info.num_host_bytes <= self._max_pinned_bytes:
                num_bytes += info.num_host_bytes
                kept.add(adapter_id)
        self.host.pin(frozenset(kept))

    async def close(self) -> None:
        """Stop what is under way."""
        await self.host.close()
        self._lanes.close()

    async def hold(self, entry: CatalogueEntry, model: str) -> AdapterId:
        """Return the entry's adapter, staged and held."""
        record = self.record(entry.name)
        record.last_used_s = time.time()  # noqa: TID251
        if entry.info is not None and self.host.is_staged(entry.info.adapter_id):
            record.num_hits += 1
            self.num_hits += 1
            self.host.hold(entry.info.adapter_id)
            return entry.info.adapter_id
        record.num_misses += 1
        self.num_misses += 1
        refusal = record.refusal(model, time.monotonic())
        if refusal is not None:
            raise refusal
        load = self.begin(entry)
        load.num_waiters += 1
        record.num_waiting += 1
        try:
            async with asyncio.timeout(self._limits.load_wait_s):
                info = await asyncio.shield(load.task)
        except BaseException as error:
            if load.is_granted:
                self.host.release(load.task.result().adapter_id)
            else:
                load.num_waiters -= 1
            if isinstance(error, TimeoutError):
                raise AdapterUnavailableError(f"The adapter {model!r} is still being brought in.") from error
            if isinstance(error, AdapterError):
                raise refusal_of(error, model, max(0.0, record.retry_at_s - time.monotonic())) from error
            raise
        finally:
            record.num_waiting -= 1
        if not self.host.is_staged(info.adapter_id):  # between the grant and this request's turn
            self.host.release(info.adapter_id)
            raise EngineUnavailableError(_STARTED_AGAIN)
        return info.adapter_id

    def begin(self, entry: CatalogueEntry) -> Load:
        """One load per version of a name, however many wait for it."""
        key = (entry.name, entry.version)
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = Load()
            load.task = self._tasks.spawn(self._bring_in(entry, load))
        return load

    async def _bring_in(self, entry: CatalogueEntry, load: Load) -> AdapterInfo:
        record = self.record(entry.name)
        try:
            info = await self.fetch_and_stage(entry, self.sources_of(entry.name))
            self.count_success(record)
        except AdapterError as error:
            self.num_failures += 1
            if self._catalogue.is_current(entry):  # else what the name means now has not failed
                record.fail(error, time.monotonic())
            _LOGGER.warning("Adapter %s cannot be brought in: %s", entry.name, error)
            raise
        finally:
            record.step = None
            del self._loads[entry.name, entry.version]
        load.is_granted = True
        self.host.hold(info.adapter_id, load.num_waiters)
        self.mean(self._catalogue.learn(entry, info), info)
        self.host.release(info.adapter_id)
        return info

    async def fetch_and_stage(self, entry: CatalogueEntry, sources: AdapterSources) -> AdapterInfo:
        """Bring an adapter to this machine and into the engine; on return it is held once."""
        record = self.record(entry.name)
        for is_last_try in (False, True):
            record.step, began_s = Tier.FETCHING, time.monotonic()
            local = await self._lanes.run(sources.lane(entry.source), sources.fetch, entry.source, entry.expected_id)
            record.step, fetched_s = Tier.VERIFYING, time.monotonic()
            is_corrupt = False
            try:
                info = await self.host.stage(local.path, local.num_weights_bytes)
                is_corrupt = local.cached_id not in (None, info.adapter_id)
            except AdapterUnavailableError:
                raise
            except AdapterError:
                # What the cache on disk gave may have rotted there; anything else is the source's own fault.
                is_corrupt = local.cached_id is not None
                if is_last_try or not is_corrupt:
                    raise
                continue
            finally:
                await self._lanes.run("release", sources.release, local, is_corrupt=is_corrupt)
            record.fetch_s, record.stage_s = fetched_s - began_s, time.monotonic() - fetched_s
            if not self.host.is_staged(info.adapter_id):
                self.host.release(info.adapter_id)
                raise EngineUnavailableError(_STARTED_AGAIN)
            if not is_corrupt and entry.expected_id in (None, info.adapter_id):
                return info
            self.let_go(info)
            if not is_corrupt or is_last_try:
                raise AdapterError(
                    f"its source holds other bytes ({info.adapter_id[:12]}) than those that were asked for "
                    f"({(entry.expected_id or local.cached_id or '')[:12]}): load it again to replace it"
                )
        raise AssertionError("the last try returns or raises")

    def let_go(self, info: AdapterInfo) -> None:
        """Release an adapter that was staged for a name which will not mean it."""
        self.host.release(info.adapter_id)
        self._tasks.spawn(self._free(info.adapter_id))

    def mean(self, orphan: AdapterId | None, info: AdapterInfo) -> None:
        """A name has come to mean an adapter, and maybe left another without any."""
        if info.adapter_id in self._catalogue.adapter_ids:
            self.host.want(info.adapter_id)
        else:
            self._tasks.spawn(self._free(info.adapter_id))
        if orphan is not None:
            self._tasks.spawn(self._free(orphan))
        self.apply_pins()

    async def _free(self, adapter_id: AdapterId) -> None:
        """Free an adapter that no name means, unless one has come to mean it before this begins."""
        if adapter_id not in self._catalogue.adapter_ids:
            await self.host.free(adapter_id)

    @property
    def _max_pinned_bytes(self) -> float:
        return _MAX_PINNED_SHARE * self._limits.host_adapter_bytes

    def _pinned(self) -> dict[AdapterId, AdapterInfo]:
        infos = [self._catalogue.get(name).info for name in self._pinned_names if self._catalogue.has(name)]
        return {info.adapter_id: info for info in infos if info is not None}

    def _note_eviction(self, adapter_id: AdapterId) -> None:
        for name in self._catalogue.names_of(adapter_id):
            self.record(name).num_evictions += 1
