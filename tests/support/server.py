"""The whole server over a real engine and client, with an executor that echoes: everything but tensors is real.

The output for a prompt is the prompt's own ordinary tokens, then end of sequence; with an adapter, the same rotated by
an amount that depends on the adapter's bytes; with a temperature, rotated by the seed as well.
"""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import Message

from pomona.accounts.accounts import Accounts
from pomona.adapters.catalogue import Catalogue
from pomona.adapters.sources import AdapterSources
from pomona.adapters.stores import AdapterStore
from pomona.core.adapter import AdapterInfo
from pomona.core.engine_info import EngineInfo
from pomona.core.errors import AdapterNotFoundError, PomonaError
from pomona.core.ids import AdapterId, RequestId
from pomona.core.output import EngineStats, RequestOutput
from pomona.core.plan import SeqStart, StepPlan, StepResult, TokenLogprobs
from pomona.core.request import Request
from pomona.driver.local_client import LocalClient
from pomona.driver.loop import EngineParts
from pomona.engine.engine import Engine
from pomona.sched.config import SchedulerConfig
from pomona.server.adapter_loading import ResidencyLimits
from pomona.server.adapter_service import AdapterService
from pomona.server.app import create_app
from pomona.server.config import ServedModel, ServerConfig
from pomona.server.connections import GuardedProtocol
from pomona.text.chat_template import ChatTemplate
from pomona.text.tokenizer import Tokenizer
from support.driver import FolderHost, until
from support.tokenizers import make_tokenizer_files

BASE = "base"
MAX_MODEL_LEN = 512


@dataclass
class EchoExecutor:
    """Answers with the prompt. Its fields may be changed while it runs."""

    vocab_size: int
    eos_token_id: int
    special_token_ids: frozenset[int]
    gate: threading.Event = field(default_factory=threading.Event)
    """While it is clear, steps wait."""
    pause_at_token: int | None = None
    """The step that would compute this output token of a running sequence clears the gate first."""
    fail_with: str | None = None
    """Every sequence of the next steps fails with this reason."""
    starts: dict[RequestId, SeqStart] = field(default_factory=dict)
    seen: list[SeqStart] = field(default_factory=list)
    """Every sequence ever started, in order."""
    num_prompt_tokens: dict[RequestId, int] = field(default_factory=dict)
    """Of every request ever started."""

    def execute(self, plan: StepPlan) -> StepResult:
        if self.pause_at_token is not None and any(
            seq.num_computed_tokens + seq.num_scheduled_tokens
            == self.starts[seq.request_id].num_prompt_tokens + self.pause_at_token
            for seq in plan.seqs
            if seq.request_id in self.starts
        ):
            self.pause_at_token = None
            self.gate.clear()
        self.gate.wait()
        result = StepResult(plan.step_id)
        for request_id in plan.released:
            del self.starts[request_id]
        for seq in plan.seqs:
            if seq.start is not None:
                self.starts[seq.request_id] = seq.start
                self.seen.append(seq.start)
                self.num_prompt_tokens[seq.request_id] = seq.start.num_prompt_tokens
            if self.fail_with is not None:
                result.failed[seq.request_id] = self.fail_with
                continue
            start = self.starts[seq.request_id]
            end = seq.num_computed_tokens + seq.num_scheduled_tokens
            if start.sampling.prompt_logprobs is not None:
                prompt = start.token_ids[: start.num_prompt_tokens]
                told = prompt[seq.num_computed_tokens + 1 : end + 1]
                result.prompt_logprobs[seq.request_id] = tuple(
                    self._logprobs(token_id, start.sampling.prompt_logprobs) for token_id in told
                )
            if seq.is_sampled:
                token_id = self.token(start, end - start.num_prompt_tokens)
                result.sampled[seq.request_id] = token_id
                if start.sampling.logprobs is not None:
                    result.logprobs[seq.request_id] = self._logprobs(token_id, start.sampling.logprobs)
        return result

    def token(self, start: SeqStart, index: int) -> int:
        """Output token ``index``."""
        prompt = start.token_ids[: start.num_prompt_tokens]
        words = [token_id for token_id in prompt if token_id not in self.special_token_ids] or [0]
        is_end = index % (len(words) + 1) == len(words)
        if is_end and index >= start.sampling.min_tokens and self.eos_token_id in start.sampling.stop_token_ids:
            return self.eos_token_id
        return words[(index + self._rotation(start)) % len(words)]

    def _rotation(self, start: SeqStart) -> int:
        by_adapter = 0 if start.adapter_id is None else int(start.adapter_id[:4], 16)
        return by_adapter + (0 if start.sampling.temperature == 0.0 else start.sampling.seed)

    def _logprobs(self, token_id: int, num_top: int) -> TokenLogprobs:
        top = tuple(((token_id + offset) % self.vocab_size, -0.5 - offset) for offset in range(num_top))
        return TokenLogprobs(token_id, -0.5, 1, top)


