"""Concurrency limits that several server processes share: each holds some slots, and all together at most the limit.

A process takes slots from the database a few at a time and keeps them while it is busy; a heartbeat renews them. Slots
of a process that died are free again after ``EXPIRY_S``. A process that hangs for longer than that without dying may
then be over the limit by what it holds; nothing else exceeds it. The processes may fall short by what others keep
without using it: at most an eighth of the limit each, for at most two seconds.
"""

import asyncio
from typing import Final

from sqlalchemy import text

from pomona.accounts.database import Database

EXPIRY_S: Final = 15.0
_CHUNKS: Final = 8

_LOCK: Final = text(
    "INSERT INTO slots (name, process_id, num_held, expires_s) VALUES (:name, '', 0, 0)"
    " ON CONFLICT (name, process_id) DO UPDATE SET num_held = 0"
)
"""Every process changes this row of a limit first, so that they come one after the other."""
_BURY: Final = text("DELETE FROM slots WHERE name = :name AND process_id <> '' AND expires_s <= :now")
_TAKE: Final = text(
    "INSERT INTO slots (name, process_id, num_held, expires_s)"
    " SELECT :name, :process, CAST(:wanted AS BIGINT), :expires"
    " WHERE (SELECT COALESCE(SUM(num_held), 0) FROM slots WHERE name = :name) + :wanted <= :limit"
    " ON CONFLICT (name, process_id) DO UPDATE SET expires_s = excluded.expires_s,"
    " num_held = excluded.num_held + slots.num_held"
    " RETURNING num_held"
)
_KEEP: Final = text(
    "INSERT INTO slots (name, process_id, num_held, expires_s) VALUES (:name, :process, :held, :expires)"
    " ON CONFLICT (name, process_id) DO UPDATE SET num_held = excluded.num_held, expires_s = excluded.expires_s"
)
"""Also what was taken while the database was down."""
_FREE: Final = text("DELETE FROM slots WHERE name = :name AND process_id = :process")


class _Held:
    """Slots of one limit that this process holds."""

    __slots__ = ("lock", "num_held", "num_used", "num_waiting", "peak")

    def __init__(self) -> None:
        self.num_held = 0
        self.num_used = 0
        self.peak = 0
        """Most used at once since the last heartbeat."""
        self.lock = asyncio.Lock()
        self.num_waiting = 0
        """For the lock, or for the statement under it. The lock does not tell: between two holders it is free."""


class Slots:
    """This process's share of all concurrency limits. Belongs to one event loop.

    Args:
        database: migrated.
        process_id: of this process, never used before.
    """

    def __init__(self, database: Database, process_id: str) -> None:
        self._database = database
        self._process_id = process_id
        self._held: dict[str, _Held] = {}

    async def take(self, name: str, limit: int) -> bool:
        """Take one slot; False if all are in use.

        Raises:
            DatabaseUnavailableError: one more was needed, and the database does not answer.
        """
        held = self._held.setdefault(name, _Held())
        if held.num_used >= limit:
            return False
        if held.num_used >= held.num_held:
            held.num_waiting += 1
            try:
                async with held.lock:
                    if held.num_used >= held.num_held and not await self._extend(name, held, limit):
                        return False
                    held.num_used += 1
            finally:
                held.num_waiting -= 1
        else:
            held.num_used += 1
        held.peak = max(held.peak, held.num_used)
        return True

    def take_without_database(self, name: str, limit: int) -> bool:
        """``take`` while the database is down: this process alone keeps the limit."""
        held = self._held.setdefault(name, _Held())
        if held.num_used >= limit:
            return False
        held.num_used += 1
        return True

    def put(self, name: str) -> None:
        """Give back one slot."""
        held = self._held[name]
        held.num_used -= 1
        assert held.num_used >= 0, "a slot was given back twice"

    async def heartbeat(self, *, is_last: bool = False) -> None:
        """Renew what is used and free the rest. Called every second.

        Args:
            is_last: this process ends; else what was used since the last time is kept until the next.

        Raises:
            DatabaseUnavailableError: it does not answer; everything is kept for the next time.
        """
        # One that is just being extended is renewed by that.
        ours = [(name, held) for name, held in self._held.items() if not held.lock.locked()]
        for _, held in ours:
            await held.lock.acquire()
            # Here first: what is freed must not be used while the statement is under way.
            held.num_held = held.num_used if is_last else max(held.num_used, min(held.peak, held.num_held))
            held.peak = held.num_used
        try:
            if ours:
                await self._database.ask(self._keep, [(name, held.num_held) for name, held in ours])
        finally:
            for _, held in ours:
                held.lock.release()
        for name, held in ours:
            if not (held.num_held or held.num_used or held.num_waiting):
                del self._held[name]

    async def _extend(self, name: str, held: _Held, limit: int) -> bool:
        chunk = max(1, limit // _CHUNKS)
        for wanted in (chunk, 1) if chunk > 1 else (1,):
            num_held = await self._database.ask(self._take, name, limit, wanted)
            if num_held is not None:
                held.num_held = num_held
                return True
        return False

    def _take(self, name: str, limit: int, wanted: int) -> int | None:
        values = {"name": name, "process": self._process_id, "wanted": wanted, "limit": limit}
        with self._database.write() as connection:
            connection.execute(_LOCK, {"name": name})
            now_s = self._database.now_s(connection)
            connection.execute(_BURY, {"name": name, "now": now_s})
            row = connection.execute(_TAKE, {**values, "expires": now_s + EXPIRY_S}).first()
        return None if row is None else int(row[0])

    def _keep(self, held: list[tuple[str, int]]) -> None:
        with self._database.write() as connection:
            expires_s = self._database.now_s(connection) + EXPIRY_S
            for name, num_held in sorted(held):  # in order, so that two processes never wait for each other
                values = {"name": name, "process": self._process_id}
                if num_held:
                    connection.execute(_KEEP, {**values, "held": num_held, "expires": expires_s})
                else:
                    connection.execute(_FREE, values)
