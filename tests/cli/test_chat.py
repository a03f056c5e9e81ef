"""``pomona chat`` against a real server that echoes: what the model wrote is what is shown."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pomona.cli.api import Api
from pomona.cli.chat import run_chat
from support.server import BASE, listen, serve

TEXT = "a\u2028b\u2029c\u0085d\x0be\tf :100: x:smile:y [red]g[/] [/h]"
"""Line ends of other kinds than a newline, codes of emoji, and markup."""


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    async with serve(tmp_path) as served, listen(served.app) as address:
        yield address


async def say(url: str, message: str | None, model: str | None = None) -> None:
    await asyncio.to_thread(run_chat, url, None, model, message, max_tokens=None, temperature=0.0)


async def test_an_answer_is_shown_as_the_model_wrote_it(url, capsys):
    await say(url, TEXT)
    assert capsys.readouterr().out == f"user\n{TEXT}\nassistant\n\n"


async def test_a_conversation_goes_on_with_what_was_said(url, capsys, monkeypatch):
    said = iter([TEXT, "more", "/exit"])
    monkeypatch.setattr("builtins.input", lambda: next(said))
    await say(url, None)
    first = f"user\n{TEXT}\nassistant\n"
    shown = capsys.readouterr().out
    assert shown.startswith(f"Talking to {BASE} at {url}.")
    assert shown.endswith(f"> {first}\n> {first}{first}\nuser\nmore\nassistant\n\n> ")


async def test_what_the_server_refuses_is_said_and_the_conversation_goes_on(url, capsys, monkeypatch):
    said = iter(["hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda: next(said))
    await say(url, None, model="x[/]:smile:")
    assert "'x[/]:smile:' does not exist" in capsys.readouterr().out


async def test_a_stream_is_cut_at_newlines_only(url):
    body = {"model": BASE, "messages": [{"role": "user", "content": TEXT}], "stream": True, "max_tokens": 64}
    body["temperature"] = 0.0  # a random seed may turn the echo such that it begins within the bytes of U+2028
    payloads = await asyncio.to_thread(lambda: list(Api(url).stream("/v1/chat/completions", body)))
    assert all(payload.startswith(b"{") and payload.endswith(b"}") for payload in payloads)
    assert "\u2028".encode() in b"".join(payloads)