@dataclass
class Served:
    """A running server and everything behind it."""

    app: FastAPI
    http: httpx.AsyncClient
    """Speaks to the application directly, without a socket."""
    client: LocalClient
    executor: EchoExecutor
    adapters: AdapterService
    tokenizer: Tokenizer
    folder: Path
    """Adapters below it may be loaded."""

    async def until_idle(self) -> None:
        """Wait until the engine holds nothing for anybody."""

        def is_idle() -> bool:
            stats = self.client.stats()
            held = (stats.num_running, stats.num_waiting, stats.num_kv_blocks_used, stats.num_pinned_adapters)
            return held == (0, 0, 0, 0) and not self.executor.starts

        # The snapshot is as old as the last step; a request of our own brings a new one.
        await until(lambda: not self.executor.starts or is_idle(), "the engine becomes idle")
        await self.complete("flush", max_tokens=1)
        await until(is_idle, "the engine becomes idle")

    async def complete(self, prompt: Any, **parameters: Any) -> dict[str, Any]:
        """POST /v1/completions, greedy unless told otherwise; the answer must be 200."""
        body = {"model": BASE, "prompt": prompt, "max_tokens": 64, "temperature": 0, **parameters}
        response = await self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def chat(self, content: str, **parameters: Any) -> dict[str, Any]:
        """POST /v1/chat/completions with one user message; the answer must be 200."""
        messages = [{"role": "user", "content": content}]
        body = {"model": BASE, "messages": messages, "max_tokens": 64, "temperature": 0, **parameters}
        response = await self.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def refused(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """POST something that must not work; the status and the error."""
        response = await self.http.post(path, json={"model": BASE, **body})
        assert response.status_code >= 400, response.text
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return response.status_code, error


@contextlib.asynccontextmanager
async def serve(
    folder: Path,
    config: ServerConfig | None = None,
    *,
    chat_template: bool = True,
    accounts: Accounts | None = None,
    stores: tuple[AdapterStore, ...] = (),
    residency: ResidencyLimits = ResidencyLimits(),
    **limits: Any,
) -> AsyncIterator[Served]:
    """Build and start everything in this process.

    Args:
        folder: for the tokenizer's files and for adapters.
        config: of the server.
        chat_template: False for a model without one.
        accounts: entered already; None for a server with one tenant.
        stores: places with many adapters, below ``folder``.
        residency: memory and patience for adapters.
        **limits: fields of SchedulerConfig.
    """
    files = folder / "tokenizer"
    if not files.exists():
        make_tokenizer_files(files)
    tokenizer = Tokenizer.load(files)
    assert tokenizer.eos_token_id is not None
    executor = EchoExecutor(tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.special_token_ids)
    executor.gate.set()
    scheduling = SchedulerConfig(
        **{
            "num_kv_blocks": 1024,
            "max_model_len": MAX_MODEL_LEN,
            "vocab_size": tokenizer.vocab_size,
            "num_adapter_pages": 16,
            **limits,
        }
    )
    info = EngineInfo(
        max_model_len=MAX_MODEL_LEN,
        vocab_size=scheduling.vocab_size,
        block_size=scheduling.block_size,
        num_kv_blocks=scheduling.num_kv_blocks,
        num_adapter_pages=scheduling.num_adapter_pages,
        dtype="none",
        device="none",
        eos_token_ids=(tokenizer.eos_token_id,),
    )
    client = LocalClient(EngineParts(Engine(scheduling, executor), FolderHost(), info))
    async with client:
        service = AdapterService(client, AdapterSources((str(folder),)), Catalogue(BASE), stores, residency)
        template = ChatTemplate.load(files, tokenizer) if chat_template else None
        model = ServedModel(BASE, info.max_model_len, info.vocab_size, info.eos_token_ids)
        app = create_app(client, tokenizer, template, service, model, config or ServerConfig(), accounts=accounts)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            try:
                yield Served(app, http, client, executor, service, tokenizer, folder)
            finally:
                executor.gate.set()
                await service.close()


@contextlib.asynccontextmanager
async def listen(app: FastAPI, protocol: type[GuardedProtocol] = GuardedProtocol) -> AsyncIterator[str]:
    """Serve an application on a free loopback port; yields its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(app, http=protocol, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        )
        running = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started or running.done(), "the server starts")
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            await running


def adapter_id_of(response: httpx.Response) -> AdapterId:
    """The digest in an adapter's card."""
    assert response.status_code == 200, response.text
    return AdapterId(response.json()["id"])


@dataclass
class ScriptedClient:
    """An EngineClient that yields prepared outputs, one by one, whatever was asked: for exact transcripts and faults.

    ``scripts`` holds one list per expected request, in order of submission; an exception in a list is raised there,
    and None waits for ever.
    """

    scripts: list[list[RequestOutput | PomonaError | None]]
    submitted: list[Request] = field(default_factory=list)
    aborted: list[RequestId] = field(default_factory=list)
    num_open: int = 0
    """Streams that were started and have not ended."""
    is_ready: bool = True
    num_restarts: int = 0
    engine_stats: EngineStats = field(default_factory=EngineStats)

    @property
    def state(self) -> str:
        return "ready" if self.is_ready else "restarting: it died"

    def stats(self) -> EngineStats:
        return self.engine_stats

    async def submit(self, request: Request) -> AsyncIterator[RequestOutput]:
        script = self.scripts[len(self.submitted)]
        self.submitted.append(request)
        self.num_open += 1
        is_open = True
        try:
            for item in script:
                await asyncio.sleep(0)
                if item is None:
                    await asyncio.Event().wait()
                elif isinstance(item, PomonaError):
                    raise item
                else:
                    is_open = item.finish_reason is None
                    self.num_open -= not is_open
                    yield replace(item, request_id=request.request_id)
        finally:
            self.num_open -= is_open

    async def abort(self, request_id: RequestId) -> None:
        self.aborted.append(request_id)

    async def load_adapter(self, path: str) -> AdapterInfo:
        raise AdapterNotFoundError(path)

    async def unload_adapter(self, adapter_id: AdapterId) -> None:
        raise AssertionError("nothing was loaded")

    async def resident_adapters(self) -> frozenset[AdapterId]:
        return frozenset()


def output(*token_ids: int, **fields: Any) -> RequestOutput:
    """An output for a script."""
    return RequestOutput(RequestId(""), new_token_ids=token_ids, **fields)


def scripted_app(client: ScriptedClient, folder: Path, config: ServerConfig | None = None) -> FastAPI:
    """The application over prepared outputs."""
    files = make_tokenizer_files(folder / "tokenizer")
    tokenizer = Tokenizer.load(files)
    assert tokenizer.eos_token_id is not None
    model = ServedModel(BASE, MAX_MODEL_LEN, tokenizer.vocab_size, (tokenizer.eos_token_id,))
    service = AdapterService(client, AdapterSources(), Catalogue(BASE))
    template = ChatTemplate.load(files, tokenizer)
    return create_app(client, tokenizer, template, service, model, config or ServerConfig())


class Connection:
    """One HTTP exchange with an application at ASGI level, whose client may go away at any moment."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any], *, key: str | None = None) -> None:
        self.messages: list[Message] = []
        """What the application has sent."""
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._inbox.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                *([] if key is None else [(b"authorization", f"Bearer {key}".encode())]),
            ],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.done = asyncio.create_task(app(scope, self._inbox.get, self._send))

    async def _send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        """What has been sent so far."""
        return b"".join(message.get("body", b"") for message in self.messages)

    async def disconnect(self) -> None:
        """Go away, and wait until the application has noticed."""
        self._inbox.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(self.done, 30.0)
