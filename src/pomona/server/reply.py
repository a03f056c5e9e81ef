"""Answers that take long: produced while the connection is watched, cancelled when the client goes away."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_JSON_HEADERS: Final = ((b"content-type", b"application/json"),)
_EVENT_HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
DONE_EVENT: Final = b"data: [DONE]\n\n"


class Reply:
    """Sends one answer: either ``json`` once, or ``events`` any number of times and then ``end``.

    Args:
        send: through everything that surrounds the request; it sees how the answer starts.
        send_body: straight to the server, once the answer has started.
    """

    __slots__ = ("_send", "_send_body", "has_started")

    def __init__(self, send: Send, send_body: Send) -> None:
        self._send = send
        self._send_body = send_body
        self.has_started = False
        """True once the status line is out, so that an error can no longer change it."""

    async def json(self, body: bytes) -> None:
        """Send a whole JSON body."""
        length = (b"content-length", str(len(body)).encode())
        await self._start((*_JSON_HEADERS, length))
        await self._send_body({"type": "http.response.body", "body": body})

    async def events(self, data: bytes) -> None:
        """Send server-sent events, already framed; waits for a client that reads slowly."""
        if not self.has_started:
            await self._start(_EVENT_HEADERS)
        await self._send_body({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """End the stream of events."""
        await self._send_body({"type": "http.response.body", "body": DONE_EVENT})

    async def _start(self, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self.has_started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": list(headers)})


class WatchedResponse(Response):
    """A response made by ``produce``, which is cancelled when the client goes away.

    Errors that ``produce`` raises before it has sent anything get their normal answer.
    """

    def __init__(self, produce: Callable[[Reply], Coroutine[Any, Any, None]]) -> None:
        super().__init__()
        self._produce = produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run to the end of the answer or of the connection."""
        await run_until_disconnect(receive, self._produce(Reply(send, scope["state"]["send_body"])))


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``, but cancel it when the client goes away; its cleaning up is waited for."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        task.cancel()  # has no effect on a task that is done
        await asyncio.wait((task, watcher))
    with contextlib.suppress(asyncio.CancelledError):
        task.result()


async def _wait_for_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
