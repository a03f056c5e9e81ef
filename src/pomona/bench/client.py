"""One OpenAI-compatible server, seen from the load generator.

aiohttp, not httpx: its HTTP parser is compiled, httpx's is not, and reading many small chunks is all a load generator
does; what the client burns, a server on the same machine lacks. Every report states the client's own CPU time per
event, so that the cost is seen.
"""

import asyncio
import json
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import aiohttp
import msgspec

from pomona.bench.events import DONE, EventSplitter, Usage, decode_event
from pomona.core.errors import ConfigError

# Below common servers' own limit (5 s), so that a request never meets a connection the server is just closing.
_KEEPALIVE_S = 2.0
_MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One entry of /v1/models. Adapters have a parent, their base model."""

    name: str
    parent: str | None


@dataclass(frozen=True, slots=True)
class StreamOutcome:
    """What came back for one request; times are ``time.perf_counter`` seconds."""

    sent_s: float
    """When the request's head was written to the connection."""
    ended_s: float
    token_times_s: tuple[float, ...] = ()
    """When each event that brought a token was read. Tokens that a server sends together share one event."""
    finished_s: float | None = None
    """When the event that ended the answer was read."""
    usage: Usage | None = None
    finish_reason: str | None = None
    error: str | None = None
    """Kind: http_STATUS, connect, disconnect, timeout, stream_error, bad_event, incomplete or no_usage."""
    error_message: str = ""


class ServerClient:
    """Speaks to one server. Use as an async context manager.

    Args:
        base_url: its root, without ``/v1``.
        api_key: sent as a bearer token.
        request_timeout_s: a request that takes longer fails with kind ``timeout``.
    """

    def __init__(self, base_url: str, api_key: str | None, request_timeout_s: float) -> None:
        """Nothing is sent yet."""
        self._base_url = base_url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def __aenter__(self) -> "ServerClient":
        """Open the connection pool, without a limit: an open loop never waits for a connection."""
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(_stamp_sent)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=self._timeout,
            headers=self._headers,
            trace_configs=[trace],
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close every connection; requests in flight are cancelled by their tasks."""
        await self._session.close()

    async def list_models(self) -> tuple[ServedModel, ...]:
        """Return what /v1/models lists, in its order.

        Raises:
            ConfigError: the server cannot be reached, refuses, or answers something else.
        """
        url = f"{self._base_url}/v1/models"
        try:
            async with self._session.get(url) as response:
                body = await response.read()
                if response.status != 200:
                    raise ConfigError(f"base_url: {url} answered {response.status}: {_error_message(body)}")
                entries = json.loads(body)["data"]
                return tuple(ServedModel(entry["id"], entry.get("parent")) for entry in entries)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConfigError(f"base_url: no answer from {url}: {_describe(error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"base_url: {url} does not answer like OpenAI's API") from error

    async def open_connections(self, num_connections: int) -> None:
        """Open so many connections now and leave them idle, so that a burst of requests need not.

        Nothing is lost if it fails: requests open what they lack.
        """

        async def touch() -> None:
            async with self._session.get(f"{self._base_url}/v1/models") as response:
                await response.read()

        await asyncio.gather(*(touch() for _ in range(num_connections)), return_exceptions=True)

    async def tokenize(self, model: str, text: str) -> list[int] | None:
        """Return the text's token ids, or None if the server has no /tokenize of a known form."""
        for body in ({"model": model, "prompt": text}, {"content": text}):
            try:
                async with self._session.post(f"{self._base_url}/tokenize", data=json.dumps(body)) as response:
                    if response.status != 200:
                        continue
                    tokens = json.loads(await response.read())["tokens"]
                    if all(isinstance(token, int) for token in tokens):
                        return list(tokens)
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
                continue
        return None

    async def stream_completion(self, body: bytes) -> StreamOutcome:
        """POST ``body`` to /v1/completions and read the stream to its end. Failures are outcomes, never raised."""
        started_s = time.perf_counter()
        context = SimpleNamespace(sent_s=None)
        reading = _StreamReading()
        error, message = None, ""
        try:
            async with self._session.post(
                f"{self._base_url}/v1/completions", data=body, trace_request_ctx=context, allow_redirects=False
            ) as response:
                if response.status == 200:
                    async for chunk in response.content.iter_any():
                        reading.feed(chunk, time.perf_counter())
                else:
                    error, message = f"http_{response.status}", _error_message(await response.read())
        except TimeoutError:
            error, message = "timeout", f"no complete answer within {self._timeout.total} s"
        except aiohttp.ClientConnectorError as failure:
            error, message = "connect", _describe(failure)
        except (aiohttp.ClientError, OSError) as failure:
            error, message = "disconnect", _describe(failure)
        except msgspec.DecodeError as failure:
            error, message = "bad_event", str(failure)
        outcome = reading.outcome(context.sent_s or started_s, time.perf_counter())
        return outcome if error is None else replace(outcome, error=error, error_message=message)


class _StreamReading:
    """Collects one stream's events as they are read."""

    def __init__(self) -> None:
        self._splitter = EventSplitter()
        self._token_times_s: list[float] = []
        self._usage: Usage | None = None
        self._finish_reason: str | None = None
        self._finished_s: float | None = None
        self._is_finish_bare = False
        self._error: Any = None

    def feed(self, chunk: bytes, now_s: float) -> None:
        """Take in bytes that were read at ``now_s``."""
        for payload in self._splitter.feed(chunk):
            if payload == DONE:
                continue
            event = decode_event(payload)
            self._usage = event.usage or self._usage
            self._error = event.error or self._error
            if event.is_token:
                self._token_times_s.append(now_s)
            if event.finish_reason:
                self._finish_reason, self._finished_s = event.finish_reason, now_s
                self._is_finish_bare = not event.is_token

    def outcome(self, sent_s: float, ended_s: float) -> StreamOutcome:
        """Judge what was read, as if the connection ended in good order."""
        token_times_s = tuple(self._token_times_s)
        finished_s, usage = self._finished_s, self._usage
        if finished_s and self._is_finish_bare and usage and usage.completion_tokens == len(token_times_s) + 1:
            # A token without text (the end of the sequence) came with the event that ended the answer.
            token_times_s = (*token_times_s, finished_s)
        error, message = None, ""
        if self._error is not None:
            error, message = "stream_error", _error_text(self._error)
        elif self._finish_reason is None:
            error, message = "incomplete", "the stream ended without a finish reason"
        elif self._usage is None:
            error, message = "no_usage", "the server did not send usage although asked to"
        reason = self._finish_reason
        return StreamOutcome(sent_s, ended_s, token_times_s, finished_s, usage, reason, error, message)


async def _stamp_sent(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
    del session, params
    if context.trace_request_ctx is not None:
        context.trace_request_ctx.sent_s = time.perf_counter()


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _error_text(error: Any) -> str:
    text = error.get("message", error) if isinstance(error, dict) else error
    return str(text)[:_MAX_ERROR_CHARS]


def _error_message(body: bytes) -> str:
    """The message of an OpenAI-style error body, or the beginning of whatever it is."""
    try:
        answer = json.loads(body)
    except ValueError:
        return body[:_MAX_ERROR_CHARS].decode(errors="replace")
    if isinstance(answer, dict):
        return _error_text(answer.get("error") or answer.get("detail") or answer)
    return _error_text(answer)
