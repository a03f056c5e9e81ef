"""ProcessClient: the server's EngineClient. Keeps an engine process alive.

Belongs to the event loop on which it was started. driver/local_client.py is its single-process sibling.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import ParamSpec, Self

from pomona.core.adapter import AdapterInfo
from pomona.core.engine_info import EngineInfo
from pomona.core.errors import EngineDiedError, EngineUnavailableError, PomonaError
from pomona.core.ids import AdapterId, RequestId
from pomona.core.output import EngineStats
from pomona.core.request import Request
from pomona.driver.config import DriverConfig
from pomona.driver.life import EngineLife
from pomona.driver.loop import EngineBuilder
from pomona.driver.restarts import RestartRule
from pomona.driver.session import EngineSession, RequestStream

_LOGGER = logging.getLogger(__name__)

_CLOSED = "the engine is shutting down"


def _ignore_state(state: str) -> None:
    """Nobody wants to hear of changes of state."""


_Arguments = ParamSpec("_Arguments")


def _call(listener: Callable[_Arguments, None], *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
    """Tell a listener something. What it raises is its own affair: the engine must be restarted all the same."""
    try:
        listener(*args, **kwargs)
    except Exception:
        _LOGGER.exception("A listener of the engine's client failed")


class ProcessClient:
    """An engine in a process of its own, started again when it dies; adapters are then to be loaded again.

    Args:
        build: picklable; called in the engine's process.
        config: limits.
        on_state: called with ``state`` after every change, start-up progress included.
    """

    def __init__(
        self,
        build: EngineBuilder,
        config: DriverConfig | None = None,
        *,
        on_state: Callable[[str], None] = _ignore_state,
    ) -> None:
        """Nothing is started yet."""
        self._build = build
        self._config = config or DriverConfig()
        self._on_state = on_state
        self._restarts = RestartRule(self._config)
        self._life: EngineLife | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._state = "not started"
        self._num_restarts = 0

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
        """For people: "starting: loading weights 35%", "ready", "restarting: why", "failed: why", "closed"."""
        return self._state

    @property
    def num_restarts(self) -> int:
        """Times the engine was started again after its death."""
        return self._num_restarts

    @property
    def pid(self) -> int:
        """Process id of the engine; 0 while there is none."""
        return 0 if self._life is None else self._life.pid

    def stats(self) -> EngineStats:
        """The latest snapshot received; all zero while no engine is ready."""
        return EngineStats() if self._life is None else self._life.session.stats

    async def start(self) -> EngineInfo:
        """Start the engine's process; returns when requests are taken.

        Raises:
            PomonaError: the builder's error, or EngineUnavailableError if the process died or fell silent.
        """
        assert self._supervisor is None, "started twice"
        self._set_state("starting")
        try:
            self._life, info = await self._begin("starting")
        except PomonaError as error:
            self._set_state(f"failed: {error}")
            raise
        if self._state == "closed":
            await self._life.end(EngineUnavailableError(_CLOSED))
            raise EngineUnavailableError(_CLOSED)
        self._set_state("ready")
        self._supervisor = asyncio.create_task(self._supervise(self._life), name="pomona-engine-supervisor")
        return info

    async def close(self) -> None:
        """Shut the engine down. Requests in flight end with FinishReason.FAIL. May be called twice."""
        self._set_state("closed")
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait((self._supervisor,))
        if self._life is not None:
            await self._life.end(EngineUnavailableError(_CLOSED))
            self._life = None

    def submit(self, request: Request) -> RequestStream:
        """Send a request; see EngineClient.submit. Request ids are never used twice."""
        return self._session().submit(request)

    async def abort(self, request_id: RequestId) -> None:
        """End a request; its stream gets the terminal output. Unknown ids are ignored."""
        if self._life is not None:
            self._life.session.abort(request_id)

    async def load_adapter(self, path: str) -> AdapterInfo:
        """See EngineClient.load_adapter. A load whose caller is cancelled goes on."""
        return await self._session().load_adapter(path)

    async def unload_adapter(self, adapter_id: AdapterId) -> None:
        """See EngineClient.unload_adapter. If the engine dies meanwhile, the adapter went with it."""
        await self._session().unload_adapter(adapter_id)

    async def resident_adapters(self) -> frozenset[AdapterId]:
        """See EngineClient.resident_adapters."""
        return await self._session().resident_adapters()

    def _session(self) -> EngineSession:
        if self._life is None or not self.is_ready:  # why not may name files, and is in the log
            raise EngineUnavailableError(f"the engine is not ready: {self._state.partition(':')[0]}")
        return self._life.session

    def _set_state(self, state: str) -> None:
        if state != self._state and self._state != "closed":
            self._state = state
            _call(self._on_state, state)

    async def _begin(self, prefix: str) -> tuple[EngineLife, EngineInfo]:
        return await EngineLife.begin(
            self._build, self._config, lambda progress: self._set_state(f"{prefix}: {progress}")
        )

    async def _supervise(self, life: EngineLife) -> None:
        """Watch one life after the other until there is to be no further one."""
        try:
            next_life: EngineLife | None = life
            while next_life is not None:
                reason = await next_life.wait_until_over()
                _LOGGER.error("The engine ended: %s", reason)
                # Not ready first: whoever sees a request fail must also see why.
                self._set_state(f"restarting: {reason}")
                await next_life.end(EngineDiedError(reason))
                next_life = await self._restart(reason)
        except Exception as error:
            _LOGGER.exception("The engine's supervisor failed")
            reason = f"{type(error).__name__}: {error}"
            self._set_state(f"failed: {reason}")
            if self._life is not None:  # nobody watches it any more: what is in flight would never end
                self._life.session.end(EngineDiedError(reason))

    async def _restart(self, reason: str) -> EngineLife | None:
        """Start engines until one is ready; None when there were too many deaths."""
        while True:
            self._life = None
            delay_s = self._restarts.delay_after_death_s(time.monotonic())
            if delay_s is None:
                self._set_state(f"failed: {reason}")
                return None
            self._set_state(f"restarting: {reason}")
            await asyncio.sleep(delay_s)
            try:
                self._life, _ = await self._begin("restarting")
            except PomonaError as error:
                reason = str(error)
                _LOGGER.error("The engine could not be restarted: %s", reason)
                continue
            self._num_restarts += 1
            self._set_state("ready")
            return self._life
