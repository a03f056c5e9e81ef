"""API key -> principal, from memory where possible. Belongs to one event loop.

A change made through this process is seen at once (``forget_all``); one made by another process within
``revision_poll_s`` plus a query, because ``watch`` compares the database's revision and forgets everything when it has
moved. Remembered entries are bounded in number and in age, those of unknown keys included.
"""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from pomona.accounts import clock, keys
from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from pomona.accounts.principal import Principal
from pomona.accounts.tenants import TenantStore
from pomona.core.errors import DatabaseUnavailableError

_LOGGER = logging.getLogger(__name__)
_NOBODY_DIGEST = keys.digest_of("")
"""What keys that nobody has are compared with, so that the comparison is made for every key."""


class Authenticator:
    """Resolves presented keys.

    Args:
        database: migrated.
        store: over the same database.
        config: bounds of the caches.
    """

    def __init__(self, database: Database, store: TenantStore, config: AccountsConfig) -> None:
        self._database = database
        self._store = store
        self._config = config
        # Key id -> what it stands for, and the monotonic time of the look-up; the newest is last. Unknown keys have a
        # table of their own, so that a flood of them pushes out nobody.
        self._known: OrderedDict[str, tuple[Principal, float]] = OrderedDict()
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[Principal | None]] = {}
        self._generation = 0
        self._listeners: list[Callable[[], None]] = []

    async def principal_of(self, key_id: str) -> Principal | None:
        """Return what a key stands for without having seen it, for work that it has ordered; None if it has ended.

        Raises:
            DatabaseUnavailableError: the key is not remembered and cannot be looked up.
        """
        principal = await self._principal(key_id)
        has_ended = principal is None or (principal.expires_s is not None and principal.expires_s <= clock.now_s())
        return None if has_ended else principal

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called whenever identities, limits, prices or shares have changed."""
        self._listeners.append(listener)

    def forget_all(self) -> None:
        """Look everything up again: something has changed."""
        self._generation += 1
        self._known.clear()
        self._unknown.clear()
        self._lookups.clear()
        for listener in self._listeners:
            listener()

    async def authenticate(self, text: str) -> Principal | None:
        """Return what a presented key stands for; None if it is not valid now.

        Raises:
            DatabaseUnavailableError: the key is not remembered and cannot be looked up.
        """
        key_id = keys.key_id_of(text)
        principal = None if key_id is None else await self._principal(key_id)
        is_right = keys.is_key(text, _NOBODY_DIGEST if principal is None else principal.digest)
        if principal is None or not is_right:
            return None
        if principal.expires_s is not None and principal.expires_s <= clock.now_s():
            return None
        return principal

    async def _principal(self, key_id: str) -> Principal | None:
        now_s = time.monotonic()
        known = self._known.get(key_id)
        if known is not None and now_s - known[1] <= self._config.known_key_ttl_s:
            return known[0]
        if known is None and now_s - self._unknown.get(key_id, -math.inf) <= self._config.unknown_key_ttl_s:
            return None
        try:
            return await self._look_up(key_id)
        except DatabaseUnavailableError:
            if known is None or not self._may_trust(known[1]):
                raise
            return known[0]

    def _may_trust(self, found_s: float) -> bool:
        is_answering = self._config.when_database_is_down == "answer"
        return is_answering and time.monotonic() - found_s <= self._config.max_outage_s

    async def _look_up(self, key_id: str) -> Principal | None:
        """Ask the database, once for all that wait for the same key."""
        lookup = self._lookups.get(key_id)
        if lookup is None:
            lookup = asyncio.create_task(self._database.ask(self._store.find_principal, key_id))
            self._lookups[key_id] = lookup
            generation = self._generation
            lookup.add_done_callback(lambda task: self._remember(key_id, task, generation))
        return await asyncio.shield(lookup)

    def _remember(self, key_id: str, lookup: "asyncio.Task[Principal | None]", generation: int) -> None:
        if self._lookups.get(key_id) is lookup:
            del self._lookups[key_id]
        # Errors belong to whoever waits. What was asked before a change may be its state before the change.
        if lookup.cancelled() or lookup.exception() is not None or generation != self._generation:
            return
        principal, now_s = lookup.result(), time.monotonic()
        self._known.pop(key_id, None)
        self._unknown.pop(key_id, None)
        if principal is None:
            self._unknown[key_id] = now_s
        else:
            self._known[key_id] = (principal, now_s)
        for table in (self._known, self._unknown):
            if len(table) > self._config.key_cache_size:
                table.popitem(last=False)

    async def watch(self, revision: int) -> None:
        """Follow changes made by other processes since ``revision``, until cancelled."""
        seen = revision
        is_down = False
        while True:
            await asyncio.sleep(self._config.revision_poll_s)
            try:
                revision = await self._database.run(self._database.revision)
            except DatabaseUnavailableError as error:
                if not is_down:
                    _LOGGER.warning("%s", error)
                is_down = True
                continue
            except Exception:  # whatever it was, changes are followed as long as the server runs
                _LOGGER.exception("The revision could not be read; trying again")
                continue
            is_down = False
            own = [number for number in tuple(self._database.own_revisions) if number <= revision]
            # What this process has changed it has forgotten already.
            if revision - seen != sum(number > seen for number in own):
                self.forget_all()
            self._database.own_revisions.difference_update(own)
            seen = revision
