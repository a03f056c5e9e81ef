"""One life of an engine as its client sees it: requests in flight, calls in flight.

Used on the event loop's thread only. Knows neither processes nor restarts: when the life ends, ``end`` is called and
everything in flight gets its answer.
"""

import asyncio
import logging
from typing import Any, Self

from pomona.core.adapter import AdapterInfo
from pomona.core.errors import EngineUnavailableError, PomonaError, QueueFullError
from pomona.core.ids import AdapterId, RequestId
from pomona.core.output import EngineStats, RequestOutput
from pomona.core.request import FinishReason, Request
from pomona.driver.channel import ClientChannel
from pomona.driver.messages import (
    Abort,
    AdapterLoaded,
    AdapterUnloaded,
    AskResident,
    CallFailed,
    Command,
    LoadAdapter,
    Ping,
    Rejection,
    Reply,
    ResidentAdapters,
    Submit,
    TurnReport,
    UnloadAdapter,
    unpack_error,
)
from pomona.driver.outputs import join_outputs

_LOGGER = logging.getLogger(__name__)


class _Inbox:
    """What has arrived for one request and was not read yet: at most its own ``max_tokens`` tokens."""

    __slots__ = ("error", "is_over", "outputs", "waiter")

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self.error: PomonaError | None = None
        self.is_over = False
        """The terminal output or the rejection has arrived, or the reader has closed the stream."""
        self.waiter: asyncio.Future[None] | None = None

    def put(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        self.is_over = output.finish_reason is not None
        self.wake()

    def reject(self, error: PomonaError) -> None:
        self.error = error
        self.is_over = True
        self.wake()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class RequestStream:
    """Outputs of one request, for one reader. What arrived since the last read comes as one output.

    Ending early (``aclose``, or dropping the last reference) aborts the request. A read that was cancelled can be made
    again: nothing is lost, so that whoever counts may ``abort`` and read on to the terminal output.
    """

    def __init__(self, session: "EngineSession", request_id: RequestId, inbox: _Inbox) -> None:
        """Read from ``inbox``, which the session fills."""
        self._session = session
        self._request_id = request_id
        self._inbox = inbox

    def __aiter__(self) -> Self:
        """Itself: a stream is read once."""
        return self

    async def __anext__(self) -> RequestOutput:
        """The news since the last read.

        Raises:
            PomonaError: the request was rejected; nothing was admitted.
            StopAsyncIteration: the terminal output was read, or the stream was closed.
        """
        inbox = self._inbox
        while not inbox.outputs:
            if inbox.error is not None:
                error, inbox.error = inbox.error, None
                raise error
            if inbox.is_over:
                raise StopAsyncIteration
            assert inbox.waiter is None, f"two readers of request {self._request_id}"
            inbox.waiter = asyncio.get_running_loop().create_future()
            try:
                await inbox.waiter
            finally:
                inbox.waiter = None
        outputs, inbox.outputs = inbox.outputs, []
        return join_outputs(outputs)

    def close(self) -> None:
        """Read no more, and abort the request if it has not ended. May be called twice."""
        inbox = self._inbox
        inbox.outputs = []
        if not inbox.is_over:
            inbox.is_over = True
            self._session.forget(self._request_id)
            inbox.wake()

    async def aclose(self) -> None:
        """``close``, under the name that ``contextlib.aclosing`` calls."""
        self.close()

    def __del__(self) -> None:
        """A reader that is gone cannot close: abort for it."""
        if not self._inbox.is_over:
            self._session.close_soon(self)


class EngineSession:
    """Requests and calls in flight over one channel.

    Args:
        channel: the connected channel; its reports of turns come to ``on_turn``.
        max_unanswered_commands: more commands than these may not wait for the engine.
    """

    def __init__(self, channel: ClientChannel, max_unanswered_commands: int) -> None:
        """Start with nothing in flight."""
        self.stats = EngineStats()
        """The latest snapshot received."""
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._max_unanswered_commands = max_unanswered_commands
        self._num_answered = channel.num_sent
        self._inboxes: dict[RequestId, _Inbox] = {}
        self._next_call_id = 0
        self._calls: dict[int, asyncio.Future[Any]] = {}
        """Loads, unloads and questions that have no answer yet."""
        self._end_reason: str | None = None

    @property
    def num_unanswered(self) -> int:
        """Commands that the engine has not said it has handled."""
        return self._channel.num_sent - self._num_answered

    def submit(self, request: Request) -> RequestStream:
        """Send a request and return its stream; see EngineClient.submit."""
        assert request.request_id not in self._inboxes, f"request id {request.request_id} is in flight"
        if self.num_unanswered >= self._max_unanswered_commands:
            raise QueueFullError(
                f"{self.num_unanswered} commands wait for the engine, the limit is {self._max_unanswered_commands}"
            )
        self._send(Submit(request))
        inbox = self._inboxes[request.request_id] = _Inbox()
        return RequestStream(self, request.request_id, inbox)

    def abort(self, request_id: RequestId) -> None:
        """Ask the engine to end a request; its stream then gets the terminal output."""
        if request_id in self._inboxes:
            self._channel.send(Abort(request_id))

    def forget(self, request_id: RequestId) -> None:
        """Abort a request that nobody reads any more."""
        self.abort(request_id)
        self._inboxes.pop(request_id, None)

    def close_soon(self, stream: RequestStream) -> None:
        """Close a stream that was dropped, from whatever thread collected it."""
        if self._end_reason is None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(stream.close)

    async def load_adapter(self, path: str) -> AdapterInfo:
        """See EngineClient.load_adapter. If the caller is cancelled the load goes on."""
        info: AdapterInfo = await self._call(LoadAdapter(self._new_call_id(), path))
        return info

    async def unload_adapter(self, adapter_id: AdapterId) -> None:
        """See EngineClient.unload_adapter."""
        await self._call(UnloadAdapter(self._new_call_id(), adapter_id))

    async def resident_adapters(self) -> frozenset[AdapterId]:
        """See EngineClient.resident_adapters."""
        adapter_ids: frozenset[AdapterId] = await self._call(AskResident(self._new_call_id()))
        return adapter_ids

    def ping(self) -> None:
        """Make the engine answer."""
        self._channel.send(Ping())

    def on_turn(self, turn: TurnReport) -> None:
        """Hand out what a turn brought."""
        if self._end_reason is not None:
            return
        self.stats = turn.stats
        self._num_answered = turn.num_commands
        for output in turn.outputs:
            inbox = self._inboxes.get(output.request_id)
            if inbox is not None:
                inbox.put(output)
                if inbox.is_over:
                    del self._inboxes[output.request_id]
        for reply in turn.replies:
            self._on_reply(reply)

    def end(self, error: EngineUnavailableError) -> None:
        """The engine is gone: requests in flight get FinishReason.FAIL with the error's text, calls the error."""
        if self._end_reason is not None:
            return
        self._end_reason = reason = str(error)
        self.stats = EngineStats()
        for request_id, inbox in self._inboxes.items():
            inbox.put(RequestOutput(request_id, finish_reason=FinishReason.FAIL, error=reason))
        self._inboxes.clear()
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)
        self._calls.clear()

    def _send(self, command: Command) -> None:
        if self._end_reason is not None or not self._channel.send(command):
            raise EngineUnavailableError(self._end_reason or "the engine's process is gone")

    async def _call(self, command: LoadAdapter | UnloadAdapter | AskResident) -> Any:
        self._send(command)
        call = self._calls[command.call_id] = self._loop.create_future()
        return await call

    def _new_call_id(self) -> int:
        self._next_call_id += 1
        return self._next_call_id

    def _on_reply(self, reply: Reply) -> None:
        match reply:
            case Rejection(request_id, error):
                inbox = self._inboxes.pop(request_id, None)
                if inbox is not None:
                    inbox.reject(unpack_error(error))
            case AdapterLoaded(call_id, info):
                self._answer(call_id, info)
            case AdapterUnloaded(call_id):
                self._answer(call_id, None)
            case ResidentAdapters(call_id, adapter_ids):
                self._answer(call_id, frozenset(adapter_ids))
            case CallFailed(call_id, error):
                call = self._calls.pop(call_id)
                if not call.done():
                    call.set_exception(unpack_error(error))

    def _answer(self, call_id: int, result: object) -> None:
        call = self._calls.pop(call_id)
        if not call.done():
            call.set_result(result)
