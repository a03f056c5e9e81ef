"""Rate limits that several server processes share: leaky buckets in the database, leased from in chunks.

A bucket holds a minute's worth and drains at that rate. A process takes a chunk of room with one statement, which
either fits whole or changes nothing, and spends it from memory for at most a second; what it has not spent by then it
gives back. So the processes together never exceed a limit. They may fall short of it by what others hold: at most a
sixteenth of a minute's worth per other process, for at most a second. A limit below 32 per minute is never taken ahead.
A clock that is put back by more than a minute empties buckets, once: they would not drain before it has caught up.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from sqlalchemy import text

from pomona.accounts.database import Database

_CHUNKS_PER_MINUTE: Final = 16
LEASE_S: Final = 1.0

_DRAINED: Final = (
    "(CASE WHEN {now} < buckets.at_s - 60 THEN 0.0"
    " WHEN {now} > buckets.at_s AND buckets.level <= ({now} - buckets.at_s) * :rate THEN 0.0"
    " WHEN {now} > buckets.at_s THEN buckets.level - ({now} - buckets.at_s) * :rate ELSE buckets.level END)"
)
_TAKE: Final = text(
    "INSERT INTO buckets (name, level, at_s) VALUES (:name, :amount, :now)"
    " ON CONFLICT (name) DO UPDATE SET level = {drained} + excluded.level,"
    " at_s = CASE WHEN excluded.at_s BETWEEN buckets.at_s - 60 AND buckets.at_s THEN buckets.at_s"
    " ELSE excluded.at_s END"
    " WHERE {drained} + excluded.level <= :capacity RETURNING level".format(
        drained=_DRAINED.format(now="excluded.at_s")
    )
)
"""Put ``amount`` into the bucket if it fits. PostgreSQL and SQLite agree on every word of it."""
_PUT: Final = text(
    "UPDATE buckets SET level = CASE WHEN level > -:amount THEN level + :amount ELSE 0.0 END WHERE name = :name"
)
"""Give back (a negative amount) or add what is owed."""
_LEVEL: Final = text("SELECT level, at_s FROM buckets WHERE name = :name")


def bucket_name(kind: str, name: str, noun: str) -> str:
    """Return what the bucket is called of a tenant's, a key's or an adapter's limit on ``noun``, requests or tokens."""
    return f"{kind}:{name}:{noun}"


@dataclass(frozen=True, slots=True)
class RateLimit:
    """One limit."""

    name: str
    """Of its bucket, such as ``tenant:acme:tokens``."""
    per_minute: int

    @property
    def rate_per_s(self) -> float:
        """How fast the bucket drains."""
        return self.per_minute / 60.0


@dataclass(frozen=True, slots=True)
class BucketState:
    """What a client may know of a limit."""

    limit: int
    """Per minute."""
    remaining: int
    reset_s: float
    """Until everything is available again."""


class _Lease:
    """What this process holds of one bucket."""

    __slots__ = (
        "available",
        "expires_s",
        "level",
        "level_at_s",
        "lock",
        "num_waiting",
        "refused_above",
        "refused_until_s",
    )

    def __init__(self) -> None:
        self.available = 0.0
        """Leased and not spent; negative: spent more than was promised, still to be written."""
        self.expires_s = 0.0
        self.level = 0.0
        self.level_at_s = 0.0
        """Monotonic time of the level, which includes all that is leased."""
        self.refused_above = 0.0
        self.refused_until_s = 0.0
        self.lock = asyncio.Lock()
        self.num_waiting = 0
        """For the lock, or for the statement under it."""


