"""LocalClient: an EngineClient over an engine in this process, for tests, notebooks and single-process use.

The same loop, messages and session as ProcessClient, with a thread in the place of the process. There is nothing to
start again: an engine that fails leaves the client in the state "failed".
"""

import asyncio
import logging
import threading
import time
from typing import Self

from pomona.core.adapter import AdapterInfo
from pomona.core.engine_info import EngineInfo
from pomona.core.errors import EngineDiedError, EngineUnavailableError
from pomona.core.ids import AdapterId, RequestId
from pomona.core.output import EngineStats
from pomona.core.request import Request
from pomona.driver.channel import ClientChannel, EngineChannel, socket_pair
from pomona.driver.config import DriverConfig
from pomona.driver.loop import EngineLoop, EngineParts
from pomona.driver.messages import Ended, Report, Shutdown, TurnReport, pack_error, unpack_error
from pomona.driver.session import EngineSession, RequestStream

_LOGGER = logging.getLogger(__name__)

_TICK_S = 0.005
_CLOSED = "the engine is shutting down"


class LocalClient:
    """An engine stepped by one thread of this process.

    Args:
        parts: the built engine; the client's thread alone touches it from ``start`` on.
        config: limits; those of processes do not apply.
    """

    def __init__(self, parts: EngineParts, config: DriverConfig | None = None) -> None:
        """Nothing runs yet."""
        self._parts = parts
        self._config = config or DriverConfig()
        self._state = "not started"
        self._channel: ClientChannel | None = None
        self._open_session: EngineSession | None = None

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.close()

    @property
    def is_ready(self) -> bool:
        """True while requests are taken."""
        return self._state == "ready"

    @property
    def state(self) -> str:
        """For people: "ready", "failed: why", "closed"."""
        return self._state

    @property
    def num_restarts(self) -> int:
        """Always 0: an engine in this process is not started again."""
        return 0

    def stats(self) -> EngineStats:
        """The latest snapshot received; all zero while the engine is not ready."""
        return EngineStats() if self._open_session is None else self._open_session.stats

    async def start(self) -> EngineInfo:
        """Start the engine's thread on the running event loop."""
        own_end, engine_end = socket_pair()
        self._channel = ClientChannel(own_end, self._on_report)
        self._open_session = EngineSession(self._channel, self._config.max_unanswered_commands)
        self._thread = threading.Thread(
            target=self._run, args=(EngineChannel(engine_end),), name="pomona-engine", daemon=True
        )
        self._thread.start()
        self._state = "ready"
        return self._parts.info

    async def close(self) -> None:
        """Stop the thread. Requests in flight end with FinishReason.FAIL. May be called twice."""
        self._state = "closed"
        if self._open_session is not None and self._channel is not None:
            self._open_session.end(EngineUnavailableError(_CLOSED))
            self._channel.send(Shutdown())
            deadline_s = time.monotonic() + self._config.stop_limit_s
            while self._thread.is_alive() and time.monotonic() < deadline_s:
                await asyncio.sleep(_TICK_S)
            self._channel.close()
            if self._thread.is_alive():
                # A thread cannot be killed; it is a daemon, and ends with the process.
                _LOGGER.error("The engine's thread has not stopped within %g s", self._config.stop_limit_s)

    def submit(self, request: Request) -> RequestStream:
        """Send a request; see EngineClient.submit. Request ids are never used twice."""
        return self._session().submit(request)

    async def abort(self, request_id: RequestId) -> None:
        """End a request; its stream gets the terminal output. Unknown ids are ignored."""
        if self._open_session is not None:
            self._open_session.abort(request_id)

    async def load_adapter(self, path: str) -> AdapterInfo:
        """See EngineClient.load_adapter. A load whose caller is cancelled goes on."""
        return await self._session().load_adapter(path)

    async def unload_adapter(self, adapter_id: AdapterId) -> None:
        """See EngineClient.unload_adapter."""
        await self._session().unload_adapter(adapter_id)

    async def resident_adapters(self) -> frozenset[AdapterId]:
        """See EngineClient.resident_adapters."""
        return await self._session().resident_adapters()

    def _session(self) -> EngineSession:
        if self._open_session is None or not self.is_ready:  # why not may name files, and is in `state`
            raise EngineUnavailableError(f"the engine is not ready: {self._state.partition(':')[0]}")
        return self._open_session

    def _run(self, channel: EngineChannel) -> None:
        """The thread: one engine's life."""
        loop = EngineLoop(self._parts, channel, self._config.num_staging_threads)
        error = loop.run()
        channel.tell(Ended(None if error is None else pack_error(error)))
        channel.close()
        self._parts.close()
        loop.close()

    def _on_report(self, report: Report) -> None:
        assert self._open_session is not None
        match report:
            case TurnReport():
                self._open_session.on_turn(report)
            case Ended(error) if error is not None and self.is_ready:
                reason = str(unpack_error(error))
                self._state = f"failed: {reason}"
                self._open_session.end(EngineDiedError(reason))
