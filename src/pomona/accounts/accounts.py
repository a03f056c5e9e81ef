"""Accounts: everything about tenants that a server process needs, started and stopped as one."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ParamSpec, Self, TypeVar

from pomona.accounts import clock
from pomona.accounts.authenticator import Authenticator
from pomona.accounts.batches import BatchStore
from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from pomona.accounts.journal import Start
from pomona.accounts.ledger import Entry, Ledger
from pomona.accounts.limiter import Limiter, Scope
from pomona.accounts.principal import Limits, Principal
from pomona.accounts.shares import OwnedAdapter, ShareStore
from pomona.accounts.tenants import TenantStore
from pomona.accounts.usage import UsageStore
from pomona.core.errors import DatabaseUnavailableError

_LOGGER = logging.getLogger(__name__)
_MAINTENANCE_S = 1.0
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Booking:
    """What is known of a request when it is accepted."""

    request_id: str
    adapter: str
    """Qualified name, or the base model's."""
    adapter_id: str
    prompt_tokens: tuple[int, ...]
    """Of each prompt."""
    choices_per_prompt: int = 1
    is_batch: bool = False
    """A batch's line."""


class Accounts:
    """Tenants, limits and the ledger of one server process. Belongs to one event loop.

        async with Accounts(config) as accounts: ...

    Args:
        config: settings.

    Raises:
        ConfigError: the database's driver is not installed, or the data folder cannot be made.
    """

    def __init__(self, config: AccountsConfig) -> None:
        config.make_data_dir()
        process_id = secrets.token_hex(8)
        self.config = config
        self.process_id = process_id
        self.database = Database(config.url)
        self.tenants = TenantStore(self.database)
        self.usage = UsageStore(self.database)
        self.shares = ShareStore(self.database)
        self.batches = BatchStore(self.database, config.data_dir / "files")
        self.authenticator = Authenticator(self.database, self.tenants, config)
        self.limiter = Limiter(self.database, config, process_id)
        self.ledger = Ledger(self.database, config, process_id, self.limiter.budgets.note)
        self._adapters: Mapping[str, OwnedAdapter] = {}
        self._adapter_limits: Mapping[str, Limits] = {}
        self._are_facts_stale = True
        self._has_changed = asyncio.Event()
        self._reading_facts = asyncio.Lock()
        self._adapter_listeners: list[Callable[[Mapping[str, OwnedAdapter]], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.authenticator.on_change(self._forget_facts)

    async def __aenter__(self) -> Self:
        """Bring the tables up to date, take over what dead processes left, and begin to follow changes.

        Raises:
            DatabaseUnavailableError: the database does not answer.
        """
        await self.database.run(self.database.migrate)
        revision = await self.database.run(self.database.revision)
        await self.ledger.adopt()
        await self.facts()
        for work in (self.authenticator.watch(revision), self.ledger.run(), self._maintain(), self._follow()):
            self._tasks.append(asyncio.create_task(work))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Write down everything and stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self.limiter.maintain(is_last=True)
        except DatabaseUnavailableError as error:
            _LOGGER.warning("%s", error)
        await self.ledger.close()
        await asyncio.to_thread(self.database.close)

    async def change(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Change identities, limits, prices or shares in the database; this process knows of it on return."""
        change = asyncio.create_task(self.database.run(work, *args, **kwargs))
        change.add_done_callback(self._note_change)
        result = await asyncio.shield(change)
        with contextlib.suppress(DatabaseUnavailableError):  # it is made by now; ``_follow`` reads again
            await self.facts()
        return result

    @property
    def adapters(self) -> Mapping[str, OwnedAdapter]:
        """Adapters that belong to tenants, by qualified name, as they were when ``facts`` was last awaited."""
        return self._adapters

    def on_adapters(self, listener: Callable[[Mapping[str, OwnedAdapter]], None]) -> None:
        """Have ``listener`` called with ``adapters`` now, and whenever they have been read again."""
        self._adapter_listeners.append(listener)
        listener(self._adapters)

    async def facts(self) -> None:
        """Read who owns which adapter and the adapters' limits again, if anything has changed."""
        async with self._reading_facts:
            while self._are_facts_stale:
                self._are_facts_stale = False
                try:
                    adapters = await self.database.run(self.shares.adapters)
                    self._adapter_limits = await self.database.run(self.tenants.adapter_limits)
                except BaseException:
                    self._are_facts_stale = True
                    raise
                self._adapters = adapters
                for listener in self._adapter_listeners:
                    try:
                        listener(self._adapters)
                    except Exception:  # a change is made by now: whoever made it must not hear otherwise
                        _LOGGER.exception("A listener failed when adapters were read again")

    def scopes(self, principal: Principal, adapter: str) -> list[Scope]:
        """Return whoever has limits for a request of this principal for this adapter (qualified name)."""
        assert principal.tenant_id is not None, "administrators make no requests"
        every = (
            Scope("tenant", principal.tenant_id, principal.tenant_limits),
            Scope("key", principal.root_id, principal.key_limits),
            Scope("adapter", adapter, self._adapter_limits.get(adapter, _NO_LIMITS)),
        )
        return [scope for scope in every if not scope.limits.is_empty]

    def begin(self, principal: Principal, booking: Booking) -> Entry:
        """Open the ledger's line of a request; see ``Ledger.begin``."""
        assert principal.tenant_id is not None, "administrators make no requests"
        start = Start(
            number=0,
            slot=0,
            request_id=booking.request_id,
            tenant_id=principal.tenant_id,
            key_id=principal.key_id,
            root_id=principal.root_id,
            adapter=booking.adapter,
            adapter_id=booking.adapter_id,
            prompt_tokens=booking.prompt_tokens,
            started_s=clock.now_s(),
            is_batch=booking.is_batch,
        )
        return self.ledger.begin(start, booking.choices_per_prompt)

    def _note_change(self, change: "asyncio.Task[_Result]") -> None:
        """Also if whoever made the change waits no more: the watch does not look at changes of this process.

        Not if it failed: without the database, what is remembered is all that there is.
        """
        if not change.cancelled() and change.exception() is None:
            self.authenticator.forget_all()

    def _forget_facts(self) -> None:
        self._are_facts_stale = True
        self._has_changed.set()
        self.ledger.forget_prices()

    async def _follow(self) -> None:
        """Read the facts again after every change, those of other processes included."""
        while True:
            await self._has_changed.wait()
            self._has_changed.clear()
            try:
                await self.facts()
            except DatabaseUnavailableError as error:
                _LOGGER.warning("%s", error)
            except Exception:  # whatever it was, changes are followed as long as the server runs
                _LOGGER.exception("Changes could not be followed; trying again")
            else:
                continue
            await asyncio.sleep(_MAINTENANCE_S)
            self._has_changed.set()

    async def _maintain(self) -> None:
        while True:
            await asyncio.sleep(_MAINTENANCE_S)
            try:
                await self.limiter.maintain()
            except DatabaseUnavailableError as error:
                _LOGGER.warning("%s", error)
            except Exception:  # whatever it was, limits are kept as long as the server runs
                _LOGGER.exception("Limits could not be maintained; trying again")


_NO_LIMITS = Limits()
