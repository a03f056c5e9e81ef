"""Many streamed completions read at the least cost: one epoll loop over plain sockets, in the caller's thread (Linux).

What the client burns, a server on the same machine lacks, so a read is a timestamp and an append; HTTP and JSON are
taken apart after the last byte.
"""

import itertools
import re
import select
import socket
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from pomona.bench.events import DONE, EventSplitter, decode_event

_READ_BYTES = 65536
_REQUEST_ID = re.compile(rb"\r\nx-request-id: *(\w+)\r\n", re.IGNORECASE)
_Mark = TypeVar("_Mark")


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """One stream as the client saw it; times are seconds on the monotonic clock."""

    request_id: str
    """The server's, from its header."""
    token_times_s: tuple[float, ...]
    """When each event with a token was read. Tokens that come together share one event."""
    num_output_tokens: int
    """By the server's own count."""


@dataclass(slots=True)
class _Stream:
    """One connection: what was read, and when."""

    connection: socket.socket
    pieces: list[bytes] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LoadRecord(Generic[_Mark]):
    """All streams of one load. In the steady part every stream is under way: from when the last one has begun until
    the first one ends."""

    streams: tuple[StreamRecord, ...]
    steady: tuple[_Mark, _Mark]
    """Marks taken at its two ends."""
    steady_s: tuple[float, float]
    client_cpu_s: float
    wall_s: float
    """From the first request sent to the last byte read."""


def load(url: str, bodies: Sequence[bytes], mark: Callable[[], _Mark]) -> LoadRecord[_Mark]:
    """POST every body to /v1/completions at once, each on a connection of its own, and read all answers to the end.

    Args:
        url: the server's root.
        bodies: JSON of streaming requests that ask for usage.
        mark: called at both ends of the steady part.

    Raises:
        RuntimeError: a stream was refused or broke off: the others had more of the machine than they should.
    """
    address = urlsplit(url)
    streams = [_Stream(socket.create_connection((address.hostname, address.port))) for _ in bodies]
    poll = select.epoll()
    by_fd = {stream.connection.fileno(): stream for stream in streams}
    cpu_s, start_s = time.process_time(), time.monotonic()
    try:
        for stream, body in zip(streams, bodies, strict=True):
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
            stream.connection.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            stream.connection.setblocking(False)
            poll.register(stream.connection.fileno(), select.EPOLLIN)
        marks = list(_read(poll, by_fd, mark))
        wall_s = time.monotonic() - start_s
        cpu_s = time.process_time() - cpu_s
    finally:
        poll.close()
        for stream in streams:
            stream.connection.close()
    records = [_record(stream) for stream in streams]
    whole = tuple(record for record in records if record is not None)
    if len(whole) < len(records):
        begun = b"".join(streams[records.index(None)].pieces)[:500].decode(errors="replace")
        raise RuntimeError(f"{len(records) - len(whole)} of {len(records)} streams failed; the first:\n{begun}")
    (begin_s, begin), (end_s, end) = marks
    return LoadRecord(whole, (begin, end), (begin_s, end_s), cpu_s, wall_s)


def _read(poll: select.epoll, by_fd: dict[int, _Stream], mark: Callable[[], _Mark]) -> Iterator[tuple[float, _Mark]]:
    """Read until every stream has ended; yields the marks of the steady part."""
    num_open, num_silent, num_marks = len(by_fd), len(by_fd), 0
    while num_open:
        for fd, _ in poll.poll():
            stream = by_fd[fd]
            data = stream.connection.recv(_READ_BYTES)
            stream.times_s.append(time.monotonic())
            stream.pieces.append(data)
            if data and len(stream.pieces) > 1:
                continue
            num_silent -= len(stream.pieces) == 1
            if not data:
                poll.unregister(fd)
                num_open -= 1
            is_due = num_silent == 0 if num_marks == 0 else not data
            if is_due and num_marks < 2:
                num_marks += 1
                yield time.monotonic(), mark()
    assert num_marks == 2, "some stream ended before the last one began: ask for more tokens"


def _record(stream: _Stream) -> StreamRecord | None:
    """Take one answer apart; None if it is not a whole stream."""
    raw = b"".join(stream.pieces)
    head, _, _ = raw.partition(b"\r\n\r\n")
    found = _REQUEST_ID.search(head + b"\r\n")
    if not head.startswith(b"HTTP/1.1 200") or found is None:
        return None
    splitter = EventSplitter()
    token_times_s: list[float] = []
    num_output_tokens = 0
    ends = list(itertools.accumulate(map(len, stream.pieces)))
    for payload, end in _chunks(raw, len(head) + 4):
        time_s = stream.times_s[bisect_left(ends, end)]
        for data in splitter.feed(payload):
            if data == DONE:
                return StreamRecord(found[1].decode(), tuple(token_times_s), num_output_tokens)
            event = decode_event(data)
            if event.is_token:
                token_times_s.append(time_s)
            if event.usage is not None:
                num_output_tokens = event.usage.completion_tokens
    return None


def _chunks(raw: bytes, start: int) -> Iterator[tuple[bytes, int]]:
    """Chunks of a chunked body (RFC 9112, section 7.1), each with the offset of its last byte's end."""
    while True:
        line_end = raw.find(b"\r\n", start)
        size = int(raw[start:line_end], 16) if line_end > start else 0
        if not size:
            return
        begin = line_end + 2
        yield raw[begin : begin + size], begin + size
        start = begin + size + 2
