"""One engine process from start to end, with its session: what ProcessClient starts again after a death."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from pomona.core.engine_info import EngineInfo
from pomona.core.errors import EngineUnavailableError, PomonaError
from pomona.driver.channel import ClientChannel, socket_pair
from pomona.driver.config import DriverConfig
from pomona.driver.loop import EngineBuilder
from pomona.driver.messages import Begin, Ended, Hello, Ready, Report, Shutdown, Starting, TurnReport, unpack_error
from pomona.driver.process import ChildConfig, EngineProcess
from pomona.driver.session import EngineSession

_TICK_S = 0.1
"""How often the process is looked at; bounds how late a death is noticed."""
_REAP_LIMIT_S = 60.0
"""A killed process with much memory takes a while to go; one stuck in the kernel is not waited for any longer."""

OnProgress: TypeAlias = Callable[[str], None]


class EngineLife:
    """A running engine process. Build it with ``begin``; always end it with ``end``."""

    def __init__(self, config: DriverConfig, on_progress: OnProgress) -> None:
        """Make the sockets; no process yet.

        Raises:
            OSError: the system refuses.
        """
        self._config = config
        self._on_progress = on_progress
        own_end, self._engine_end = socket_pair()
        self._process = EngineProcess()
        self._channel = ClientChannel(own_end, self._on_report)
        self.session = EngineSession(self._channel, config.max_unanswered_commands)
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = loop.create_future()
        self._over: asyncio.Future[str] = loop.create_future()
        self._has_news = False
        """A report has arrived since the watchdog looked."""

    @classmethod
    async def begin(
        cls,
        build: EngineBuilder,
        config: DriverConfig,
        on_progress: OnProgress,
    ) -> tuple["EngineLife", EngineInfo]:
        """Start a process and wait until its engine is built.

        Raises:
            PomonaError: the builder's own error, or EngineUnavailableError if the process died or fell silent.
        """
        try:
            life = cls(config, on_progress)
        except OSError as error:
            raise EngineUnavailableError(f"the engine's sockets could not be made: {error}") from error
        try:
            with life._engine_end:  # closed here, so that the child's end is the last one
                # What is no warning is not printed: the parent may be drawing a progress bar.
                log_level = max(logging.getLogger().getEffectiveLevel(), logging.WARNING)
                child_config = ChildConfig(config.num_staging_threads, log_level)
                life._process.start(build, child_config, life._engine_end.fileno())
            await life._watch(life._ready, config.start_silence_limit_s)
            return life, life._ready.result()
        except BaseException:
            life._ready.cancel()
            await life.end(EngineUnavailableError("the engine did not start"))
            raise

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    async def wait_until_over(self) -> str:
        """Watch the engine until it dies, fails or hangs; returns the reason, for people."""
        try:
            await self._watch(self._over, self._config.hang_limit_s)
        except PomonaError as error:
            self._over.set_result(str(error))
        return self._over.result()

    async def end(self, error: EngineUnavailableError) -> None:
        """Shut the engine down, or kill it if it does not listen; everything in flight ends with ``error``.

        Returns when the process is gone and nothing of it is left. May be called twice.
        """
        self.session.end(error)
        try:
            if self._is_listening and self._channel.send(Shutdown()):
                await self._wait_for_exit(self._config.stop_limit_s)
        finally:
            self._channel.close()
            self._process.kill()
            try:
                await self._wait_for_exit(_REAP_LIMIT_S)
            finally:
                self._process.release()

    @property
    def _is_listening(self) -> bool:
        """The engine is built, and as far as is known its loop takes commands."""
        is_built = self._ready.done() and not self._ready.cancelled() and self._ready.exception() is None
        return is_built and not self._over.done()

    async def _wait_for_exit(self, limit_s: float) -> None:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + limit_s
        while self._process.is_running and loop.time() < deadline_s:
            await asyncio.sleep(_TICK_S / 10)

    async def _watch(self, news: "asyncio.Future[Any]", silence_limit_s: float) -> None:
        """Wait for ``news`` as long as the process lives and is not silent for too long.

        While it starts, every report of progress breaks the silence. Later only the answer to a command does, so it
        is sent a ping now and then; an engine that was asked nothing may be silent.
        """
        silence_s = 0.0
        since_ping_s = 0.0
        loop = asyncio.get_running_loop()
        last_s = loop.time()
        while not news.done():
            await asyncio.wait((news,), timeout=_TICK_S)
            now_s = loop.time()
            # An event loop that was itself stopped for long proves nothing about the engine.
            passed_s, last_s = min(now_s - last_s, 1.0), now_s
            how = self._process.end_text()
            if how is not None:
                self._read_last_words()
                if news.done():
                    return
                raise EngineUnavailableError(f"the engine's process {how}")
            is_asked = not self._ready.done() or self.session.num_unanswered > 0
            silence_s = silence_s + passed_s if is_asked and not self._has_news else 0.0
            self._has_news = False
            since_ping_s += passed_s
            if self._ready.done() and not is_asked and since_ping_s >= self._config.ping_interval_s:
                since_ping_s = 0.0
                self.session.ping()
            if silence_s >= silence_limit_s:
                raise EngineUnavailableError(f"the engine has not answered for {silence_limit_s:g} s")

    def _read_last_words(self) -> None:
        """What a process sent before it ended waits in the socket."""
        self._has_news = True
        while self._has_news:
            self._has_news = False
            self._channel.read()

    def _on_report(self, report: Report) -> None:
        self._has_news = True
        match report:
            case TurnReport():
                self.session.on_turn(report)
            case Hello():
                if self._channel.send(Begin()):
                    self._process.remove_directory()
            case Starting(progress):
                self._on_progress(progress)
            case Ready(info):
                self._ready.set_result(info)
            case Ended(error):
                self._on_ended(None if error is None else unpack_error(error))

    def _on_ended(self, error: PomonaError | None) -> None:
        if not self._ready.done():
            self._ready.set_exception(error or EngineUnavailableError("the engine ended while it started"))
        elif not self._over.done():
            self._over.set_result(str(error or "the engine was shut down"))
