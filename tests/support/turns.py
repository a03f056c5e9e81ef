"""The server from the engine's report to the bytes on the wire, turn by turn: HTTP protocol, application and session
are real; a test says what each turn of the engine brings, and the transport keeps what is written."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from pomona.adapters.catalogue import Catalogue
from pomona.adapters.sources import AdapterSources
from pomona.core.adapter import AdapterInfo
from pomona.core.errors import AdapterNotFoundError
from pomona.core.ids import AdapterId, RequestId
from pomona.core.output import EngineStats, RequestOutput
from pomona.core.request import Request
from pomona.driver.channel import ClientChannel
from pomona.driver.messages import Command, TurnReport
from pomona.driver.session import EngineSession
from pomona.server.adapter_service import AdapterService
from pomona.server.app import create_app
from pomona.server.config import ServedModel, ServerConfig
from pomona.text.tokenizer import Tokenizer

BASE = "base"


class _SilentChannel:
    """Takes commands; nobody answers but the test."""

    num_sent = 0

    def send(self, command: Command, wait_ms: int = 0) -> bool:
        del command, wait_ms
        self.num_sent += 1
        return True


class TurnClient:
    """An EngineClient over a real session, whose turns are made by hand."""

    is_ready = True
    state = "ready"
    num_restarts = 0

    def __init__(self) -> None:
        self.session = EngineSession(cast(ClientChannel, _SilentChannel()), max_unanswered_commands=10_000)
        self.request_ids: list[RequestId] = []
        """Of every request, in order of submission."""

    def stats(self) -> EngineStats:
        return self.session.stats

    def submit(self, request: Request) -> AsyncIterator[RequestOutput]:
        self.request_ids.append(request.request_id)
        return self.session.submit(request)

    async def abort(self, request_id: RequestId) -> None:
        self.session.abort(request_id)

    async def load_adapter(self, path: str) -> AdapterInfo:
        raise AdapterNotFoundError(path)

    async def resident_adapters(self) -> frozenset[AdapterId]:
        return await self.session.resident_adapters()

    async def unload_adapter(self, adapter_id: AdapterId) -> None:
        raise AssertionError("nothing was loaded")

    def turn(self, outputs: Iterable[RequestOutput]) -> None:
        """One report of the engine."""
        self.session.on_turn(TurnReport(0, EngineStats(), list(outputs), []))


@dataclass
class Wire(asyncio.Transport):
    """A connection that keeps every write."""

    writes: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...


def turn_app(client: TurnClient, folder: Path) -> FastAPI:
    """The application over turns made by hand; ``folder`` holds a tokenizer's files."""
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token_id is not None
    service = AdapterService(client, AdapterSources(), Catalogue(BASE))
    model = ServedModel(BASE, 1024, tokenizer.vocab_size, (tokenizer.eos_token_id,))
    return create_app(client, tokenizer, None, service, model, ServerConfig())


async def open_streams(app: FastAPI, client: TurnClient, bodies: Sequence[dict[str, Any]]) -> list[Wire]:
    """POST streaming completions, each on a connection of its own; returns when all are submitted."""
    config = uvicorn.Config(app, log_level="warning", lifespan="off")
    config.load()
    state = ServerState()
    wires = []
    num_expected = len(client.request_ids)
    for body in bodies:
        wire = Wire()
        protocol = HttpToolsProtocol(config=config, server_state=state, app_state={})
        protocol.connection_made(wire)
        content = json.dumps({"model": BASE, "stream": True, "temperature": 0, **body}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        protocol.data_received(head.encode() + content)
        wires.append(wire)
        num_expected += body.get("n", 1)
    while len(client.request_ids) < num_expected:
        await asyncio.sleep(0.001)
    return wires
