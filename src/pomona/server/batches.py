"""/v1/batches: a file of requests, carried out when there is room; in OpenAI's shapes. The work: ``batch_runner``."""

from starlette.requests import Request
from starlette.responses import Response

from pomona.accounts.batches import Batch
from pomona.server import account_types as wire
from pomona.server.admin import accounts_of, json_answer
from pomona.server.body import read_model
from pomona.server.context import context_of
from pomona.server.files import tenant_of
from pomona.server.paging import page_of
from pomona.server.tenant import principal_of


async def create_batch(request: Request) -> Response:
    """Start a batch."""
    context = context_of(request)
    body = await read_model(request, wire.BatchCreateRequest, context.config.max_body_bytes)
    accounts, principal = accounts_of(request), principal_of(request)
    assert principal is not None, "every request has a key"
    batch = await accounts.database.run(
        accounts.batches.create_batch,
        tenant_of(request),
        principal.key_id,
        body.endpoint,
        body.input_file_id,
        body.metadata,
    )
    context.wake_batches.set()
    return json_answer(_card(batch))


async def list_batches(request: Request) -> Response:
    """List the tenant's batches, the newest first."""
    accounts = accounts_of(request)
    after, limit = page_of(request)
    found = await accounts.database.run(accounts.batches.batches, tenant_of(request), after, limit + 1)
    cards = [_card(batch) for batch in found[:limit]]
    ends = (cards[0].id, cards[-1].id) if cards else (None, None)
    return json_answer(wire.BatchList(cards, len(found) > limit, *ends))


async def get_batch(request: Request) -> Response:
    """Show a batch."""
    accounts, batch_id = accounts_of(request), request.path_params["batch_id"]
    return json_answer(_card(await accounts.database.run(accounts.batches.batch, batch_id, tenant_of(request))))


async def cancel_batch(request: Request) -> Response:
    """End a batch early; what is done stays."""
    accounts, batch_id = accounts_of(request), request.path_params["batch_id"]
    return json_answer(_card(await accounts.database.run(accounts.batches.cancel, batch_id, tenant_of(request))))


def _card(batch: Batch) -> wire.BatchCard:
    ended = {batch.status: None if batch.ended_s is None else int(batch.ended_s)}
    errors = [wire.BatchError(error["code"], error["message"], error["line"]) for error in batch.errors]
    return wire.BatchCard(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=wire.BatchErrors(errors) if errors else None,
        input_file_id=batch.input_file_id,
        completion_window="24h",
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=int(batch.created_s),
        in_progress_at=None if batch.in_progress_s is None else int(batch.in_progress_s),
        expires_at=int(batch.expires_s),
        finalizing_at=ended.get("completed"),
        completed_at=ended.get("completed"),
        failed_at=ended.get("failed"),
        expired_at=ended.get("expired"),
        cancelling_at=ended.get("cancelled"),
        cancelled_at=ended.get("cancelled"),
        request_counts=wire.BatchCounts(batch.num_total, batch.num_completed, batch.num_failed),
        metadata=None if batch.metadata is None else dict(batch.metadata),
    )
