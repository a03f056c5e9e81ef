"""Reads the ledger: sums by any of its columns, and whole rows for export. Blocking: called in threads."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, func, select

from pomona.accounts.database import Database
from pomona.accounts.tables import PriceRow, UsageRow
from pomona.accounts.usage_rows import Price, read_prices
from pomona.core.errors import InvalidRequestError

_PAGE: Final = 1000
_NANOS: Final = 1_000_000_000
_TABLE: Final = UsageRow.__table__
GROUPS: Final[dict[str, ColumnElement[str]]] = {
    "tenant": _TABLE.c.tenant_id,
    "key": _TABLE.c.key_id,
    "adapter": _TABLE.c.adapter,
    "adapter_version": _TABLE.c.adapter_id,
    "outcome": _TABLE.c.outcome,
    "day": _TABLE.c.day,
    "month": func.substr(_TABLE.c.day, 1, 7),
}
"""What usage can be summed up by."""
SUMS: Final = ("num_requests", "input_tokens", "cached_tokens", "output_tokens", "engine_s", "cost_nanos")
COLUMNS: Final = tuple(column.name for column in _TABLE.columns)


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """Which rows."""

    tenant_id: str | None = None
    key_id: str | None = None
    adapter: str | None = None
    start_s: float | None = None
    """Ended at this Unix time or later."""
    end_s: float | None = None
    """Ended before this Unix time."""


class UsageStore:
    """The ledger, for readers.

    Args:
        database: migrated.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def sums(self, which: UsageFilter, group_by: Sequence[str]) -> list[dict[str, Any]]:
        """Sum up rows.

        Args:
            which: rows.
            group_by: keys of ``GROUPS``; none sums up everything.

        Returns:
            One dict per group, sorted by it: its keys, and ``SUMS``.

        Raises:
            InvalidRequestError: a group is unknown.
        """
        for name in group_by:
            if name not in GROUPS:
                raise InvalidRequestError.out_of_range("group_by", name[:100], "one of " + ", ".join(GROUPS))
        groups: list[ColumnElement[Any]] = [GROUPS[name].label(name) for name in dict.fromkeys(group_by)]
        sums: list[ColumnElement[Any]] = [func.count().label("num_requests")]
        summed: dict[str, Any] = {name: getattr(UsageRow, name) for name in SUMS[1:]}
        # In two parts: SQLite refuses sums of more than 64 bits, and high prices come to that.
        summed |= {"cost_nanos": UsageRow.cost_nanos % _NANOS, "cost_units": UsageRow.cost_nanos // _NANOS}
        sums += [func.coalesce(func.sum(column), 0).label(name) for name, column in summed.items()]
        query = _filtered(select(*groups, *sums), which)
        if groups:
            positions = [GROUPS[name] for name in dict.fromkeys(group_by)]
            query = query.group_by(*positions).order_by(*positions)
        with self._database.read(is_report=True) as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        for row in rows:
            row["cost_nanos"] += _NANOS * row.pop("cost_units")
        # PostgreSQL sums integers as decimals.
        return [
            {name: int(value) if name in SUMS and name != "engine_s" else value for name, value in row.items()}
            for row in rows
        ]

    def rows(self, which: UsageFilter) -> Iterator[list[dict[str, Any]]]:
        """Yield all rows in pages, in order of their end. Rows that arrive meanwhile may or may not be among them."""
        last: tuple[float, str] | None = None
        while True:
            query = _filtered(select(_TABLE), which).order_by(UsageRow.ended_s, UsageRow.request_id)
            if last is not None:
                is_later = (UsageRow.ended_s > last[0]) | (
                    (UsageRow.ended_s == last[0]) & (UsageRow.request_id > last[1])
                )
                query = query.where(is_later)
            with self._database.read(is_report=True) as connection:
                page = [dict(row) for row in connection.execute(query.limit(_PAGE)).mappings()]
            if page:
                yield page
            if len(page) < _PAGE:
                return
            last = (page[-1]["ended_s"], page[-1]["request_id"])

    def csv(self, which: UsageFilter) -> Iterator[bytes]:
        """Yield all rows as CSV, the header first."""
        header = [COLUMNS]
        for page in self.rows(which):
            yield _csv_lines([*header, *(tuple(row[name] for name in COLUMNS) for row in page)])
            header = []
        if header:
            yield _csv_lines(header)

    def parquet(self, which: UsageFilter) -> Iterator[bytes]:
        """Yield all rows as one Parquet file.

        Raises:
            InvalidRequestError: pyarrow is not installed.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            reason = "format: parquet needs pyarrow on the server (pip install 'pomona[parquet]'); csv does not"
            raise InvalidRequestError("format", reason) from error
        kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
        schema = pyarrow.schema([(column.name, kinds[column.type.python_type]) for column in _TABLE.columns])
        sink = io.BytesIO()
        with parquet.ParquetWriter(sink, schema) as writer:
            for page in self.rows(which):
                writer.write_table(pyarrow.Table.from_pylist(page, schema))
                yield sink.getvalue()
                sink.seek(0)
                sink.truncate()
        yield sink.getvalue()

    def prices(self) -> dict[str, Price]:
        """All prices, by qualified adapter name; the empty name is the price of all others."""
        with self._database.read() as connection:
            return dict(read_prices(connection))

    def set_price(self, adapter: str, price: Price | None) -> None:
        """Set or remove the price of an adapter; rows that are in the ledger keep theirs."""
        with self._database.session(is_change=True) as session:
            row = session.get(PriceRow, adapter)
            if row is not None:
                session.delete(row)
                session.flush()
            if price is not None:
                session.add(
                    PriceRow(
                        adapter=adapter,
                        input_nanos=price.input_nanos,
                        cached_nanos=price.cached_nanos,
                        output_nanos=price.output_nanos,
                    )
                )


def _filtered(query: Select[Any], which: UsageFilter) -> Select[Any]:
    for column, value in (
        (UsageRow.tenant_id, which.tenant_id),
        (UsageRow.key_id, which.key_id),
        (UsageRow.adapter, which.adapter),
    ):
        if value is not None:
            query = query.where(column == value)
    if which.start_s is not None:
        query = query.where(UsageRow.ended_s >= which.start_s)
    if which.end_s is not None:
        query = query.where(UsageRow.ended_s < which.end_s)
    return query


def _csv_lines(lines: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    return text.getvalue().encode()
