"""GET /v1/models and /v1/models/{id}: the base and every adapter that requests may name."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pomona.adapters.catalogue import AdapterState
from pomona.server.context import ServerContext, context_of
from pomona.server.responses import ModelCard, ModelList
from pomona.server.tenant_adapters import SeenAdapter, adapters_of


def _base_card(context: ServerContext) -> ModelCard:
    model = context.model
    return ModelCard(model.name, context.started_s, model.max_model_len, root=model.name, parent=None)


def _adapter_card(context: ServerContext, adapter: SeenAdapter) -> ModelCard | None:
    """None while requests cannot name it."""
    entry = adapter.entry
    if entry.state is not AdapterState.READY:
        return None
    created_s = context.adapters.created_s(entry.name)
    root = entry.name if entry.info is None else str(entry.info.adapter_id)
    return ModelCard(adapter.name, created_s, context.model.max_model_len, root=root, parent=context.model.name)


async def list_models(request: Request) -> Response:
    """List the base and the adapters that are ready."""
    context = context_of(request)
    cards = [_adapter_card(context, adapter) for adapter in adapters_of(request).seen()]
    answer = ModelList([_base_card(context), *(card for card in cards if card is not None)])
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def get_model(request: Request) -> Response:
    """Show one of them, under any name that requests may use."""
    context = context_of(request)
    model_id = request.path_params["model_id"]
    card: ModelCard | None = _base_card(context)
    adapters = adapters_of(request)
    if await adapters.find(model_id) is not None:
        card = _adapter_card(context, adapters.get(model_id.removeprefix(context.model.name + ":")))
    assert card is not None, "what resolves is ready"
    return Response(msgspec.json.encode(card), media_type="application/json")
