"""Around every generation on a server with accounts: limits before it, the ledger during it, headers on its answer."""

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from pomona.accounts.accounts import Accounts, Booking
from pomona.accounts.buckets import BucketState
from pomona.accounts.ledger import Entry
from pomona.accounts.limiter import Scope
from pomona.accounts.principal import Principal
from pomona.server.adapter_service import Lease
from pomona.server.context import context_of


@dataclass(frozen=True, slots=True)
class RequestSize:
    """How much a request asks for."""

    prompt_tokens: tuple[int, ...]
    """Of each prompt."""
    max_output_tokens: int
    """As far as the client has bounded it."""
    choices_per_prompt: int


class Admitted:
    """A generation that limits have let in, before and after its adapter is there.

    Args:
        accounts: of the server.
        principal: who asks.
        base_name: of the model.
        size: of the request.
        is_batch: it is a batch's line.
    """

    def __init__(
        self, accounts: Accounts, principal: Principal, base_name: str, size: RequestSize, *, is_batch: bool
    ) -> None:
        self._accounts = accounts
        self._principal = principal
        self._base_name = base_name
        self._size = size
        self._is_batch = is_batch
        self._entry: Entry | None = None

    def begin(self, lease: Lease, request_id: str) -> Entry:
        """Open the ledger's line. Once.

        Args:
            lease: the adapter.
            request_id: the ledger's; never used twice.

        Raises:
            DatabaseUnavailableError: it cannot be written.
        """
        assert self._entry is None, "a request has one line"
        adapter, size = lease.adapter_name or self._base_name, self._size
        booking = Booking(
            request_id,
            adapter,
            lease.adapter_id or "",
            size.prompt_tokens,
            size.choices_per_prompt,
            is_batch=self._is_batch,
        )
        self._entry = self._accounts.begin(self._principal, booking)
        return self._entry

    def end(self) -> tuple[int, str | None]:
        """Close the ledger's line, if there is one; return the tokens that were used, and the line's id."""
        if self._entry is None:
            return 0, None
        self._entry.close("abort", time.monotonic())  # has no effect if it is closed, as it should be
        counted, start = self._entry.counted, self._entry.start
        return counted.input_tokens + counted.output_tokens, start.request_id


@contextlib.asynccontextmanager
async def admitted(
    connection: HTTPConnection, principal: Principal, adapter_name: str | None, size: RequestSize
) -> AsyncIterator[Admitted]:
    """Admit a generation for the length of the block, or refuse it, before its adapter is brought in.

    Args:
        connection: whose answer gets the headers.
        principal: who asks.
        adapter_name: the catalogue's; None for the base model.
        size: of the request.

    Raises:
        RateLimitError, QuotaExceededError: a limit is reached.
        DatabaseUnavailableError: the operator wants no requests without the database.
    """
    context = context_of(connection)
    accounts = context.accounts
    assert accounts is not None, "only accounts know principals"
    base_name = context.model.name
    scopes = accounts.scopes(principal, adapter_name or base_name)
    accounts.ledger.check()
    if scopes:
        connection.scope["state"]["limit_headers"] = lambda: limit_headers(accounts, scopes)
    num_tokens = sum(size.prompt_tokens) + size.max_output_tokens
    admission = await accounts.limiter.admit(scopes, num_tokens) if scopes else None
    generation = Admitted(accounts, principal, base_name, size, is_batch="is_batch" in connection.scope["state"])
    used: tuple[int, str | None] = (0, None)
    try:
        try:
            yield generation
        finally:
            used = generation.end()
    finally:
        if admission is not None:
            admission.settle(*used)


def limit_headers(accounts: Accounts, scopes: list[Scope]) -> Mapping[str, str]:
    """Return OpenAI's ``x-ratelimit-*`` headers: the tightest limit on requests, and on tokens."""
    states = accounts.limiter.states(scopes)
    headers: dict[str, str] = {}
    for noun, state in (("requests", states.requests), ("tokens", states.tokens)):
        if state is not None:
            headers |= _headers_of(noun, state)
    return headers


def _headers_of(noun: str, state: BucketState) -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{noun}": str(state.limit),
        f"x-ratelimit-remaining-{noun}": str(state.remaining),
        f"x-ratelimit-reset-{noun}": duration(state.reset_s),
    }


def duration(seconds: float) -> str:
    """Write a duration as OpenAI's headers do: ``20ms``, ``1.5s``, ``6m0s``."""
    if seconds < 1.0:
        return f"{max(0, round(seconds * 1000))}ms"
    minutes, rest = divmod(seconds, 60.0)
    return f"{int(minutes)}m{int(rest)}s" if minutes else f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
