"""``pomona serve``: start the engine's process, load the adapters, open the door."""

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pomona.cli.accounts import check_settings, open_accounts
from pomona.cli.build import BuildEngine, engine_builder
from pomona.cli.config import AppConfig
from pomona.cli.hub import model_name
from pomona.cli.residency import AdapterPlaces, check_adapters, give_names, make_service, open_places
from pomona.core.engine_info import EngineInfo
from pomona.core.errors import ConfigError, PomonaError
from pomona.driver.client import ProcessClient
from pomona.driver.config import LOG_FORMAT, DriverConfig
from pomona.server.adapter_service import AdapterService
from pomona.server.app import create_app
from pomona.server.config import MAX_CHOICES, ServedModel, ServerConfig
from pomona.server.connections import GuardedProtocol
from pomona.server.service_level import ServiceLevels, parse_targets
from pomona.text.chat_template import ChatTemplate
from pomona.text.tokenizer import Tokenizer

_LOGGER = logging.getLogger(__name__)
_MAX_FILES = 65_536
_BACKLOG = 2048
"""Connections that may wait to be taken."""
_DRAIN_S = 5
"""Seconds that open streams get after Ctrl-C."""
_CUT_S = 5
"""Seconds after that for clients to read that there is no more."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers."""

    url: str
    base_name: str
    adapters: AdapterService


WhenReady = Callable[[Running], Awaitable[None]]


def run_server(config: AppConfig, when_ready: WhenReady | None = None) -> None:
    """Serve until Ctrl-C.

    Args:
        config: settings.
        when_ready: run beside the server once it answers.

    Raises:
        PomonaError: a model, adapter or setting is wrong, or the port is taken.
        KeyboardInterrupt: Ctrl-C before the server answered.
        SystemExit: SIGTERM before the server answered.
    """
    console = Console(stderr=True, emoji=False)
    logging.basicConfig(
        level=config.log_level.upper(), format="%(message)s", datefmt="[%X]", handlers=[log_handler(console)]
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # The loop that uvicorn would choose: uvloop where there is one.
    make_loop = uvicorn.Config("", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=make_loop) as runner:
        try:
            runner.run(_serve(config, console, when_ready))
        except asyncio.CancelledError:
            sys.exit(128 + signal.SIGTERM)


def log_handler(console: Console) -> logging.Handler:
    """What prints the log: columns for a terminal; elsewhere a line for each message, which can be searched."""
    if console.is_terminal:
        return RichHandler(console=console)
    handler = logging.StreamHandler(console.file)
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    return handler


def log_state(state: str, before: str) -> None:
    """Log what has become of the engine; nothing while only a percentage grows."""
    if state.rstrip("%0123456789") != before.rstrip("%0123456789"):
        _LOGGER.log(logging.ERROR if state.startswith("failed") else logging.INFO, "Engine %s", state)


async def _serve(config: AppConfig, console: Console, when_ready: WhenReady | None) -> None:
    _allow_many_files()
    with _cancelled_by_sigterm(), _bind(config) as listener:
        async with _build_app(config, console) as (app, running_adapters, base_name):
            _listen(listener, config)
            host = f"[{config.host}]" if ":" in config.host else config.host
            # What is there now lives as long as the server: no collection need ever look at it again.
            gc.collect()
            gc.freeze()
            running = Running(f"http://{host}:{listener.getsockname()[1]}", base_name, running_adapters)
            server = _Server(
                uvicorn.Config(
                    app,
                    http=GuardedProtocol,
                    ws="none",
                    log_config=None,  # its log is printed like ours
                    log_level="warning",
                    backlog=_BACKLOG,
                    timeout_graceful_shutdown=_DRAIN_S + _CUT_S,
                    server_header=False,
                ),
                app.state.context.client,
            )
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.01)
            console.print(ready_line(running), soft_wrap=True)
            beside = asyncio.create_task(_run_beside(when_ready, running)) if when_ready is not None else None
            await serving
            if beside is not None:
                beside.cancel()
                await asyncio.gather(beside, return_exceptions=True)


