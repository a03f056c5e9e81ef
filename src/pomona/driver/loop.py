"""The engine's loop: commands in, one step, one report out. Real time enters the pure engine here and only here.

Runs in the engine's own process (driver/child.py) or in a thread (LocalClient). Adapters are staged by a small pool
of threads beside the step; everything that touches the engine happens on the loop's thread.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from pomona.core.adapter import AdapterInfo
from pomona.core.engine_info import EngineInfo
from pomona.core.errors import AdapterUnavailableError, EngineUnavailableError, PomonaError
from pomona.core.ids import AdapterId
from pomona.core.interfaces import AdapterHost
from pomona.core.output import RequestOutput
from pomona.driver.channel import EngineChannel
from pomona.driver.messages import (
    Abort,
    AdapterLoaded,
    AdapterUnloaded,
    AskResident,
    Begin,
    CallFailed,
    Command,
    LoadAdapter,
    Ping,
    Rejection,
    Reply,
    ResidentAdapters,
    Shutdown,
    Submit,
    UnloadAdapter,
    pack_error,
)
from pomona.engine.engine import Engine

_LOGGER = logging.getLogger(__name__)

_BESIDE_POLL_S = 0.005
"""An idle loop looks this often for staged adapters, and for room for a report that a slow client has not taken."""


def _nothing() -> None:
    """Close of an engine that holds nothing to close."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """A built engine with what its loop needs."""

    engine: Engine
    adapter_host: AdapterHost
    info: EngineInfo
    close: Callable[[], None] = _nothing
    """Called once after the last step, on the loop's thread."""


class EngineBuilder(Protocol):
    """Makes an engine inside its process. Must be picklable: a module's function, a partial, or a dataclass."""

    def __call__(self, report_progress: Callable[[str], None], /) -> EngineParts:
        """Build the engine, telling people how far it is ("loading weights 35%").

        Raises:
            PomonaError: it cannot be built; the error reaches whoever starts the client.
        """
        ...


@dataclass(slots=True)
class _Staging:
    """One LoadAdapter under way in the pool."""

    call_id: int
    path: str
    future: Future[AdapterInfo]
    unstaged: set[AdapterId] = field(default_factory=set)
    """Adapters whose host copy was dropped since this staging began: what it found may be gone."""


