"""Connections that take nothing for granted: who is slow, silent or endless is let go of, and others notice nothing.

uvicorn's HTTP protocol with limits on the size of a request's head, on the time for it and for its body, on a client
that does not read its answer, and on the number of connections.
"""

import asyncio
import functools
import re
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_TIMEOUT: Final = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_LARGE: Final = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_HEAD_END: Final = b"\r\n\r\n"
_UPGRADE: Final = re.compile(rb"\r\nupgrade(?=:)", re.IGNORECASE)
_UNDECIDED: Final = re.compile(rb"\r(\n(\r|u(p(g(r(a(de?)?)?)?)?)?)?)?\Z", re.IGNORECASE)
"""The end of a piece of a head that may become, with the next one, the head's own end or such a line."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a connection may take."""

    max_head_bytes: int = 64 * 1024
    """Request line and headers."""
    head_timeout_s: float = 10.0
    """For the head, from its first byte or, on a new connection, from its opening; empty lines before it count."""
    body_timeout_s: float = 30.0
    """For every further ``body_chunk_bytes`` of a body, and for its rest."""
    body_chunk_bytes: int = 64 * 1024
    write_timeout_s: float = 60.0
    """For a client that has stopped reading its answer."""
    max_connections: int = 10_000


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Where the client is slow it is closed; the application sees that the client went away."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    _read_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _num_head_bytes = 0
    _num_parsed_bytes = 0
    _num_body_bytes = 0
    _is_in_head = True
    _has_begun = False
    """A byte of a request has come."""
    _undecided = b""
    """Of the head, and not parsed yet."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._unanswered: deque[RequestResponseCycle] = deque()
        # The clock of a client that does not read runs from the first byte that waits: also of one that is closed.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self.limits.max_connections:
            transport.abort()
            return
        self._expect(self.limits.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        self._expect(None)
        self._stop_write_timer()
        super().connection_lost(exc)
        # uvicorn tells the latest request; the one that is being answered may be before it.
        for cycle in self._unanswered:
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """Count what belongs to the head, and take no offer of another protocol (Java's client makes one with every
        request): the parser would take the body for a request in that.
        """
        if self._is_in_head:
            self._num_head_bytes += len(data)
            data = self._receive_heads(self._undecided + data)
        if data:
            super().data_received(data)
        if self._read_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._expect(self.limits.head_timeout_s)  # empty lines, which begin no head
        if self._is_in_head and self._num_head_bytes > self.limits.max_head_bytes:
            self._refuse(_TOO_LARGE)

    def _receive_heads(self, data: bytes) -> bytes:
        """Parse heads, however many pieces they come in; returns what follows them, a body."""
        self._undecided = b""
        while data and self._is_in_head and not self.transport.is_closing():
            head, end, data = data.partition(_HEAD_END)
            if not end and (undecided := _UNDECIDED.search(head)) is not None:
                head, self._undecided = head[: undecided.start()], undecided[0]
            super().data_received(_UPGRADE.sub(b"\r\nignored", head) + end)
        return b"" if self.transport.is_closing() else data

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._has_begun = True
        self._num_body_bytes = self._num_parsed_bytes = 0
        self._expect(self.limits.head_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Refuse a head that is too large, also if it came in one piece."""
        self._num_parsed_bytes += len(name) + len(value)
        if self._num_parsed_bytes > self.limits.max_head_bytes:
            raise ValueError("the head is too large")  # the parser hands it on to ``send_400_response``
        super().on_header(name, value)

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with a request that cannot be parsed."""
        if self._num_parsed_bytes > self.limits.max_head_bytes:
            self._refuse(_TOO_LARGE)
        else:
            super().send_400_response(msg)

    def on_headers_complete(self) -> None:
        """The body follows, if there is one."""
        self._is_in_head = False
        self._expect(self.limits.body_timeout_s)
        super().on_headers_complete()
        while self._unanswered and self._unanswered[0].response_complete:
            self._unanswered.popleft()
        self._unanswered.append(self.cycle)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        is_old = cycle.scope["http_version"] == "1.0"
        super()._start_asgi_task(cycle, functools.partial(_answer_without_chunks, app, cycle) if is_old else app)

    def on_body(self, body: bytes) -> None:
        """Give a client that goes on sending more time."""
        self._num_body_bytes += len(body)
        if self._num_body_bytes >= self.limits.body_chunk_bytes:
            self._num_body_bytes = 0
            self._expect(self.limits.body_timeout_s)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is here; what follows is the next one's head."""
        self._is_in_head, self._num_head_bytes = True, 0
        self._expect(None)
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client has stopped reading."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        self._stop_write_timer()
        super().resume_writing()

    def _expect(self, seconds: float | None) -> None:
        """Close the connection unless something else is expected within so many seconds."""
        if self._read_timer is not None:
            self._read_timer.cancel()
        self._read_timer = None if seconds is None else self.loop.call_later(seconds, self._time_out)

    def _time_out(self) -> None:
        if self.flow.read_paused:  # it is the application that is slow
            self._expect(self.limits.body_timeout_s)
        else:
            is_answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
            self._refuse(b"" if is_answering or not self._has_begun else _TIMEOUT)

    def _refuse(self, answer: bytes) -> None:
        self._expect(None)
        if not self.transport.is_closing():
            if answer:
                self.transport.write(answer)
            self.transport.close()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


async def _answer_without_chunks(
    app: Any, cycle: RequestResponseCycle, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run the application for a client of HTTP/1.0: an answer without a length ends with the connection."""
    has_length = True

    async def send_on(message: Message) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not has_length:
                cycle.chunked_encoding = False
        elif not has_length:
            cycle.expected_content_length = len(message.get("body", b""))  # what uvicorn holds it against
        await send(message)

    await app(scope, receive, send_on)