@contextlib.contextmanager
def _cancelled_by_sigterm() -> Iterator[None]:
    """SIGTERM cancels the task, as asyncio has Ctrl-C do: an exception amid the start of the engine would lose it."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    before = signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which ends by raising the signal again, before the engine is closed. Streams
    that take too long to end do so with the engine, so that their clients are told: uvicorn would hang up."""

    def __init__(self, config: uvicorn.Config, client: ProcessClient) -> None:
        super().__init__(config)
        self._client = client
        self._is_cut = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, or if that is under way, wait for nobody."""
        if self.should_exit:
            self._is_cut.set()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more, and wait for what there is."""
        cut = asyncio.create_task(self._cut())
        await super().shutdown(sockets)
        cut.cancel()
        await asyncio.gather(cut, return_exceptions=True)

    async def _cut(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await self._is_cut.wait()
        await self._client.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on Ctrl-C and on SIGTERM: streams under way get some seconds to end; a second signal cuts them. What
        comes later ends the program as it would have before."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


async def _run_beside(when_ready: WhenReady, running: Running) -> None:
    try:
        await when_ready(running)
    except PomonaError as error:
        _LOGGER.error("%s", error)


def _allow_many_files() -> None:
    """Every connection is an open file: take as many as the system lets this user have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _bind(config: AppConfig) -> socket.socket:
    """Take the port before minutes of loading, not after."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise _port_error(config, error) from error
    return listener


def _listen(listener: socket.socket, config: AppConfig) -> None:
    """Have clients come. Of servers that took the same port while they all loaded, one can; uvloop would not tell."""
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        raise _port_error(config, error) from error


def _port_error(config: AppConfig, error: OSError) -> ConfigError:
    what = error.strerror or error
    return ConfigError(f"cannot listen on {config.host}:{config.port}: {what}; choose another --port")


@contextlib.asynccontextmanager
async def _build_app(config: AppConfig, console: Console) -> AsyncIterator[tuple[FastAPI, AdapterService, str]]:
    """Everything behind the door, started; closed on the way out."""
    check_settings(config)  # before minutes of loading, not after: this and all up to the engine's start
    server_config = _server_config(config)
    build = engine_builder(config)
    folder = Path(build.model_path)
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder, tokenizer)
    base_name = config.served_model_name or model_name(config.model)
    with open_places(config) as places:
        check_adapters(config, places, base_name)
        async with _start(config, build, places, base_name, console) as (client, service, info):
            console.print(_summary(base_name, info), markup=False, soft_wrap=True)
            model = ServedModel(base_name, info.max_model_len, info.vocab_size, info.eos_token_ids)
            async with open_accounts(config, service) as accounts:
                app = create_app(client, tokenizer, template, service, model, server_config, accounts=accounts)
                yield app, service, base_name


@contextlib.asynccontextmanager
async def _start(
    config: AppConfig, build: BuildEngine, places: AdapterPlaces, base_name: str, console: Console
) -> AsyncIterator[tuple[ProcessClient, AdapterService, EngineInfo]]:
    """The engine, with the adapters that the settings name, for the length of the block."""
    services: list[AdapterService] = []  # empty until the engine, which it needs, has started
    progress = _progress(console)
    start = progress.add_task(f"{escape(base_name)}: starting", total=None)
    before = ""

    def show_state(state: str) -> None:
        nonlocal before
        if not progress.live.is_started:
            log_state(state, before)
        else:
            progress.update(start, description=escape(f"{base_name}: {state}"))
        before = state
        if state == "ready":
            for service in services:
                service.restage()

    client = ProcessClient(build, DriverConfig(hang_limit_s=config.step_timeout_s), on_state=show_state)
    try:
        with progress:
            info = await client.start()
            progress.update(start, visible=False)
            service = make_service(config, client, places, base_name)
            await give_names(config, service, places)
            services.append(service)
        yield client, service, info
    finally:
        await client.close()


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _server_config(config: AppConfig) -> ServerConfig:
    return ServerConfig(
        api_key=config.api_key.get_secret_value() if config.api_key else None,
        max_body_bytes=config.max_body_bytes,
        # They come to the queue together: more than it takes would be refused however often they are sent again.
        max_choices=min(MAX_CHOICES, config.max_waiting),
        service_levels=ServiceLevels(
            frozenset(config.priority_tenant), tuple(parse_targets(target) for target in config.target)
        ),
    )


def ready_line(running: Running) -> str:
    """What is said, as markup, when the server answers."""
    return (
        f"[bold green]Ready[/] at {escape(running.url)}: {escape(running.base_name)} and "
        f"{len(running.adapters.entries)} adapters. Metrics at /metrics, API description at /docs. Ctrl-C stops."
    )


def _summary(base_name: str, info: EngineInfo) -> str:
    tokens = info.num_kv_blocks * info.block_size
    return (
        f"{base_name}: {info.precision} on {info.device}, context {info.max_model_len} tokens, "
        f"KV cache {tokens} tokens, {info.num_adapter_pages} adapter pages"
    )
