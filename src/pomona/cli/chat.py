"""``pomona chat``: talk to a running server, answers streamed as they come."""

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from pomona.cli.api import Api, ServerError

_BYE = ("/exit", "/quit")


def run_chat(
    url: str, api_key: str | None, model: str | None, message: str | None, *, max_tokens: int | None, temperature: float
) -> None:
    """Answer one message, or hold a conversation until end of input."""
    # Nothing that a model, a server or a person writes is markup or an emoji's code.
    api, console = Api(url, api_key), Console(highlight=False, markup=False, emoji=False)
    model = model or _base_model(api)
    options: dict[str, Any] = {"model": model, "temperature": temperature, "stream": True}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    messages: list[dict[str, str]] = []
    if message is not None:
        _answer(api, console, options, [{"role": "user", "content": message}])
        return
    console.print(f"Talking to {model} at {url}. /exit or Ctrl-D to leave, /new to start over.", style="dim")
    while (text := _ask(console)) is not None:
        if text == "/new":
            messages = []
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer = _answer(api, console, options, messages)
        except ServerError as error:
            console.print(str(error), style="red")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _ask(console: Console) -> str | None:
    while True:
        try:
            text = console.input("[bold cyan]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return None
        if text in _BYE:
            return None
        if text:
            return text


def _answer(api: Api, console: Console, options: dict[str, Any], messages: list[dict[str, str]]) -> str:
    parts = []
    for piece in _pieces(api.stream("/v1/chat/completions", {**options, "messages": messages})):
        parts.append(piece)
        console.file.write(piece)  # not ``print``, which turns tabs into spaces and drops control characters
        console.file.flush()
    console.print()
    return "".join(parts)


def _pieces(events: Iterator[bytes]) -> Iterator[str]:
    for event in events:
        chunk = json.loads(event)
        if "error" in chunk:
            raise ServerError(chunk["error"]["message"])
        for choice in chunk["choices"]:
            if choice["delta"].get("content"):
                yield choice["delta"]["content"]


def _base_model(api: Api) -> str:
    models = api.call("GET", "/v1/models")["data"]
    return next(str(model["id"]) for model in models if not model.get("parent"))
