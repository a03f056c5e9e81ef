"""/v1/adapters: load or replace, list, show, unload. Load means loaded; a refusal leaves everything as it was."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pomona.server.body import read_model
from pomona.server.context import ServerContext, context_of
from pomona.server.protocol import AdapterLoadRequest
from pomona.server.responses import AdapterCard, AdapterDeleted, AdapterList
from pomona.server.tenant_adapters import SeenAdapter, adapters_of


def _card(context: ServerContext, adapter: SeenAdapter) -> AdapterCard:
    entry = adapter.entry
    info = entry.info
    return AdapterCard(
        name=adapter.name,
        state=entry.state.value,
        version=entry.version,
        source=entry.source if adapter.is_own else "",
        id=None if info is None else str(info.adapter_id),
        lora_rank=None if info is None else info.lora_rank,
        num_pages=None if info is None else info.num_pages,
        num_host_bytes=None if info is None else info.num_host_bytes,
        modules=[] if info is None else list(info.modules),
        features=[] if info is None else list(info.features),
        num_requests=context.adapters.num_requests(entry) if adapter.is_own else 0,
        created=context.adapters.created_s(entry.name),
    )


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def load_adapter(request: Request) -> Response:
    """Load an adapter under a name, replacing what the name meant; answers when requests can use it."""
    context = context_of(request)
    body = await read_model(request, AdapterLoadRequest, context.config.max_body_bytes)
    adapter = await adapters_of(request).load(body.name, body.source, body.tenant)
    return _json(_card(context, adapter))


async def list_adapters(request: Request) -> Response:
    """List all adapters with their states."""
    context = context_of(request)
    return _json(AdapterList([_card(context, adapter) for adapter in adapters_of(request).seen()]))


async def get_adapter(request: Request) -> Response:
    """Show one adapter."""
    context = context_of(request)
    return _json(_card(context, adapters_of(request).get(request.path_params["name"])))


async def unload_adapter(request: Request) -> Response:
    """Take no new requests for a name, let running ones finish, free its memory; then answer."""
    name = request.path_params["name"]
    await adapters_of(request).unload(name)
    return _json(AdapterDeleted(name))