class Buckets:
    """This process's leases on all buckets. Belongs to one event loop.

    Args:
        database: migrated.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._leases: dict[str, _Lease] = {}

    async def take(self, limit: RateLimit, amount: int) -> float:
        """Spend ``amount`` of a limit, all or nothing.

        Returns:
            0.0 if it was spent; else the seconds after which it can succeed, infinite if it never can.

        Raises:
            DatabaseUnavailableError: more than is leased was needed, and the database does not answer.
        """
        if amount > limit.per_minute:
            return float("inf")
        lease = self._leases.setdefault(limit.name, _Lease())
        if lease.available >= amount and time.monotonic() < lease.expires_s:
            lease.available -= amount
            return 0.0
        lease.num_waiting += 1
        try:
            async with lease.lock:
                is_stale = time.monotonic() >= lease.expires_s
                while is_stale or lease.available < amount:  # others spend of it while it is extended
                    wait_s = await self._extend(limit, lease, amount)
                    if wait_s > 0:
                        return wait_s
                    is_stale = False
                lease.available -= amount
                return 0.0
        finally:
            lease.num_waiting -= 1

    def put(self, limit: RateLimit, amount: int) -> None:
        """Give back what was not used, or (negative) owe what was used beyond what was taken."""
        lease = self._leases.setdefault(limit.name, _Lease())
        lease.available += amount

    def take_without_database(self, limit: RateLimit, amount: int) -> float:
        """``take`` while the database is down: this process alone keeps the limit."""
        lease = self._leases.setdefault(limit.name, _Lease())
        now_s = time.monotonic()
        level = max(0.0, lease.level - (now_s - lease.level_at_s) * limit.rate_per_s)
        if level + amount > limit.per_minute:
            return (level + amount - limit.per_minute) / limit.rate_per_s
        lease.level, lease.level_at_s = level + amount, now_s
        return 0.0

    def put_without_database(self, limit: RateLimit, amount: int) -> None:
        """``put`` of what ``take_without_database`` has taken: the database knows nothing of it."""
        lease = self._leases.get(limit.name)
        if lease is not None:
            lease.level -= amount

    def state(self, limit: RateLimit) -> BucketState:
        """What is left of a limit, as far as this process knows."""
        lease = self._leases.get(limit.name)
        if lease is None:
            return BucketState(limit.per_minute, limit.per_minute, 0.0)
        drained = (time.monotonic() - lease.level_at_s) * limit.rate_per_s
        used = max(0.0, lease.level - drained - lease.available)
        remaining = max(0, int(limit.per_minute - used))
        return BucketState(limit.per_minute, remaining, used / limit.rate_per_s if limit.per_minute else 60.0)

    async def settle(self, *, is_last: bool = False) -> None:
        """Give back what was leased and is no longer fresh, and write down what is owed. Called every second.

        Args:
            is_last: this process ends: what is fresh is given back, too.

        Raises:
            DatabaseUnavailableError: it does not answer; everything is kept for the next time.
        """
        now_s = time.monotonic()
        stale = [
            (name, lease)
            for name, lease in self._leases.items()
            if is_last or lease.available < 0 or now_s >= lease.expires_s
        ]
        for name, lease in stale:
            async with lease.lock:
                amount, lease.available = lease.available, 0.0
                try:
                    if amount:
                        await self._database.ask(self._put, name, -amount)
                except BaseException:
                    lease.available += amount
                    raise
                lease.level = max(0.0, lease.level - amount)
            if not (lease.num_waiting or lease.available) and now_s - lease.level_at_s > 120.0:
                del self._leases[name]

    async def _extend(self, limit: RateLimit, lease: _Lease, amount: int) -> float:
        """Lease at least ``amount``: a chunk if there is room for it. Returns the seconds to wait, 0.0 for none."""
        now_s = time.monotonic()
        needed = amount - lease.available
        if now_s < lease.refused_until_s and needed >= lease.refused_above:
            drained = max(0.0, lease.level - (now_s - lease.level_at_s) * limit.rate_per_s)
            # When it fits, not when the database is asked again: that is what the client is told.
            return max(lease.refused_until_s - now_s, (drained + needed - limit.per_minute) / limit.rate_per_s)
        chunk = max(needed, float(limit.per_minute // _CHUNKS_PER_MINUTE))
        for wanted in (chunk, needed) if chunk > needed else (needed,):
            level = await self._database.ask(self._take, limit, wanted)
            if level is not None:
                lease.available += wanted
                lease.level, lease.level_at_s = level, now_s
                lease.expires_s = now_s + LEASE_S
                return 0.0
        level = await self._database.ask(self._level, limit)
        wait_s = max(0.001, (level + needed - limit.per_minute) / limit.rate_per_s)
        lease.level, lease.level_at_s = level, now_s
        lease.refused_above = needed
        # Not longer than that: others may give back what they hold.
        lease.refused_until_s = now_s + min(wait_s, LEASE_S / 2)
        return wait_s

    def _take(self, limit: RateLimit, amount: float) -> float | None:
        values = {"name": limit.name, "amount": amount, "rate": limit.rate_per_s, "capacity": limit.per_minute}
        with self._database.write() as connection:
            row = connection.execute(_TAKE, {**values, "now": self._database.now_s(connection)}).first()
        return None if row is None else float(row[0])

    def _level(self, limit: RateLimit) -> float:
        with self._database.read() as connection:
            row, now_s = connection.execute(_LEVEL, {"name": limit.name}).first(), self._database.now_s(connection)
        if row is None:
            return 0.0
        return max(0.0, float(row[0]) - max(0.0, now_s - float(row[1])) * limit.rate_per_s)

    def _put(self, name: str, amount: float) -> None:
        with self._database.write() as connection:
            connection.execute(_PUT, {"name": name, "amount": amount})
