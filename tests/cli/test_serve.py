"""``pomona serve`` around the model: what happens while that is loaded, with nothing to load."""

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import sys

import pytest
import uvicorn
from rich.console import Console

from pomona.cli import serve
from pomona.cli.config import load_config
from pomona.core.errors import ConfigError
from support.driver import until


def test_an_engine_that_is_not_started_again_is_an_error_in_the_log_and_percentages_do_not_fill_it(caplog):
    caplog.set_level(logging.INFO)
    states = ["ready", "restarting: why", "restarting: loading weights 3%", "restarting: loading weights 100%"]
    states += ["restarting: allocating the KV cache", "ready", "restarting: why", "failed: why"]
    for before, state in itertools.pairwise(states):
        serve.log_state(state, before)
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "Engine restarting: why"),
        ("INFO", "Engine restarting: loading weights 3%"),
        ("INFO", "Engine restarting: allocating the KV cache"),
        ("INFO", "Engine ready"),
        ("INFO", "Engine restarting: why"),
        ("ERROR", "Engine failed: why"),
    ]


async def test_signals_mean_after_a_server_what_they_meant_before_it():
    server = serve._Server(uvicorn.Config(None), None)
    numbers = (signal.SIGINT, signal.SIGTERM)
    first = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        before = [signal.getsignal(number) for number in numbers]
        with server.capture_signals():
            signal.raise_signal(signal.SIGTERM)
            await until(lambda: server.should_exit, "the server has heard it")
        assert [signal.getsignal(number) for number in numbers] == before
    finally:
        for number, handler in zip(numbers, first, strict=True):
            signal.signal(number, handler)


def test_sigterm_while_the_model_is_loaded_ends_nothing_in_the_middle(monkeypatch):
    """An engine's process of which nobody has heard yet would be left to itself."""
    has_gone_on = False

    @contextlib.asynccontextmanager
    async def load(config, console):
        nonlocal has_gone_on
        signal.raise_signal(signal.SIGTERM)
        has_gone_on = True
        await asyncio.sleep(60)
        yield None, None, "base"

    monkeypatch.setattr(serve, "_build_app", load)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("at once"))
    try:
        with pytest.raises(SystemExit) as ended:
            serve.run_server(load_config({"port": 0}))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert has_gone_on
    assert ended.value.code == 143


async def test_of_servers_that_took_a_port_while_they_loaded_one_says_that_it_cannot_have_it(monkeypatch):
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]

        @contextlib.asynccontextmanager
        async def load(config, console):
            other.listen()
            yield None, None, "base"

        monkeypatch.setattr(serve, "_build_app", load)
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await serve._serve(load_config({"port": port}), Console(), None)
