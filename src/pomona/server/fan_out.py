"""The engine requests behind one API request: started together, read as one stream, never left behind.

Where there is a ledger, what the engine counts is what it says: a request that ends early has a step under way, so its
line is closed only after the engine's last word on every choice.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from pomona.accounts.ledger import Entry
from pomona.core.errors import (
    EngineDiedError,
    EngineUnavailableError,
    InvalidRequestError,
    PomonaError,
    QueueFullError,
    RateLimitError,
)
from pomona.core.interfaces import EngineClient
from pomona.core.output import RequestOutput
from pomona.core.request import FinishReason, Request
from pomona.server.errors import RequestAbortedError, RequestFailedError
from pomona.server.metrics import AdapterSeries, RequestMeter

_Pump = asyncio.Task[None]
_REFUSALS = (QueueFullError, RateLimitError, InvalidRequestError)
"""Of the engine: what it did not admit."""


class FanOut:
    """Runs engine requests side by side. If one fails, or the block is left early, all others are aborted.

        async with FanOut(client, requests, series) as fan_out:
            async for index, output in fan_out: ...

    Args:
        client: the engine.
        requests: at least one.
        series: where their latencies and ends are counted.
        entry: the ledger's line of all of them together; closed here, once.
        is_prompt_only: nobody asked for output: the one token that the engine must make is not in the ledger.
    """

    def __init__(
        self,
        client: EngineClient,
        requests: Sequence[Request],
        series: AdapterSeries,
        entry: Entry | None = None,
        *,
        is_prompt_only: bool = False,
    ) -> None:
        assert requests, "nothing to run"
        self._entry = entry
        self._is_prompt_only = is_prompt_only
        self._client = client
        self._num_restarts = client.num_restarts
        self._requests = requests
        self._meters = [RequestMeter(series, len(request.prompt_token_ids), request.arrival_s) for request in requests]
        self._streams: list[AsyncIterator[RequestOutput]] = []
        self._num_over = 0
        """Streams whose terminal output has been counted."""
        self._pumps: list[_Pump] = []
        self._queue: asyncio.Queue[tuple[int, RequestOutput] | _Pump] = asyncio.Queue()
        self._outputs = self._run()

    async def __aenter__(self) -> Self:
        """Nothing is started before the first output is asked for."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort whatever has not ended, and write the ledger's line."""
        reason = FinishReason.FAIL if isinstance(error, EngineUnavailableError) else FinishReason.ABORT
        try:
            for index, meter in enumerate(self._meters):
                if not meter.timeline.is_ended:
                    await self._abort(index, None if isinstance(error, _REFUSALS) else reason)
            if self._entry is not None and self._num_over < len(self._streams):
                settling = asyncio.create_task(self._settle())
                try:
                    await asyncio.shield(settling)
                except asyncio.CancelledError:  # the client goes away just now
                    await settling
                    raise
        finally:
            await self._close()
            if self._entry is not None:
                self._entry.close(_outcome_of(error), time.monotonic())

    def __aiter__(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Outputs of all requests as they come, each with its request's index.

        Raises:
            QueueFullError, RateLimitError, InvalidRequestError: one was not admitted.
            EngineUnavailableError, RequestFailedError, RequestAbortedError: one ended without an answer.
        """
        return self._outputs

    async def finish(self, index: int) -> None:
        """End a request whose answer is complete: a stop string was found in it."""
        if not self._meters[index].timeline.is_ended:
            await self._abort(index, FinishReason.STOP)

    async def _abort(self, index: int, reason: FinishReason | None) -> None:
        self._meters[index].end(reason, time.monotonic())
        if index < len(self._streams):
            await self._client.abort(self._requests[index].request_id)

    async def _settle(self) -> None:
        """Count what the engine reports of requests until each has its terminal output, at most a step away."""
        if self._pumps:
            await asyncio.gather(*self._pumps, return_exceptions=True)
            while not self._queue.empty():
                item = self._queue.get_nowait()
                if not isinstance(item, asyncio.Task):
                    self._note(*item)
            return
        for index, stream in enumerate(self._streams):
            with contextlib.suppress(PomonaError):  # it was never admitted
                async for output in stream:
                    self._note(index, output)

    async def _close(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        await self._outputs.aclose()
        for stream in self._streams:
            aclose = getattr(stream, "aclose", None)  # iterators need not have one
            if aclose is not None:
                await aclose()

    async def _run(self) -> AsyncGenerator[tuple[int, RequestOutput]]:
        for request in self._requests:
            self._streams.append(self._client.submit(request))
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                self._note(0, output)
                yield 0, output
                if self._meters[0].timeline.is_ended:
                    return
            raise EngineUnavailableError("The engine ended the request without an answer.")
        for index in range(len(self._streams)):
            pump = asyncio.create_task(self._pump(index))
            pump.add_done_callback(self._queue.put_nowait)
            self._pumps.append(pump)
        while not all(meter.timeline.is_ended for meter in self._meters):
            item = await self._queue.get()
            if isinstance(item, asyncio.Task):
                if not item.cancelled():
                    item.result()  # raises what the pump raised
                continue
            index, output = item
            is_late = self._meters[index].timeline.is_ended
            self._note(index, output)
            if not is_late:
                yield index, output

    async def _pump(self, index: int) -> None:
        async for output in self._streams[index]:
            self._queue.put_nowait((index, output))
            if output.finish_reason is not None:
                return
        raise EngineUnavailableError("The engine ended the request without an answer.")

    def _note(self, index: int, output: RequestOutput) -> None:
        """Count an output, and end its choice with it unless that has ended already."""
        now_s = time.monotonic()
        meter = self._meters[index]
        meter.advance(output, now_s)
        if self._entry is not None:
            noted = replace(output, new_token_ids=()) if self._is_prompt_only else output
            self._entry.note(index, noted, now_s)
        if output.finish_reason is None:
            return
        self._num_over += 1
        if not meter.timeline.is_ended:
            meter.end(output.finish_reason, now_s)
            error = self._error_of(output)
            if error is not None:
                raise error

    def _error_of(self, output: RequestOutput) -> PomonaError | None:
        if output.finish_reason is FinishReason.ABORT:
            return RequestAbortedError("The request was ended by the operator.")
        if output.finish_reason is FinishReason.FAIL:
            message = output.error or "The engine failed."
            if self._client.state == "closed":
                return EngineUnavailableError(message)
            is_same_engine = self._client.is_ready and self._client.num_restarts == self._num_restarts
            return RequestFailedError(message) if is_same_engine else EngineDiedError(message)
        return None


def _outcome_of(error: BaseException | None) -> str:
    """Word an ending for the ledger."""
    if error is None:
        return "finish"
    if isinstance(error, _REFUSALS):
        return "reject"
    return "fail" if isinstance(error, EngineUnavailableError | RequestFailedError) else "abort"
