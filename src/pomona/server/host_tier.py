"""HostTier: adapters in the engine's host memory, within a byte budget. Makes room before a load, has the engine free
what must go, and keeps what is in use. Belongs to one event loop.

An adapter is *held* by every request that uses it and by whoever has just loaded it. Only what nobody holds is
unloaded, by the engine's own retiring and draining, so a request never loses its weights.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from pomona.adapters.host_cache import HostCache
from pomona.core.adapter import AdapterInfo
from pomona.core.errors import AdapterError, AdapterUnavailableError, EngineUnavailableError, PomonaError
from pomona.core.ids import AdapterId
from pomona.core.interfaces import EngineClient

_LOGGER = logging.getLogger(__name__)


class HostTier:
    """What is staged on the engine behind ``client``, and the budget for it.

    Args:
        client: the engine.
        max_bytes: budget of host copies and of loads under way.
        on_evicted: told of every adapter that had to make room.
    """

    def __init__(self, client: EngineClient, max_bytes: int, on_evicted: Callable[[AdapterId], None]) -> None:
        self.cache = HostCache(max_bytes)
        self._client = client
        self._on_evicted = on_evicted
        self._num_restarts = client.num_restarts
        self._unwanted: set[AdapterId] = set()
        self._turn = asyncio.Lock()
        self._change = asyncio.Event()
        self._unloads_sent: dict[int, set[AdapterId]] = {}
        """Per load under way: what was unloaded since it was sent."""
        self._unloads: dict[AdapterId, asyncio.Task[None]] = {}
        self._growth: dict[int, float] = {}
        """Host bytes per file byte of the latest load, by magnitude of the file."""

    def is_staged(self, adapter_id: AdapterId) -> bool:
        """True when requests for the adapter can be sent to the engine now."""
        self.forget_if_restarted()
        return adapter_id in self.cache

    def forget_if_restarted(self) -> tuple[AdapterId, ...]:
        """If the engine is a new one, nothing is staged; return what was, the most valuable first."""
        if self._client.num_restarts == self._num_restarts:
            return ()
        self._num_restarts = self._client.num_restarts
        lost = self.cache.ids
        self.cache.clear()
        self._unwanted.clear()
        self._wake()
        return lost

    def hold(self, adapter_id: AdapterId, num_holds: int = 1) -> None:
        """Keep a staged adapter until as many calls of ``release``."""
        self.cache.hold(adapter_id, num_holds)

    def release(self, adapter_id: AdapterId) -> None:
        """The counterpart of one ``hold``."""
        self.cache.release(adapter_id)
        if not self.cache.num_holds(adapter_id):
            if adapter_id in self._unwanted:
                self._send_unload(adapter_id)
            else:
                self._drop_surplus()
            self._wake()

    def pin(self, adapter_ids: frozenset[AdapterId]) -> None:
        """Evict none of these; what was pinned before and is not among them may go."""
        self.cache.pin(adapter_ids)
        self._wake()

    def want(self, adapter_id: AdapterId) -> None:
        """A name means the adapter: it stays as long as there is room."""
        self._unwanted.discard(adapter_id)
        self._wake()

    async def free(self, adapter_id: AdapterId) -> None:
        """No name means the adapter any more: unload it when nobody holds it, and return when it is gone, or wanted."""
        if adapter_id not in self.cache:
            await self._freed(adapter_id)
            return
        self._unwanted.add(adapter_id)
        if not self.cache.num_holds(adapter_id):
            self._send_unload(adapter_id)
        await self._until(lambda: adapter_id not in self._unwanted)
        await self._freed(adapter_id)

    async def stage(self, path: str, num_weights_bytes: int) -> AdapterInfo:
        """Have the engine read, verify, convert and keep an adapter. On return it is held once.

        Args:
            path: a folder on this machine.
            num_weights_bytes: of the weights' file.

        Raises:
            AdapterError: it cannot be used, or is larger than the budget.
            AdapterUnavailableError: pinned adapters leave no room for it.
            EngineUnavailableError: the engine is not there.
        """
        unloads_sent: set[AdapterId] = set()
        magnitude = num_weights_bytes.bit_length()
        # The file is parsed into copies of its tensors, and these are cast, then laid out.
        growth = self._growth.get(magnitude, 1.0)
        num_bytes = round(num_weights_bytes * max(2.0, 1.0 + 2.0 * growth))
        if not self.cache.leaves_room(num_bytes):
            # What another adapter of that size became is no reason to refuse this one.
            num_bytes = min(num_bytes, 3 * num_weights_bytes)
        async with self._room(num_bytes):
            self._unloads_sent[id(unloads_sent)] = unloads_sent
            try:
                while True:
                    unloads_sent.clear()
                    num_restarts, began_s = self._client.num_restarts, time.monotonic()
                    info = await self._client.load_adapter(path)
                    if num_restarts != self._client.num_restarts:
                        raise EngineUnavailableError("the engine was started again while the adapter was loaded")
                    self.forget_if_restarted()
                    # The engine answers in order: only an unload sent after this load can have taken it away.
                    if info.adapter_id not in unloads_sent:
                        break
            finally:
                del self._unloads_sent[id(unloads_sent)]
            self._growth[magnitude] = info.num_host_bytes / max(num_weights_bytes, 1)
            self.cache.add(info.adapter_id, info.num_host_bytes, time.monotonic() - began_s)
            self.cache.hold(info.adapter_id)
        self._drop_surplus()
        return info

    async def close(self) -> None:
        """Stop waiting for the engine."""
        for task in self._unloads.values():
            task.cancel()
        await asyncio.gather(*self._unloads.values(), return_exceptions=True)

    @asynccontextmanager
    async def _room(self, num_bytes: int) -> AsyncIterator[None]:
        """Keep so many bytes free for the length of the block; first come, first served."""
        if num_bytes > self.cache.max_bytes:
            raise AdapterError(
                f"the adapter needs about {num_bytes} bytes of host memory while it is loaded, but host_adapter_bytes "
                f"is {self.cache.max_bytes}"
            )
        async with self._turn:
            # Others wait behind this one, so it must not wait for what cannot come.
            await self._until(
                lambda: self.cache.victims(num_bytes) is not None or not self.cache.leaves_room(num_bytes)
            )
            victims = self.cache.victims(num_bytes)
            if victims is None:
                raise AdapterUnavailableError(
                    f"loading it needs about {num_bytes} bytes of host memory, more than pinned adapters leave of "
                    f"{self.cache.max_bytes}"
                )
            self.cache.reserve(num_bytes)
        try:
            await self._evict(victims)
            yield
        finally:
            self.cache.unreserve(num_bytes)
            self._wake()

    def _drop_surplus(self) -> None:
        """Adapters turned out larger than their files let expect."""
        for victim in self.cache.surplus():
            self._on_evicted(victim)
            self._send_unload(victim, is_eviction=True)

    async def _evict(self, victims: list[AdapterId]) -> None:
        """Have the engine free these; returns when it has, and what others sent away is free too if there is no room
        without."""
        for adapter_id in victims:
            if adapter_id in self.cache and not self.cache.num_holds(adapter_id):
                self._on_evicted(adapter_id)
                self._send_unload(adapter_id, is_eviction=True)
        if self._unloads and self.cache.is_over:
            await asyncio.wait(tuple(self._unloads.values()))

    def _send_unload(self, adapter_id: AdapterId, *, is_eviction: bool = False) -> None:
        """Have the engine free an adapter that nobody holds. From now on it is not staged."""
        assert not self.cache.num_holds(adapter_id), "what is in use is never unloaded"
        num_bytes = self.cache.evict(adapter_id) if is_eviction else self.cache.discard(adapter_id)
        self._unwanted.discard(adapter_id)
        self._note_unload(adapter_id)
        self.cache.leave(num_bytes)
        before = self._unloads.get(adapter_id)
        self._unloads[adapter_id] = asyncio.create_task(self._unload(adapter_id, num_bytes, before))
        self._wake()

    def _note_unload(self, adapter_id: AdapterId) -> None:
        for sent in self._unloads_sent.values():
            sent.add(adapter_id)

    async def _unload(self, adapter_id: AdapterId, num_bytes: int, before: "asyncio.Task[None] | None") -> None:
        self._note_unload(adapter_id)  # a load may have been sent since this task was made
        try:
            await self._client.unload_adapter(adapter_id)
            if before is not None:
                await asyncio.wait((before,))
        except EngineUnavailableError:
            _LOGGER.info("Adapter %s went with the engine", adapter_id)
        except PomonaError:
            _LOGGER.exception("Adapter %s could not be unloaded", adapter_id)
        finally:
            self.cache.left(num_bytes)
            if self._unloads.get(adapter_id) is asyncio.current_task():
                del self._unloads[adapter_id]
            self._wake()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._change.clear()
            await self._change.wait()

    def _wake(self) -> None:
        self._change.set()

    async def _freed(self, adapter_id: AdapterId) -> None:
        unload = self._unloads.get(adapter_id)
        if unload is not None:
            await asyncio.wait((unload,))
