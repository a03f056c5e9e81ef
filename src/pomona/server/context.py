"""What every endpoint needs, in one frozen object; built by ``app.create_app``."""

import asyncio
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from pomona.accounts.accounts import Accounts
from pomona.core.interfaces import EngineClient
from pomona.server.adapter_service import AdapterService
from pomona.server.config import ServedModel, ServerConfig
from pomona.server.metrics import ServerMetrics
from pomona.server.tenant import Caller
from pomona.text.chat_template import ChatTemplate
from pomona.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServerContext:
    """The parts of a running server."""

    client: EngineClient
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    """None if the model has none; chat is then refused."""
    adapters: AdapterService
    model: ServedModel
    config: ServerConfig
    metrics: ServerMetrics
    default_caller: Caller
    """Whom requests belong to on a server without accounts."""
    accounts: Accounts | None
    wake_batches: asyncio.Event
    """Set when a batch was made."""
    started_s: int
    """Unix time of the start."""


def context_of(connection: HTTPConnection) -> ServerContext:
    """Return the context of the application that handles this request."""
    context = connection.app.state.context
    assert isinstance(context, ServerContext)
    return context


def request_id_of(connection: HTTPConnection) -> str:
    """Return the id that the middleware gave this HTTP request; also its ``x-request-id``."""
    request_id = connection.scope["state"]["request_id"]
    assert isinstance(request_id, str)
    return request_id
