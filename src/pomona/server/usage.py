"""GET /v1/usage: the ledger for those who pay and those who send bills; sums by columns, or every row as a file."""

import datetime
from collections.abc import AsyncIterator, Iterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pomona.accounts.accounts import Accounts
from pomona.accounts.usage import UsageFilter
from pomona.core.errors import InvalidRequestError
from pomona.server.account_types import UsageReport, UsageSums
from pomona.server.admin import accounts_of, json_answer
from pomona.server.paging import check_names
from pomona.server.tenant import principal_of

_NANOS = 1_000_000_000
_MEDIA_TYPES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}
_PARAMETERS = frozenset({"tenant", "key", "adapter", "start", "end", "group_by", "format"})


async def get_usage(request: Request) -> Response:
    """Sum up the ledger (``group_by``), or export its rows (``format=csv`` or ``parquet``).

    Tenants see their own rows. ``start`` and ``end`` are Unix times or dates (UTC unless they say otherwise); they
    bound when requests ended.
    """
    accounts = accounts_of(request)
    query = request.query_params
    check_names(query, _PARAMETERS)
    which = _filter_of(request)
    kind = query.get("format", "json")
    if kind == "json":
        group_by = [name for name in query.get("group_by", "").split(",") if name]
        sums = await accounts.database.run_long(accounts.usage.sums, which, group_by)
        return json_answer(
            UsageReport(
                [
                    UsageSums(
                        group={name: row[name] for name in dict.fromkeys(group_by)},
                        num_requests=row["num_requests"],
                        input_tokens=row["input_tokens"],
                        cached_tokens=row["cached_tokens"],
                        output_tokens=row["output_tokens"],
                        engine_seconds=row["engine_s"],
                        cost=row["cost_nanos"] / _NANOS,
                    )
                    for row in sums
                ]
            )
        )
    if kind not in _MEDIA_TYPES:
        raise InvalidRequestError.out_of_range("format", kind[:100], "json, csv or parquet")
    if query.get("group_by"):
        shown = query["group_by"][:100]
        raise InvalidRequestError.out_of_range("group_by", shown, f"left out: {kind} has every row, and no sums")
    pages = accounts.usage.csv(which) if kind == "csv" else accounts.usage.parquet(which)
    # The first page before the status line, so that what is wrong can still be said.
    first = await accounts.database.run_long(next, pages, None)
    headers = {"content-disposition": f'attachment; filename="usage.{kind}"', "cache-control": "no-store"}
    return StreamingResponse(_rest(accounts, first, pages), media_type=_MEDIA_TYPES[kind], headers=headers)


async def _rest(accounts: Accounts, first: bytes | None, pages: Iterator[bytes]) -> AsyncIterator[bytes]:
    page = first
    while page is not None:
        yield page
        page = await accounts.database.run_long(next, pages, None)


def _filter_of(request: Request) -> UsageFilter:
    query = request.query_params
    principal = principal_of(request)
    assert principal is not None, "every request has a key"
    key_id, tenant_id = query.get("key"), query.get("tenant")
    if principal.tenant_id is not None and tenant_id not in (None, principal.tenant_id):
        raise InvalidRequestError.out_of_range("tenant", tenant_id[:100], "left out: you see your own usage")
    return UsageFilter(
        tenant_id=principal.tenant_id or tenant_id,
        key_id=None if key_id is None else key_id.removeprefix("pk-"),
        adapter=query.get("adapter"),
        start_s=_moment("start", query.get("start")),
        end_s=_moment("end", query.get("end")),
    )


def _moment(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        if "-" in text[1:]:
            date = datetime.datetime.fromisoformat(text)
            return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()
        moment = float(text)
        if abs(moment) <= 1e12:  # false for NaN too
            return moment
    except ValueError:
        pass
    raise InvalidRequestError.out_of_range(name, text[:100], "a Unix time or a date such as 2026-11-21")
