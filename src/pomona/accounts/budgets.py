"""Budgets per month, from the ledger's own sums: what it has, plus what requests in flight may still use, plus what
those have used that ended in the last moments and are not yet in the ledger.

A budget can be overrun by what other server processes have begun since the sums were last read (a second). What
requests will cost that are not in the ledger is not known: a budget of cost lets them end.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Final

from sqlalchemy import select, tuple_

from pomona.accounts import clock
from pomona.accounts.database import Database
from pomona.accounts.principal import Limits
from pomona.accounts.tables import SpendingRow
from pomona.accounts.usage_rows import Spending
from pomona.core.errors import QuotaExceededError, RateLimitError

_Scope = tuple[str, str]
_MAX_SCOPES: Final = 500
"""Of one statement."""
_HELD_RETRY_S: Final = 1.0


class Budgets:
    """Sums of this month for those who have a budget and ask. Belongs to one event loop.

    Args:
        database: migrated.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._month = ""
        self._spent: dict[_Scope, tuple[int, int]] = {}
        self._reserved: Counter[_Scope] = Counter()
        self._unwritten: dict[str, list[tuple[_Scope, int]]] = {}
        """Request that has ended and is not in the ledger -> what is held for it."""
        self._reading: dict[_Scope, asyncio.Task[None]] = {}
        """Scopes whose sums are read for the first time: whoever asks for one waits for its."""

    async def take(self, scope: _Scope, limits: Limits, num_tokens: int) -> None:
        """Hold the tokens that a request may use, if they fit into the month's budget.

        Raises:
            QuotaExceededError: they do not.
            RateLimitError: they may, when requests in flight have ended.
            DatabaseUnavailableError: the sums are not known yet, and the database does not answer.
        """
        if limits.monthly_tokens is not None or limits.monthly_cost_nanos is not None:
            await self._know(scope)
            self._check(scope, limits, num_tokens)  # and nothing may be awaited until the tokens are held
        self._reserved[scope] += num_tokens

    def take_without_database(self, scope: _Scope, num_tokens: int) -> None:
        """``take`` while the database is down: nobody knows what is left."""
        self._reserved[scope] += num_tokens

    def put(self, scope: _Scope, num_tokens: int) -> None:
        """Let go of what a request held."""
        self._reserved[scope] -= num_tokens
        if not self._reserved[scope]:
            del self._reserved[scope]

    def keep(self, scope: _Scope, num_tokens: int, request_id: str) -> None:
        """Hold what a request has used until it is in the ledger's sums."""
        self._reserved[scope] += num_tokens
        self._unwritten.setdefault(request_id, []).append((scope, num_tokens))

    async def _know(self, scope: _Scope) -> None:
        """Have the scope's sums of this month at hand."""
        month = clock.month_of(clock.now_s())
        if month != self._month:
            self._month = month
            self._spent.clear()
        while scope not in self._spent:
            reading = self._reading.get(scope)
            if reading is None:
                reading = self._reading[scope] = asyncio.create_task(self._read_first(scope))
                # Errors belong to whoever waits, if anybody still does.
                reading.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(reading)

    async def _read_first(self, scope: _Scope) -> None:
        try:
            await self._read([scope])
        finally:
            del self._reading[scope]

    def _check(self, scope: _Scope, limits: Limits, num_tokens: int) -> None:
        spent_tokens, spent_nanos = self._spent[scope]
        now_s = clock.now_s()
        wait_s = clock.month_end_s(now_s) - now_s
        if limits.monthly_tokens is not None:
            left, reserved = limits.monthly_tokens - spent_tokens, self._reserved[scope]
            budget = f"The {scope[0]}'s budget of {limits.monthly_tokens} tokens a month"
            use = f"this request may use {num_tokens}"
            if num_tokens > left:
                raise QuotaExceededError(f"{budget} has {max(0, left)} left; {use}.", wait_s)
            if num_tokens > left - reserved:
                held = f"{max(0, left - reserved)} left beside what requests in flight may use"
                raise RateLimitError(f"{budget} has {held}; {use}.", _HELD_RETRY_S)
        if limits.monthly_cost_nanos is not None and spent_nanos >= limits.monthly_cost_nanos:
            raise QuotaExceededError(f"The {scope[0]}'s budget for this month is spent.", wait_s)

    def note(self, sums: Iterable[Spending], request_ids: Iterable[str]) -> None:
        """Take over sums that the ledger has just changed, and let go of what they count by now."""
        for one in sums:
            scope = (one.scope, one.scope_id)
            if one.month == self._month and (scope in self._spent or scope in self._reading):
                self._keep(scope, one.num_tokens, one.cost_nanos)
        for request_id in request_ids:
            for held in self._unwritten.pop(request_id, ()):
                self.put(*held)

    async def refresh(self) -> None:
        """Read the sums again: other processes add to them. Called every second.

        Raises:
            DatabaseUnavailableError: it does not answer; the sums stay as they are.
        """
        if self._spent:
            await self._read(list(self._spent))

    async def _read(self, scopes: list[_Scope]) -> None:
        month = self._month

        def read() -> dict[_Scope, tuple[int, int]]:
            columns = (SpendingRow.scope, SpendingRow.scope_id, SpendingRow.num_tokens, SpendingRow.cost_nanos)
            found: dict[_Scope, tuple[int, int]] = {}
            with self._database.read() as connection:
                for first in range(0, len(scopes), _MAX_SCOPES):
                    is_asked = tuple_(SpendingRow.scope, SpendingRow.scope_id).in_(scopes[first : first + _MAX_SCOPES])
                    rows = connection.execute(select(*columns).where(SpendingRow.month == month, is_asked))
                    found |= {(row[0], row[1]): (row[2], row[3]) for row in rows}
            return found

        found = await self._database.ask(read)
        if month == self._month:
            for scope in scopes:
                self._keep(scope, *found.get(scope, (0, 0)))

    def _keep(self, scope: _Scope, num_tokens: int, cost_nanos: int) -> None:
        """Sums only grow: what is smaller was read before what is known."""
        known_tokens, known_nanos = self._spent.get(scope, (0, 0))
        self._spent[scope] = (max(num_tokens, known_tokens), max(cost_nanos, known_nanos))
