"""Rows of the ledger in SQL: inserted once however often they are sent, priced, and summed up per month."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import case, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from pomona.accounts.clock import day_of, month_of
from pomona.accounts.journal import Usage
from pomona.accounts.tables import PriceRow, SpendingRow, UsageRow

_MAX_NANOS: Final = 2**63 - 1
"""Of a column: a month that costs more, at the highest prices, is written down as this, over every budget."""


@dataclass(frozen=True, slots=True)
class Price:
    """Nano-units per token. A token found in the prefix cache costs ``cached``, not ``input``."""

    input_nanos: int = 0
    cached_nanos: int = 0
    output_nanos: int = 0

    def cost_nanos(self, usage: Usage) -> int:
        """Return what a request costs."""
        num_computed = usage.input_tokens - usage.cached_tokens
        return (
            num_computed * self.input_nanos
            + usage.cached_tokens * self.cached_nanos
            + usage.output_tokens * self.output_nanos
        )


Prices = Mapping[str, Price]
"""By qualified adapter name; the empty name is the price of all others."""


@dataclass(frozen=True, slots=True)
class Spending:
    """What a tenant, a key or an adapter has used in a month, as far as the ledger knows."""

    scope: str
    """tenant, key or adapter."""
    scope_id: str
    month: str
    num_requests: int
    num_tokens: int
    cost_nanos: int


def read_prices(connection: Connection) -> Prices:
    """Read all prices."""
    rows = connection.execute(select(PriceRow.__table__))
    return {row.adapter: Price(row.input_nanos, row.cached_nanos, row.output_nanos) for row in rows}


def insert_usage(connection: Connection, rows: Sequence[Usage], prices: Prices) -> list[Spending]:
    """Insert rows that are not there yet and not void, and add those, and only those, to their month's sums.

    Returns:
        The new sums of every tenant, key and adapter that got a row.
    """
    rows = [row for row in rows if not row.is_void]
    if not rows:
        return []
    default = prices.get("", Price())
    values = [
        {
            "request_id": row.request_id,
            "tenant_id": row.tenant_id,
            "key_id": row.key_id,
            "adapter": row.adapter,
            "adapter_id": row.adapter_id,
            "input_tokens": row.input_tokens,
            "cached_tokens": row.cached_tokens,
            "output_tokens": row.output_tokens,
            "engine_s": row.engine_s,
            "outcome": row.outcome,
            "started_s": row.started_s,
            "ended_s": row.ended_s,
            "day": day_of(row.ended_s),
            "cost_nanos": prices.get(row.adapter, default).cost_nanos(row),
        }
        for row in rows
    ]
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    insert = dialect.insert(UsageRow).on_conflict_do_nothing().returning(UsageRow.request_id, UsageRow.cost_nanos)
    cost_of = {request_id: cost_nanos for request_id, cost_nanos in connection.execute(insert, values)}
    sums: defaultdict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in rows:
        cost_nanos = cost_of.pop(row.request_id, None)
        if cost_nanos is None:
            continue
        for scope, scope_id in (("tenant", row.tenant_id), ("key", row.root_id), ("adapter", row.adapter)):
            one = sums[scope, scope_id, month_of(row.ended_s)]
            one[0] += 1
            one[1] += row.input_tokens + row.output_tokens
            one[2] += cost_nanos
    return [_add(connection, dialect, key, added) for key, added in sorted(sums.items())]


def _add(connection: Connection, dialect: Any, key: tuple[str, str, str], added: list[int]) -> Spending:
    """One statement, so that processes that add at the same time lose nothing. In order of keys: no deadlock."""
    scope, scope_id, month = key
    sums = dict(zip(("num_requests", "num_tokens", "cost_nanos"), added, strict=True))
    sums["cost_nanos"] = min(sums["cost_nanos"], _MAX_NANOS)
    insert = dialect.insert(SpendingRow).values(scope=scope, scope_id=scope_id, month=month, **sums)
    is_too_much = SpendingRow.cost_nanos > _MAX_NANOS - insert.excluded.cost_nanos
    upsert = insert.on_conflict_do_update(
        index_elements=["scope", "scope_id", "month"],
        set_={
            "num_requests": SpendingRow.num_requests + insert.excluded.num_requests,
            "num_tokens": SpendingRow.num_tokens + insert.excluded.num_tokens,
            "cost_nanos": case((is_too_much, _MAX_NANOS), else_=SpendingRow.cost_nanos + insert.excluded.cost_nanos),
        },
    ).returning(SpendingRow.num_requests, SpendingRow.num_tokens, SpendingRow.cost_nanos)
    return Spending(scope, scope_id, month, *connection.execute(upsert).one())
