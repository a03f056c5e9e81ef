"""Puts the HTTP application together."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException

import pomona
from pomona.accounts.accounts import Accounts
from pomona.core.errors import PomonaError
from pomona.core.interfaces import EngineClient
from pomona.server import (
    account_routes,
    adapters,
    chat,
    completions,
    health,
    models,
    openapi,
    protocol,
    responses,
    tokenize,
)
from pomona.server.adapter_service import AdapterService
from pomona.server.auth import AccountCheck
from pomona.server.batch_runner import running_batches
from pomona.server.config import ServedModel, ServerConfig
from pomona.server.context import ServerContext
from pomona.server.errors import handle_http_error, handle_pomona_error
from pomona.server.metrics import ServerMetrics
from pomona.server.middleware import Boundary, KeyCheck
from pomona.server.tenant import default_caller
from pomona.text.chat_template import ChatTemplate
from pomona.text.tokenizer import Tokenizer


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    adapter_service: AdapterService,
    model: ServedModel,
    config: ServerConfig,
    *,
    accounts: Accounts | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        client: the engine; started and closed by the caller.
        tokenizer: of the base model; all adapters share it.
        chat_template: None if the model has none.
        adapter_service: over the same client; closed with the application.
        model: the base model as clients see it.
        config: settings.
        accounts: started and closed by the caller; None for a server with one tenant.
    """
    metrics = ServerMetrics(client, model.name, config.max_adapter_labels)
    metrics.add_residency(adapter_service.totals)
    if accounts is not None:
        metrics.add_ledger(accounts.ledger.totals)

    wake_batches = asyncio.Event()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running_batches(app, accounts, wake_batches, config.max_body_bytes):
            yield
        await adapter_service.close()

    app = FastAPI(
        title="Pomona",
        version=pomona.__version__,
        summary="Many LoRA adapters of one base model, behind the OpenAI API.",
        lifespan=lifespan,
        exception_handlers={PomonaError: handle_pomona_error, HTTPException: handle_http_error},
        redirect_slashes=False,
    )
    app.state.context = ServerContext(
        client=client,
        tokenizer=tokenizer,
        chat_template=chat_template,
        adapters=adapter_service,
        model=model,
        config=config,
        metrics=metrics,
        default_caller=default_caller(config.cache_secret or secrets.token_bytes(32)),
        accounts=accounts,
        wake_batches=wake_batches,
        started_s=int(time.time()),  # noqa: TID251  # a date for people
    )
    # The last one added is the outermost.
    if accounts is not None:
        app.add_middleware(AccountCheck, accounts=accounts)
    elif config.api_key is not None:
        app.add_middleware(KeyCheck, api_key=config.api_key)
    app.add_middleware(Boundary, metrics=metrics)
    _add_generation_routes(app, model.name)
    _add_adapter_routes(app)
    _add_operator_routes(app)
    if accounts is not None:
        account_routes.add_to(app)
    _add_schemas(app, has_key=accounts is not None or config.api_key is not None)
    return app


def _add_generation_routes(app: FastAPI, model: str) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    chat_example = {"model": model, "messages": messages, "max_tokens": 32}
    completion_example = {"model": model, "prompt": "The capital of France is", "max_tokens": 8}
    generation_errors = (400, 404, 409, 413, 429, 503)
    app.post(
        "/v1/chat/completions",
        tags=["generation"],
        openapi_extra=openapi.request_body(protocol.ChatCompletionRequest, chat_example),
        responses=openapi.answers(responses.ChatCompletion, *generation_errors, is_stream=True),
    )(chat.create_chat_completion)
    app.post(
        "/v1/completions",
        tags=["generation"],
        openapi_extra=openapi.request_body(protocol.CompletionRequest, completion_example),
        responses=openapi.answers(responses.Completion, *generation_errors, is_stream=True),
    )(completions.create_completion)
    app.get("/v1/models", tags=["models"], responses=openapi.answers(responses.ModelList))(models.list_models)
    app.get(
        "/v1/models/{model_id:path}",
        tags=["models"],
        openapi_extra=openapi.path_parameter("model_id", "A name that requests may use as `model`."),
        responses=openapi.answers(responses.ModelCard, 404),
    )(models.get_model)
    app.post(
        "/tokenize",
        tags=["text"],
        openapi_extra=openapi.request_body(protocol.TokenizeRequest, {"prompt": "Hello"}),
        responses=openapi.answers(responses.Tokenized, 400, 404, 413),
    )(tokenize.tokenize)
    app.post(
        "/detokenize",
        tags=["text"],
        openapi_extra=openapi.request_body(protocol.DetokenizeRequest, {"tokens": [1, 2, 3]}),
        responses=openapi.answers(responses.Detokenized, 400, 404, 413),
    )(tokenize.detokenize)


def _add_adapter_routes(app: FastAPI) -> None:
    example = {"name": "legal", "source": "/srv/adapters/legal-v2"}
    app.post(
        "/v1/adapters",
        tags=["adapters"],
        openapi_extra=openapi.request_body(protocol.AdapterLoadRequest, example),
        responses=openapi.answers(responses.AdapterCard, 400, 403, 404, 413, 422, 503),
    )(adapters.load_adapter)
    paging = {"after": "Name of the last one already seen.", "limit": f"Most of them; {adapters.MAX_PAGE} by default."}
    app.get(
        "/v1/adapters",
        tags=["adapters"],
        openapi_extra=openapi.query_parameters(paging),
        responses=openapi.answers(responses.AdapterList, 400),
    )(adapters.list_adapters)
    name = openapi.path_parameter("name", "The adapter's name.")
    app.get(
        "/v1/adapters/{name:path}",
        tags=["adapters"],
        openapi_extra=name,
        responses=openapi.answers(responses.AdapterCard, 404),
    )(adapters.get_adapter)
    app.delete(
        "/v1/adapters/{name:path}",
        tags=["adapters"],
        openapi_extra=name,
        responses=openapi.answers(responses.AdapterDeleted, 404),
    )(adapters.unload_adapter)
    app.patch(
        "/v1/adapters/{name:path}",
        tags=["adapters"],
        openapi_extra=name | openapi.request_body(protocol.AdapterPinRequest, {"pinned": True}),
        responses=openapi.answers(responses.AdapterCard, 400, 404, 413),
    )(adapters.pin_adapter)


def _add_operator_routes(app: FastAPI) -> None:
    found = openapi.answers(responses.Health)
    found[503] = {**found[200], "description": "The engine starts, restarts, or has failed for good."}
    del found[401]
    is_open: dict[str, Any] = {"security": []}
    app.get("/health", tags=["operation"], openapi_extra=is_open, responses=found)(health.health)
    app.get("/ready", tags=["operation"], openapi_extra=is_open, responses=found)(health.ready)
    exported = openapi.answers(responses.Health)
    exported[200] = {"description": "All metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    app.get("/metrics", tags=["operation"], responses=exported)(health.metrics)


def _add_schemas(app: FastAPI, *, has_key: bool) -> None:
    """Put the wire types into the document that FastAPI makes of the routes."""
    build = app.openapi

    def build_with_schemas() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = build()
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(openapi.schemas())
            if has_key:
                components["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"api_key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = build_with_schemas  # type: ignore[method-assign]
