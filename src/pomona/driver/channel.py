"""The two ends of the wire: PUSH/PULL sockets, one pair for commands and one for reports, over ipc:// or inproc://.

The engine's end never blocks while the engine runs: what a slow client has not taken is joined per request and sent
later, so nothing is lost and memory is bounded by the tokens of accepted requests. The client's end is read by the
event loop itself: a callback on the socket's file descriptor drains it. That costs neither the thread switch of a
reader thread nor the future and task switch per message of zmq.asyncio.
"""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import zmq

from pomona.core.output import EngineStats, RequestOutput
from pomona.driver.messages import (
    Command,
    Ended,
    Hello,
    Ready,
    Reply,
    Report,
    Starting,
    TurnReport,
    decode_command,
    decode_report,
    encode,
)
from pomona.driver.outputs import join_by_request

_MAX_COMMANDS_PER_TURN = 256
_LAST_WORDS_MS = 1000
"""How long an engine that ends waits for its last reports to leave."""
_MIN_OUTPUTS_TO_JOIN = 1024


class Address(NamedTuple):
    """zmq endpoints of one engine's life; the client binds, the engine connects."""

    commands: str
    reports: str

    @classmethod
    def in_directory(cls, directory: str) -> "Address":
        """Unix sockets in a private directory."""
        return cls(f"ipc://{directory}/commands", f"ipc://{directory}/reports")


class EngineChannel:
    """The engine's end. Used by one thread."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: Address, max_queued_reports: int) -> None:
        """Connect both sockets."""
        self._commands = context.socket(zmq.PULL)
        self._commands.connect(address.commands)
        self._reports = context.socket(zmq.PUSH)
        self._reports.set_hwm(max_queued_reports)
        self._reports.setsockopt(zmq.SNDTIMEO, _LAST_WORDS_MS)
        self._reports.connect(address.reports)
        self._num_commands = 0
        self._num_commands_told = 0
        self._outputs: list[RequestOutput] = []
        self._replies: list[Reply] = []
        self._join_at = _MIN_OUTPUTS_TO_JOIN

    @property
    def has_unsent(self) -> bool:
        """True when the client was too slow to take the last turn's report."""
        return bool(self._outputs or self._replies or self._num_commands != self._num_commands_told)

    def receive(self, timeout_s: float | None) -> list[Command]:
        """Commands that have arrived, in order; waits for the first up to ``timeout_s`` (0: not at all, None: ever)."""
        if timeout_s != 0 and not self._commands.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return []
        commands: list[Command] = []
        while len(commands) < _MAX_COMMANDS_PER_TURN:
            try:
                commands.append(decode_command(self._commands.recv(zmq.NOBLOCK)))
            except zmq.Again:
                break
        self._num_commands += len(commands)
        return commands

    def tell(self, report: Hello | Starting | Ready | Ended) -> None:
        """Send a report that is not part of a turn; waits a moment for a slow client, then drops it."""
        try:
            self._reports.send(encode(report))
        except zmq.Again:
            # Nobody listens: a client that is gone, or one that will see this process end.
            return

    def tell_turn(self, outputs: list[RequestOutput], replies: list[Reply], stats: EngineStats) -> None:
        """Send what a turn brought, if anything, with what could not be sent before; never blocks."""
        is_behind = bool(self._outputs or self._replies)
        self._outputs.extend(outputs)
        self._replies.extend(replies)
        if not self.has_unsent:
            return
        if is_behind and not self._reports.poll(0, zmq.POLLOUT):
            if len(self._outputs) >= self._join_at:
                self._outputs = join_by_request(self._outputs)
                self._join_at = max(_MIN_OUTPUTS_TO_JOIN, 2 * len(self._outputs))
            return
        joined = join_by_request(self._outputs) if is_behind else self._outputs
        try:
            self._reports.send(encode(TurnReport(self._num_commands, stats, joined, self._replies)), zmq.NOBLOCK)
        except zmq.Again:
            return
        self._outputs, self._replies = [], []
        self._num_commands_told = self._num_commands

    def close(self) -> None:
        """Close both sockets; reports already sent still leave."""
        self._commands.close(linger=0)
        self._reports.close(linger=_LAST_WORDS_MS)


class ClientChannel:
    """The client's end. Used by the thread of the event loop in which it was built."""

    def __init__(
        self,
        context: "zmq.Context[zmq.Socket[bytes]]",
        address: Address,
        max_queued_reports: int,
        on_report: Callable[[Report], None],
    ) -> None:
        """Bind both sockets and have the running event loop hand every report to ``on_report``."""
        self.num_sent = 0
        """Commands sent since the channel was opened."""
        self._on_report = on_report
        # No limit of its own: the client bounds the commands that wait for an answer.
        self._commands = context.socket(zmq.PUSH)
        self._commands.set_hwm(0)
        self._commands.bind(address.commands)
        self._reports = context.socket(zmq.PULL)
        self._reports.set_hwm(max_queued_reports)
        self._reports.bind(address.reports)
        self._loop = asyncio.get_running_loop()
        self._reports_fd = self._reports.fileno()
        self._loop.add_reader(self._reports_fd, self.read)

    def send(self, command: Command, wait_ms: int = 0) -> bool:
        """Send a command; False when nobody is connected (after ``wait_ms``)."""
        if self._commands.closed or (wait_ms and not self._commands.poll(wait_ms, zmq.POLLOUT)):
            return False
        try:
            self._commands.send(encode(command), zmq.NOBLOCK)
        except zmq.Again:
            return False
        self.num_sent += 1
        return True

    def read(self) -> None:
        """Take every report that has arrived. The descriptor signals edges: read on until nothing is left."""
        while not self._reports.closed:
            try:
                frame = self._reports.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_report(decode_report(frame))

    def close(self) -> None:
        """Close both sockets; commands not yet taken are dropped. May be called twice."""
        if not self._reports.closed:
            self._loop.remove_reader(self._reports_fd)
            self._reports.close(linger=0)
            self._commands.close(linger=0)
