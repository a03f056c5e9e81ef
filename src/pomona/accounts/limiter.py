"""Admission: may this request begin, as far as limits go? All limits of tenant, key and adapter, or none of them."""

import contextlib
import functools
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from pomona.accounts.buckets import Buckets, BucketState, RateLimit, bucket_name
from pomona.accounts.budgets import Budgets
from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from pomona.accounts.principal import Limits
from pomona.accounts.slots import Slots
from pomona.core.errors import DatabaseUnavailableError, RateLimitError

_LOGGER = logging.getLogger(__name__)
_BUSY_RETRY_S: Final = 1.0
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Scope:
    """Somebody or something that has limits."""

    kind: str
    """tenant, key or adapter."""
    name: str
    limits: Limits

    def requests(self) -> RateLimit | None:
        """Its limit on requests."""
        per_minute = self.limits.requests_per_minute
        return None if per_minute is None else RateLimit(bucket_name(self.kind, self.name, "requests"), per_minute)

    def tokens(self) -> RateLimit | None:
        """Its limit on tokens."""
        per_minute = self.limits.tokens_per_minute
        return None if per_minute is None else RateLimit(bucket_name(self.kind, self.name, "tokens"), per_minute)


@dataclass(frozen=True, slots=True)
class RateLimitStates:
    """The tightest limit on requests, and on tokens; None where there is none."""

    requests: BucketState | None
    tokens: BucketState | None


class Admission:
    """What an admitted request has taken; ``settle`` gives back what it did not use."""

    __slots__ = ("_give_back", "_limiter", "_num_reserved", "_scopes", "_slots")

    def __init__(self, limiter: "Limiter", scopes: Sequence[Scope], num_reserved: int) -> None:
        self._limiter = limiter
        self._scopes = scopes
        self._num_reserved = num_reserved
        self._give_back: list[Callable[[int], None]] = []
        """Tokens, to where they were taken from."""
        self._slots: list[str] = []

    def settle(self, num_tokens: int, request_id: str | None = None) -> None:
        """End the request. Once.

        Args:
            num_tokens: used, prompt and output. More than was reserved is owed, and refuses later requests.
            request_id: the ledger's, if the request is to be in it.
        """
        with contextlib.ExitStack() as ends:  # each of them, whatever happens to the others
            for give_back in self._give_back:
                ends.callback(give_back, self._num_reserved - num_tokens)
            for name in self._slots:
                ends.callback(self._limiter.slots.put, name)
            for scope in self._scopes:
                owner, budgets = (scope.kind, scope.name), self._limiter.budgets
                ends.callback(budgets.put, owner, self._num_reserved)
                if request_id is not None:
                    ends.callback(budgets.keep, owner, num_tokens, request_id)


class Limiter:
    """Checks and counts. Belongs to one event loop.

    Args:
        database: migrated.
        config: what to do without the database.
        process_id: of this server process, never used before.
    """

    def __init__(self, database: Database, config: AccountsConfig, process_id: str) -> None:
        self._config = config
        self.buckets = Buckets(database)
        self.slots = Slots(database, process_id)
        self.budgets = Budgets(database)

    async def admit(self, scopes: Sequence[Scope], num_tokens: int) -> Admission:
        """Take one request and its tokens from every limit, or nothing.

        Args:
            scopes: those that have limits.
            num_tokens: the prompt's, and the output's as far as the client has bounded it.

        Raises:
            RateLimitError, QuotaExceededError: a limit is reached.
            DatabaseUnavailableError: it does not answer, and the operator wants no requests then.
        """
        admission = Admission(self, scopes, num_tokens)
        with contextlib.ExitStack() as undo:
            for scope in scopes:
                await self._take_budget(scope, num_tokens)
                undo.callback(self.budgets.put, (scope.kind, scope.name), num_tokens)
                for limit, amount, noun in ((scope.requests(), 1, "requests"), (scope.tokens(), num_tokens, "tokens")):
                    if limit is not None:
                        what = f"The {scope.kind}'s limit of {limit.per_minute} {noun}"
                        give_back = await self._take(limit, amount, what)
                        undo.callback(give_back, amount)
                        if noun == "tokens":
                            admission._give_back.append(give_back)
                name = await self._take_slot(scope)
                if name is not None:
                    undo.callback(self.slots.put, name)
                    admission._slots.append(name)
            undo.pop_all()
        return admission

    def states(self, scopes: Sequence[Scope]) -> RateLimitStates:
        """Return what is left, for the headers of an answer."""
        requests = [self.buckets.state(limit) for scope in scopes if (limit := scope.requests()) is not None]
        tokens = [self.buckets.state(limit) for scope in scopes if (limit := scope.tokens()) is not None]
        return RateLimitStates(_tightest(requests), _tightest(tokens))

    async def maintain(self, *, is_last: bool = False) -> None:
        """Give back, renew, read again. Called every second, and when this process ends: then nothing unused is kept.

        Raises:
            DatabaseUnavailableError: it does not answer.
        """
        await self.buckets.settle(is_last=is_last)
        await self.slots.heartbeat(is_last=is_last)
        await self.budgets.refresh()

    async def _take_budget(self, scope: Scope, num_tokens: int) -> None:
        owner = (scope.kind, scope.name)

        async def take() -> None:
            await self.budgets.take(owner, scope.limits, num_tokens)

        await self._or_without_database(take, lambda: self.budgets.take_without_database(owner, num_tokens))

    async def _take(self, limit: RateLimit, amount: int, what: str) -> Callable[[int], None]:
        """Take from a bucket. Returns what gives back to where it was taken from."""
        put = self.buckets.put

        async def take() -> float:
            return await self.buckets.take(limit, amount)

        def take_without_database() -> float:
            nonlocal put
            put = self.buckets.put_without_database
            return self.buckets.take_without_database(limit, amount)

        wait_s = await self._or_without_database(take, take_without_database)
        if math.isinf(wait_s):
            raise RateLimitError(f"{what} a minute is smaller than this request, which needs {amount}.", None)
        if wait_s > 0:
            raise RateLimitError(f"{what} a minute is reached; try again in {wait_s:.1f} s.", wait_s)
        return functools.partial(put, limit)

    async def _take_slot(self, scope: Scope) -> str | None:
        limit = scope.limits.max_concurrency
        if limit is None:
            return None
        name = f"{scope.kind}:{scope.name}"

        async def take() -> bool:
            return await self.slots.take(name, limit)

        if not await self._or_without_database(take, lambda: self.slots.take_without_database(name, limit)):
            raise RateLimitError(f"The {scope.kind}'s limit of {limit} requests at once is reached.", _BUSY_RETRY_S)
        return name

    async def _or_without_database(
        self, work: Callable[[], Awaitable[_Result]], fallback: Callable[[], _Result]
    ) -> _Result:
        try:
            return await work()
        except DatabaseUnavailableError:
            if self._config.when_database_is_down == "refuse":
                raise
            return fallback()


def _tightest(states: Sequence[BucketState]) -> BucketState | None:
    return min(states, key=lambda state: state.remaining, default=None)
