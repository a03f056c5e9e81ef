"""What a routing policy is, and the policies that look at load alone.

A policy is told of every replica that joins, changes or leaves, keeps whatever index it needs, and answers ``choose``
from that index. Equal calls, and an equal seed, give equal choices.
"""

import random
from collections import OrderedDict
from typing import Protocol

from pomona.core.ids import ReplicaId
from pomona.router.max_tree import ABSENT, ANY, MaxTree
from pomona.router.snapshot import ReplicaState, RouteRequest


class RoutingPolicy(Protocol):
    """Chooses a replica for a request."""

    def put(self, replica: ReplicaState) -> None:
        """A replica joined, or its state changed."""
        ...

    def drop(self, replica_id: ReplicaId) -> None:
        """A replica left, or takes no new requests."""
        ...

    def choose(self, request: RouteRequest) -> ReplicaId | None:
        """The replica to send the request to; None to let it wait until something changes."""
        ...


class _Members:
    """Replicas in an order that allows drawing one at random; a leaving one swaps places with the last."""

    def __init__(self) -> None:
        self.states: list[ReplicaState] = []
        self._place: dict[ReplicaId, int] = {}

    def put(self, replica: ReplicaState) -> None:
        place = self._place.get(replica.replica_id)
        if place is None:
            self._place[replica.replica_id] = len(self.states)
            self.states.append(replica)
        else:
            self.states[place] = replica

    def drop(self, replica_id: ReplicaId) -> None:
        place = self._place.pop(replica_id, None)
        if place is None:
            return
        last = self.states.pop()
        if last.replica_id != replica_id:
            self.states[place] = last
            self._place[last.replica_id] = place


class RandomChoice:
    """Every replica equally often. O(1)."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._members = _Members()

    def put(self, replica: ReplicaState) -> None:
        """See ``RoutingPolicy``."""
        self._members.put(replica)

    def drop(self, replica_id: ReplicaId) -> None:
        """See ``RoutingPolicy``."""
        self._members.drop(replica_id)

    def choose(self, request: RouteRequest) -> ReplicaId | None:
        """See ``RoutingPolicy``."""
        del request
        states = self._members.states
        return states[self._rng.randrange(len(states))].replica_id if states else None


class RoundRobin:
    """The replica that was chosen longest ago; one that joins comes after all others. O(1)."""

    def __init__(self) -> None:
        # A plain dict would pass over the places of all that were moved before it finds the first.
        self._order: OrderedDict[ReplicaId, None] = OrderedDict()

    def put(self, replica: ReplicaState) -> None:
        """See ``RoutingPolicy``."""
        self._order.setdefault(replica.replica_id, None)

    def drop(self, replica_id: ReplicaId) -> None:
        """See ``RoutingPolicy``."""
        self._order.pop(replica_id, None)

    def choose(self, request: RouteRequest) -> ReplicaId | None:
        """See ``RoutingPolicy``."""
        del request
        replica_id = next(iter(self._order), None)
        if replica_id is not None:
            self._order.move_to_end(replica_id)
        return replica_id


class LeastLoaded:
    """The replica with the fewest requests; the lowest number among equals. O(log replicas)."""

    def __init__(self) -> None:
        self._loads = MaxTree()

    def put(self, replica: ReplicaState) -> None:
        """See ``RoutingPolicy``."""
        self._loads.put(replica.replica_id, -replica.num_requests)

    def drop(self, replica_id: ReplicaId) -> None:
        """See ``RoutingPolicy``."""
        self._loads.put(replica_id, ABSENT)

    def choose(self, request: RouteRequest) -> ReplicaId | None:
        """See ``RoutingPolicy``."""
        del request
        index = self._loads.first(max(self._loads.largest, ANY))
        return None if index is None else ReplicaId(index)


class TwoChoices:
    """The less loaded of two replicas drawn at random, the first drawn among equals (Mitzenmacher, 2001). O(1)."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._members = _Members()

    def put(self, replica: ReplicaState) -> None:
        """See ``RoutingPolicy``."""
        self._members.put(replica)

    def drop(self, replica_id: ReplicaId) -> None:
        """See ``RoutingPolicy``."""
        self._members.drop(replica_id)

    def choose(self, request: RouteRequest) -> ReplicaId | None:
        """See ``RoutingPolicy``."""
        del request
        states = self._members.states
        if len(states) < 2:
            return states[0].replica_id if states else None
        one = self._rng.randrange(len(states))
        other = self._rng.randrange(len(states) - 1)
        other += other >= one
        first, second = states[one], states[other]
        return (second if second.num_requests < first.num_requests else first).replica_id