class EngineLoop:
    """Turns an engine in real time until it is told to shut down."""

    def __init__(
        self,
        parts: EngineParts,
        channel: EngineChannel,
        num_staging_threads: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take over the parts; the channel must be connected."""
        self._engine = parts.engine
        self._host = parts.adapter_host
        self._channel = channel
        self._clock = clock
        self._pool = ThreadPoolExecutor(num_staging_threads, thread_name_prefix="pomona-staging")
        self._staging: list[_Staging] = []
        self._registered: set[AdapterId] = set()
        self._draining: dict[AdapterId, list[int]] = {}
        """Adapters being retired, with the calls that wait for it."""
        self._waiting_for_drain: dict[AdapterId, list[LoadAdapter]] = {}
        """Loads of an adapter that is being retired: staged again once it is gone."""
        self._outputs: list[RequestOutput] = []
        self._replies: list[Reply] = []
        self._is_stopping = False

    def run(self) -> PomonaError | None:
        """Turn until told to shut down; returns the reason if the engine failed instead.

        A failure of the engine's step leaves its state unknown: the loop ends, and with it every request in flight.
        """
        try:
            while not self._is_stopping:
                self._turn()
        except Exception as error:
            _LOGGER.exception("The engine failed")
            # The text reaches clients; the details, which are not theirs to see, are in the log.
            return EngineUnavailableError(f"the engine failed: {type(error).__name__}")
        return None

    def close(self) -> None:
        """After ``run``, and after whoever waits for its outcome has been told: wait for stagings that have begun."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _turn(self) -> None:
        for command in self._channel.receive(self._patience_s()):
            self._handle(command)
        self._register_staged()
        if self._engine.has_work:
            self._outputs.extend(self._engine.step(self._clock()))
        self._free_drained()
        self._channel.tell_turn(self._outputs, self._replies, self._engine.stats())
        self._outputs, self._replies = [], []

    def _patience_s(self) -> float | None:
        """How long this turn may wait for a command."""
        if self._engine.has_work:
            return 0.0
        return _BESIDE_POLL_S if self._staging or self._channel.has_unsent else None

    def _handle(self, command: Command) -> None:
        match command:
            case Submit(request):
                try:
                    self._engine.add(request)
                except PomonaError as error:
                    self._replies.append(Rejection(request.request_id, pack_error(error)))
            case Abort(request_id):
                output = self._engine.abort(request_id)
                if output is not None:
                    self._outputs.append(output)
            case LoadAdapter():
                self._stage(command)
            case UnloadAdapter(call_id, adapter_id):
                self._retire(call_id, adapter_id)
            case AskResident(call_id):
                resident = [status.adapter_id for status in self._engine.adapter_statuses() if status.is_resident]
                self._replies.append(ResidentAdapters(call_id, resident))
            case Shutdown():
                self._is_stopping = True
            case Ping() | Begin():
                pass

    def _stage(self, load: LoadAdapter) -> None:
        try:
            future = self._pool.submit(self._host.stage, load.path)
        except RuntimeError as error:  # the system refuses another thread; it may be staged later, to no harm
            refusal = AdapterUnavailableError(f"the adapter cannot be read now: {error}")
            self._replies.append(CallFailed(load.call_id, pack_error(refusal)))
        else:
            self._staging.append(_Staging(load.call_id, load.path, future))

    def _register_staged(self) -> None:
        """Make adapters whose staging has ended known to the engine, and answer their calls."""
        done = [staging for staging in self._staging if staging.future.done()]
        for staging in done:
            self._staging.remove(staging)
            error = staging.future.exception()
            if error is None:
                self._register(staging, staging.future.result())
                continue
            if not isinstance(error, PomonaError):
                _LOGGER.error("Staging %s failed", staging.path, exc_info=error)
            self._replies.append(CallFailed(staging.call_id, pack_error(error)))

    def _register(self, staging: _Staging, info: AdapterInfo) -> None:
        adapter_id = info.adapter_id
        load = LoadAdapter(staging.call_id, staging.path)
        if adapter_id in self._draining:
            self._waiting_for_drain.setdefault(adapter_id, []).append(load)
            return
        if adapter_id in staging.unstaged:
            self._stage(load)
            return
        if adapter_id not in self._registered:
            try:
                self._engine.register_adapter(info)
            except PomonaError as error:
                self._unstage(adapter_id)
                self._replies.append(CallFailed(staging.call_id, pack_error(error)))
                return
            self._registered.add(adapter_id)
        self._replies.append(AdapterLoaded(staging.call_id, info))

    def _retire(self, call_id: int, adapter_id: AdapterId) -> None:
        if adapter_id in self._draining:
            self._draining[adapter_id].append(call_id)
        elif adapter_id in self._registered:
            self._registered.remove(adapter_id)
            self._draining[adapter_id] = [call_id]
            self._engine.retire_adapter(adapter_id)
        else:
            # Nothing of it is here: all is freed.
            self._replies.append(AdapterUnloaded(call_id))

    def _free_drained(self) -> None:
        """Drop the host copy of adapters that no sequence and no page refers to any more."""
        if not self._draining:
            return
        for adapter_id in self._engine.take_drained():
            self._unstage(adapter_id)
            for call_id in self._draining.pop(adapter_id):
                self._replies.append(AdapterUnloaded(call_id))
            for load in self._waiting_for_drain.pop(adapter_id, ()):
                self._stage(load)

    def _unstage(self, adapter_id: AdapterId) -> None:
        self._host.unstage(adapter_id)
        for staging in self._staging:
            staging.unstaged.add(adapter_id)
