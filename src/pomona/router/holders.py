"""Holders: which replicas hold a thing (an adapter, a prefix), as far as the router can tell from what it sent where.

Each replica is taken to keep what it used last until its room is full, as its scheduler does; a report of the replica
puts the belief right. Lookups cost the number of holders asked for, never the number of replicas.
"""

import itertools
from collections import OrderedDict
from collections.abc import Container, Hashable, Iterable
from typing import Generic, TypeVar

from pomona.core.ids import ReplicaId

Thing = TypeVar("Thing", bound=Hashable)


class Holders(Generic[Thing]):
    """A two-way map between replicas and the things they hold, least recently used first on both sides."""

    def __init__(self) -> None:
        self._holders: dict[Thing, OrderedDict[ReplicaId, None]] = {}
        self._held: dict[ReplicaId, OrderedDict[Thing, int]] = {}
        self._room: dict[ReplicaId, int] = {}
        self._free: dict[ReplicaId, int] = {}

    def replace(self, replica_id: ReplicaId, room: int, held: Iterable[tuple[Thing, int]]) -> None:
        """Take a replica's word for what it holds.

        Args:
            replica_id: a new replica, or a known one.
            room: sum of sizes that it can hold.
            held: (thing, size), least recently used first.
        """
        self.forget(replica_id)
        self._held[replica_id] = OrderedDict()
        self._room[replica_id] = self._free[replica_id] = room
        for thing, size in held:
            self.use(replica_id, thing, size)

    def forget(self, replica_id: ReplicaId) -> None:
        """The replica is gone, if it was known."""
        for thing in self._held.pop(replica_id, ()):
            self._let_go(replica_id, thing)
        self._room.pop(replica_id, None)
        self._free.pop(replica_id, None)

    def use(self, replica_id: ReplicaId, thing: Thing, size: int) -> None:
        """The replica uses a thing now: it holds it, and dropped what it used longest ago if there was no room. A thing
        larger than all its room is not kept."""
        held = self._held[replica_id]
        if thing in held:
            held.move_to_end(thing)
            self._holders[thing].move_to_end(replica_id)
            return
        if size > self._room[replica_id]:
            return
        free = self._free[replica_id] - size
        while free < 0:
            dropped, dropped_size = held.popitem(last=False)
            self._let_go(replica_id, dropped)
            free += dropped_size
        self._free[replica_id] = free
        held[thing] = size
        self._holders.setdefault(thing, OrderedDict())[replica_id] = None

    def has(self, replica_id: ReplicaId, thing: Thing) -> bool:
        """True if the replica is believed to hold it."""
        return replica_id in self._holders.get(thing, ())

    def latest(self, thing: Thing, num_holders: int, among: Container[ReplicaId]) -> list[ReplicaId]:
        """Up to so many holders, the one that used it last first; those that take no requests are passed over.

        Args:
            thing: what they hold.
            num_holders: how many at most.
            among: the replicas that take requests.
        """
        holders = (holder for holder in reversed(self._holders.get(thing, {})) if holder in among)
        return list(itertools.islice(holders, num_holders))

    def _let_go(self, replica_id: ReplicaId, thing: Thing) -> None:
        holders = self._holders[thing]
        del holders[replica_id]
        if not holders:
            del self._holders[thing]
