"""The two ends of the wire: a pair of connected Unix sockets; commands go down, reports come up, as frames.

Neither end ever waits for the other while the engine runs. What a slow client has not taken is joined per request and
sent later, so nothing is lost and memory is bounded by the tokens of accepted requests. The client's end is read by
the event loop itself. There is no thread between the ends: a step's report costs one system call on each side.
"""

import asyncio
import select
import socket
import time
from collections.abc import Callable

from pomona.core.output import EngineStats, RequestOutput
from pomona.driver.messages import (
    Command,
    Ended,
    Hello,
    Ready,
    Reply,
    Report,
    Shutdown,
    Starting,
    TurnReport,
    decode_command,
    decode_report,
    encode,
)
from pomona.driver.outputs import join_by_request

_LAST_WORDS_S = 1.0
"""How long an engine waits for a slow client to take a report that is not part of a turn."""
_MIN_OUTPUTS_TO_JOIN = 1024
_LENGTH_BYTES = 4
_READ_BYTES = 1 << 18


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Connected sockets for a ClientChannel and an EngineChannel."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


class _Frames:
    """Byte strings in both directions over a stream socket, each behind its length; nothing here ever waits."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._unsent = bytearray()
        self._arrived = bytearray()
        self.is_over = False
        """The other end is closed. What it sent before can still be received; what is sent to it is dropped."""

    @property
    def has_unsent(self) -> bool:
        """True while the socket has not taken all that was sent."""
        return bool(self._unsent)

    def send(self, frame: bytes) -> None:
        """Send a frame, or what the socket takes of it now; ``flush`` sends the rest."""
        self._unsent += len(frame).to_bytes(_LENGTH_BYTES, "little")
        self._unsent += frame
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes."""
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self.is_over = True
            self._unsent.clear()

    def receive(self) -> list[bytes]:
        """The frames that have arrived, in order; maybe not all, if there are many."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.is_over = self.is_over or not data
        arrived = self._arrived
        arrived += data
        frames, start = [], 0
        while len(arrived) >= start + _LENGTH_BYTES:
            begin = start + _LENGTH_BYTES
            end = begin + int.from_bytes(arrived[start:begin], "little")
            if len(arrived) < end:
                break
            frames.append(bytes(arrived[begin:end]))
            start = end
        del arrived[:start]
        return frames


class EngineChannel:
    """The engine's end. Used by one thread."""

    def __init__(self, end: socket.socket) -> None:
        """Take over a socket of ``socket_pair``."""
        self._socket = end
        self._frames = _Frames(end)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(end, select.POLLIN)
        self._writable.register(end, select.POLLOUT)
        self._num_commands = 0
        self._num_commands_told = 0
        self._outputs: list[RequestOutput] = []
        self._replies: list[Reply] = []
        self._join_at = _MIN_OUTPUTS_TO_JOIN

    @property
    def has_unsent(self) -> bool:
        """True when the client was too slow to take the last turn's report."""
        has_news = self._outputs or self._replies or self._num_commands != self._num_commands_told
        return bool(has_news) or self._frames.has_unsent

    def receive(self, timeout_s: float | None) -> list[Command]:
        """Commands that have arrived, in order; waits for the first up to ``timeout_s`` (0: not at all, None: ever).

        When the client is gone, that is a Shutdown.
        """
        if timeout_s != 0:
            self._readable.poll(None if timeout_s is None else timeout_s * 1000)
        commands = [decode_command(frame) for frame in self._frames.receive()]
        self._num_commands += len(commands)
        if self._frames.is_over and not commands:
            return [Shutdown()]
        return commands

    def tell(self, report: Hello | Starting | Ready | Ended) -> None:
        """Send a report that is not part of a turn; waits a moment for a slow client."""
        self._frames.send(encode(report))
        give_up_s = time.monotonic() + _LAST_WORDS_S
        while self._frames.has_unsent and time.monotonic() < give_up_s:
            self._writable.poll(_LAST_WORDS_S * 1000)
            self._frames.flush()

    def tell_turn(self, outputs: list[RequestOutput], replies: list[Reply], stats: EngineStats) -> None:
        """Send what a turn brought, if anything, with what could not be sent before; never blocks."""
        is_behind = bool(self._outputs or self._replies)
        self._outputs.extend(outputs)
        self._replies.extend(replies)
        if not self.has_unsent:
            return
        self._frames.flush()
        if self._frames.has_unsent:
            if len(self._outputs) >= self._join_at:
                self._outputs = join_by_request(self._outputs)
                self._join_at = max(_MIN_OUTPUTS_TO_JOIN, 2 * len(self._outputs))
            return
        if self._outputs or self._replies or self._num_commands != self._num_commands_told:
            joined = join_by_request(self._outputs) if is_behind else self._outputs
            self._frames.send(encode(TurnReport(self._num_commands, stats, joined, self._replies)))
            self._outputs, self._replies = [], []
            self._num_commands_told = self._num_commands

    def close(self) -> None:
        """Close the socket; what was sent can still be read at the other end."""
        self._socket.close()


class ClientChannel:
    """The client's end. Used by the thread of the event loop in which it was built."""

    def __init__(self, end: socket.socket, on_report: Callable[[Report], None]) -> None:
        """Take over a socket of ``socket_pair``; the running event loop hands every report to ``on_report``."""
        self.num_sent = 0
        """Commands sent since the channel was opened."""
        self._on_report = on_report
        self._socket = end
        self._frames = _Frames(end)
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(end, self.read)

    def send(self, command: Command) -> bool:
        """Send a command, later if the engine is behind; False when the engine is gone."""
        if self._is_closed or self._frames.is_over:
            return False
        self._frames.send(encode(command))
        if self._frames.has_unsent:
            self._loop.add_writer(self._socket, self._flush)
        if self._frames.is_over:
            return False
        self.num_sent += 1
        return True

    def read(self) -> None:
        """Take reports that have arrived; the last one after the engine is gone."""
        if self._is_closed:
            return
        for frame in self._frames.receive():
            self._on_report(decode_report(frame))
            if self._is_closed:
                return
        if self._frames.is_over:
            self._loop.remove_reader(self._socket)

    def _flush(self) -> None:
        self._frames.flush()
        if not self._frames.has_unsent:
            self._loop.remove_writer(self._socket)

    def close(self) -> None:
        """Close the socket; commands not yet taken are dropped. May be called twice."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
