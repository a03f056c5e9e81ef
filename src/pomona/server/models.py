"""GET /v1/models and /v1/models/{id}: the base and every adapter that requests may name."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pomona.adapters.catalogue import AdapterState
from pomona.core.errors import ModelNotFoundError
from pomona.server.context import ServerContext, context_of
from pomona.server.responses import ModelCard, ModelList


def _cards(context: ServerContext) -> list[ModelCard]:
    model = context.model
    cards = [ModelCard(model.name, context.started_s, model.max_model_len, root=model.name, parent=None)]
    for entry in context.adapters.entries:
        if entry.state is AdapterState.READY and entry.info is not None:
            created_s = context.adapters.created_s(entry.name)
            root = str(entry.info.adapter_id)
            cards.append(ModelCard(entry.name, created_s, model.max_model_len, root=root, parent=model.name))
    return cards


async def list_models(request: Request) -> Response:
    """List the base and the adapters that are ready."""
    return Response(msgspec.json.encode(ModelList(_cards(context_of(request)))), media_type="application/json")


async def get_model(request: Request) -> Response:
    """Show one of them."""
    model_id = request.path_params["model_id"]
    for card in _cards(context_of(request)):
        if card.id == model_id:
            return Response(msgspec.json.encode(card), media_type="application/json")
    raise ModelNotFoundError(model_id)
