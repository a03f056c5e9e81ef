"""/v1/adapters: load or replace, list, show, pin, unload. Load means loaded; a refusal leaves everything as it was."""

import asyncio
import bisect
import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pomona.core.errors import EngineUnavailableError
from pomona.core.ids import AdapterId
from pomona.server.body import read_model
from pomona.server.context import ServerContext, context_of
from pomona.server.paging import page_of
from pomona.server.protocol import AdapterLoadRequest, AdapterPinRequest
from pomona.server.responses import AdapterCard, AdapterDeleted, AdapterList
from pomona.server.tenant_adapters import SeenAdapter, adapters_of

_PATIENCE_S = 0.25
MAX_PAGE = 1000
"""Adapters in an answer."""


def _card(context: ServerContext, adapter: SeenAdapter, resident: frozenset[AdapterId]) -> AdapterCard:
    entry, service = adapter.entry, context.adapters
    info, record = entry.info, service.record(entry.name)
    return AdapterCard(
        name=adapter.name,
        state=service.tier(entry, resident).value,
        version=entry.version,
        source=entry.source if adapter.is_own else "",
        id=None if info is None else str(info.adapter_id),
        lora_rank=None if info is None else info.lora_rank,
        num_pages=None if info is None else info.num_pages,
        num_host_bytes=None if info is None else info.num_host_bytes,
        modules=[] if info is None else list(info.modules),
        features=[] if info is None else list(info.features),
        num_requests=service.num_requests(entry) if adapter.is_own else 0,
        created=service.created_s(entry.name),
        pinned=record.is_pinned,
        num_waiting=record.num_waiting if adapter.is_own else 0,
        last_used=None if record.last_used_s is None or not adapter.is_own else int(record.last_used_s),
        num_hits=record.num_hits if adapter.is_own else 0,
        num_misses=record.num_misses if adapter.is_own else 0,
        num_loads=record.num_loads,
        num_failures=record.num_failures,
        num_evictions=record.num_evictions,
        fetch_s=round(record.fetch_s, 6),
        stage_s=round(record.stage_s, 6),
        error=None if record.error is None or not adapter.is_own else str(record.error),
        retry_s=None if record.error is None else round(max(0.0, record.retry_at_s - time.monotonic()), 3),
    )


async def _resident(context: ServerContext) -> frozenset[AdapterId]:
    """What is on the device; nothing while there is no engine, or while it is busy with a long step."""
    try:
        return await asyncio.wait_for(context.client.resident_adapters(), _PATIENCE_S)
    except (EngineUnavailableError, TimeoutError):
        return frozenset()


def _json(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def load_adapter(request: Request) -> Response:
    """Load an adapter under a name, replacing what the name meant; answers when requests can use it."""
    context = context_of(request)
    body = await read_model(request, AdapterLoadRequest, context.config.max_body_bytes)
    adapter = await adapters_of(request).load(body.name, body.source, body.tenant)
    return _json(_card(context, adapter, await _resident(context)))


async def list_adapters(request: Request) -> Response:
    """List a page of the adapters with their states, by name: thousands at once would hold up everybody's streams."""
    context = context_of(request)
    after, limit = page_of(request, default=MAX_PAGE, most=MAX_PAGE)
    resident = await _resident(context)
    found = adapters_of(request).seen()
    start = 0 if after is None else bisect.bisect_right(found, after, key=lambda adapter: adapter.name)
    cards = [_card(context, adapter, resident) for adapter in found[start : start + limit]]
    return _json(AdapterList(cards, start + limit < len(found)))


async def get_adapter(request: Request) -> Response:
    """Show one adapter."""
    context = context_of(request)
    adapter = await adapters_of(request).look_up(request.path_params["name"])
    return _json(_card(context, adapter, await _resident(context)))


async def pin_adapter(request: Request) -> Response:
    """Keep an adapter in host memory whatever else is asked for, or let it be evicted like others."""
    context = context_of(request)
    body = await read_model(request, AdapterPinRequest, context.config.max_body_bytes)
    adapter = await adapters_of(request).look_up(request.path_params["name"])
    context.adapters.pin(adapter.entry.name, is_pinned=body.pinned)
    return _json(_card(context, adapter, await _resident(context)))


async def unload_adapter(request: Request) -> Response:
    """Take no new requests for a name, let running ones finish, free its memory; then answer."""
    name = request.path_params["name"]
    await adapters_of(request).unload(name)
    return _json(AdapterDeleted(name))
