"""GET /health, /ready and /metrics."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pomona.server.context import context_of
from pomona.server.metrics import CONTENT_TYPE
from pomona.server.responses import Health


async def health(request: Request) -> Response:
    """Tell whether the engine answers: 200, or 503 while it starts, restarts or has failed for good.

    Why is in the server's log. Where keys are asked for it is not in the answer: this route is open, and what failed
    may name files.
    """
    context = context_of(request)
    client, has_keys = context.client, context.accounts is not None or context.config.api_key is not None
    state = client.state.partition(":")[0] if has_keys else client.state
    answer = Health("ok" if client.is_ready else "unavailable", state)
    return Response(msgspec.json.encode(answer), 200 if client.is_ready else 503, media_type="application/json")


async def metrics(request: Request) -> Response:
    """Show all metrics in Prometheus' text format."""
    context = context_of(request)
    context.metrics.loaded_adapters.set(context.adapters.num_ready)
    return Response(context.metrics.render(), headers={"content-type": CONTENT_TYPE})


async def ready(request: Request) -> Response:
    """Tell whether requests should be sent here now; the same answer as /health while there is one engine."""
    return await health(request)
