"""A small real OpenAI-compatible server on loopback for the load generator's tests: it streams words at a known pace
and misbehaves on request. Uses sockets and a thread of its own; nothing of pomona."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

BOS_TOKEN_ID = 1


@dataclass
class StreamingServer:
    """What the server does, and what it saw. A model named ``fail:KIND`` misbehaves in that way."""

    base_model: str = "tiny"
    adapters: tuple[str, ...] = tuple(f"tiny-{k}" for k in range(8))
    first_token_s: float = 0.0
    gap_s: float = 0.0
    num_tokens_before_eos: int = 1000
    """Answers end here unless the client sends ignore_eos."""
    tokens_per_event: int = 1
    num_silent_tokens: int = 0
    """Counted in usage but without an event, like an end-of-sequence token."""
    silent_s: float = 0.0
    """How long they take."""
    num_cached_tokens: int | None = None
    has_tokenize: bool = True
    takes_token_ids: bool = True
    refuses: tuple[str, ...] = ()
    """Body fields answered with 400."""
    api_key: str | None = None
    num_awaited: int = 0
    """No answer begins before this many requests (that may fail in no way) are in."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_in_flight: int = 0
    max_in_flight: int = 0
    num_disconnected: int = 0
    url: str = ""

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ]
        )

    def requests_to(self, *models: str) -> list[dict[str, Any]]:
        """Bodies received for these models."""
        return [body for body in self.bodies if body["model"] in models]

    async def _models(self, request: Request) -> Response:
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": {"message": "who are you?"}}, status_code=401)
        entries = [{"id": self.base_model, "object": "model"}]
        entries += [{"id": name, "object": "model", "parent": self.base_model} for name in self.adapters]
        return JSONResponse({"object": "list", "data": entries})

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        if not self.has_tokenize or "prompt" not in body:
            return JSONResponse({"detail": "Not Found"}, status_code=404)
        return JSONResponse({"tokens": [BOS_TOKEN_ID] + [100 + len(word) for word in body["prompt"].split()]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        for name in self.refuses:
            if name in body:
                return JSONResponse({"error": {"message": f"{name} is unknown"}}, status_code=400)
        if isinstance(body["prompt"], list) and not self.takes_token_ids:
            return JSONResponse({"error": {"message": "prompt must be a string"}}, status_code=400)
        kind = body["model"].removeprefix("fail:") if body["model"].startswith("fail:") else ""
        if kind.startswith("http_"):
            return JSONResponse({"error": {"message": f"as asked: {kind}"}}, status_code=int(kind[5:]))
        return StreamingResponse(self._stream(body, kind), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any], kind: str) -> AsyncIterator[bytes]:
        self.num_in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.num_in_flight)
        try:
            while len(self.bodies) < self.num_awaited:
                await asyncio.sleep(0.001)
            await asyncio.sleep(self.first_token_s)
            async for chunk in self._events(body, kind):
                yield chunk
        except asyncio.CancelledError:
            self.num_disconnected += 1
            raise
        finally:
            self.num_in_flight -= 1

    async def _events(self, body: dict[str, Any], kind: str) -> AsyncIterator[bytes]:
        num_tokens = (
            body["max_tokens"] if body.get("ignore_eos") else min(body["max_tokens"], self.num_tokens_before_eos)
        )
        for first in range(0, num_tokens, self.tokens_per_event):
            if first:
                await asyncio.sleep(self.gap_s)
            text = " tok" * min(self.tokens_per_event, num_tokens - first)
            yield _event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})
            match kind:
                case "disconnect":
                    raise ConnectionAbortedError("the server dies, as asked")
                case "incomplete":
                    return
                case "bad_event":
                    yield b"data: {not json}\n\n"
                case "stream_error":
                    yield _event({"error": {"message": "the engine died, as asked"}})
                    return
                case "timeout":
                    await asyncio.sleep(3600)
        await asyncio.sleep(self.silent_s)
        yield _event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        if kind != "no_usage":
            yield _event({"choices": [], "usage": self._usage(body, num_tokens)})
        yield b"data: [DONE]\n\n"

    def _usage(self, body: dict[str, Any], num_tokens: int) -> dict[str, Any]:
        prompt = body["prompt"]
        num_prompt_tokens = len(prompt) if isinstance(prompt, list) else 1 + len(prompt.split())
        usage: dict[str, Any] = {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_tokens + self.num_silent_tokens,
        }
        if self.num_cached_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.num_cached_tokens}
        return usage


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


@contextlib.contextmanager
def serving(server: StreamingServer) -> Iterator[StreamingServer]:
    """Serve on a free port of the loopback until the block ends."""
    config = uvicorn.Config(
        server.app(), port=0, log_level="critical", ws="none", lifespan="off", timeout_graceful_shutdown=1
    )
    http = uvicorn.Server(config)
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    while not http.started:
        assert thread.is_alive(), "the test server did not start"
        threading.Event().wait(0.005)
    server.url = f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        http.should_exit = True
        thread.join(timeout=10)
