"""Budgets per month, from the ledger's own sums: what it has, plus what requests in flight may still use.

A budget can be overrun by what ended in the last moments and is not yet in the ledger (a fifth of a second), and by
what other server processes have begun since the sums were last read (a second).
"""

from collections import Counter
from collections.abc import Iterable

from sqlalchemy import and_, or_, select

from pomona.accounts import clock
from pomona.accounts.database import Database
from pomona.accounts.principal import Limits
from pomona.accounts.tables import SpendingRow
from pomona.accounts.usage_rows import Spending
from pomona.core.errors import DatabaseUnavailableError, QuotaExceededError

_Scope = tuple[str, str]


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

    async def check(self, scope: _Scope, limits: Limits, num_tokens: int) -> None:
        """Ask whether a request that may use ``num_tokens`` fits into the month's budget.

        Raises:
            QuotaExceededError: it does not.
        """
        if limits.monthly_tokens is None and limits.monthly_cost_nanos is None:
            return
        now_s = clock.now_s()
        month = clock.month_of(now_s)
        if month != self._month:
            self._month = month
            self._spent.clear()
        if scope not in self._spent:
            self._spent[scope] = (0, 0)
            await self._read([scope])
        spent_tokens, spent_nanos = self._spent.get(scope, (0, 0))
        wait_s = clock.month_end_s(now_s) - now_s
        if limits.monthly_tokens is not None:
            left = limits.monthly_tokens - spent_tokens - self._reserved[scope]
            if num_tokens > left:
                raise QuotaExceededError(
                    f"The {scope[0]}'s budget of {limits.monthly_tokens} tokens a month has {max(0, left)} left; this "
                    f"request may use {num_tokens}.",
                    wait_s,
                )
        if limits.monthly_cost_nanos is not None and spent_nanos >= limits.monthly_cost_nanos:
            raise QuotaExceededError(f"The {scope[0]}'s budget for this month is spent.", wait_s)

    def reserve(self, scope: _Scope, num_tokens: int) -> None:
        """Hold tokens for a request in flight; a negative number lets go of them."""
        self._reserved[scope] += num_tokens
        if not self._reserved[scope]:
            del self._reserved[scope]

    def note(self, sums: Iterable[Spending]) -> None:
        """Take over sums that the ledger has just changed."""
        for one in sums:
            if one.month == self._month and (one.scope, one.scope_id) in self._spent:
                self._spent[one.scope, one.scope_id] = (one.num_tokens, one.cost_nanos)

    async def refresh(self) -> None:
        """Read the sums again: other processes add to them. Called every second.

        Raises:
            DatabaseUnavailableError: it does not answer; the sums stay as they are.
        """
        if self._spent:
            await self._read(list(self._spent))

    async def _read(self, scopes: list[_Scope]) -> None:
        month = self._month

        def read() -> list[tuple[str, str, int, int]]:
            which = or_(*(and_(SpendingRow.scope == kind, SpendingRow.scope_id == name) for kind, name in scopes))
            columns = (SpendingRow.scope, SpendingRow.scope_id, SpendingRow.num_tokens, SpendingRow.cost_nanos)
            with self._database.read() as connection:
                rows = connection.execute(select(*columns).where(SpendingRow.month == month, which))
                return [(row[0], row[1], row[2], row[3]) for row in rows]

        try:
            found = await self._database.run(read)
        except DatabaseUnavailableError:
            if len(scopes) == 1:
                self._spent.pop(scopes[0], None)  # unknown still: asked again for the next request
            raise
        if month == self._month:
            for kind, name, num_tokens, cost_nanos in found:
                self._spent[kind, name] = (num_tokens, cost_nanos)
