"""Punica's routing (arXiv 2310.18547, section 5.1): fill the fullest replica that still has room, so that light ones
drain and can be released; now and then move what little runs on a light one to fuller ones.

Adapters play no part in it: loading one is taken to be nearly free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pomona.core.ids import ReplicaId
from pomona.router.max_tree import LevelIndex
from pomona.router.snapshot import ReplicaState, RouteRequest

RequestKey = TypeVar("RequestKey")


class LargestWorkingSet:
    """The replica with the most requests below the limit that has KV room; the highest number among equals.

    O(max_requests + log replicas).

    Args:
        max_requests: working-set limit of a replica; the paper's is 32. With all full, requests wait.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._rooms = LevelIndex()

    def put(self, replica: ReplicaState) -> None:
        """See ``RoutingPolicy``."""
        self._rooms.put(replica.replica_id, min(replica.num_requests, self._max_requests), replica.num_free_kv_tokens)

    def drop(self, replica_id: ReplicaId) -> None:
        """See ``RoutingPolicy``."""
        self._rooms.drop(replica_id)

    def choose(self, request: RouteRequest) -> ReplicaId | None:
        """See ``RoutingPolicy``."""
        index = self._rooms.last_of_highest(request.num_kv_tokens, self._max_requests)
        return None if index is None else ReplicaId(index)


@dataclass(frozen=True, slots=True)
class Move(Generic[RequestKey]):
    """End a request at ``source`` and add it, with its output so far as prompt, at ``target``, which recomputes it."""

    key: RequestKey
    source: ReplicaId
    target: ReplicaId


def consolidation(
    replicas: Sequence[ReplicaState],
    running: Mapping[ReplicaId, Sequence[tuple[RequestKey, RouteRequest]]],
    max_requests: int,
    max_moves: int,
) -> list[Move[RequestKey]]:
    """Moves that empty the lightest replicas into fuller ones; a replica is emptied whole or left alone.

    Args:
        replicas: those that take part.
        running: their requests.
        max_requests: working-set limit of a replica.
        max_moves: most requests to move at once: each costs a prefill.
    """
    rooms = LargestWorkingSet(max_requests)
    sizes = {replica.replica_id: _Room(replica) for replica in replicas}
    for room in sizes.values():
        if room.num_requests > 0:
            rooms.put(room)
    moves: list[Move[RequestKey]] = []
    for source in sorted(sizes.values(), key=lambda room: (room.num_requests, room.replica_id)):
        requests = running.get(source.replica_id, ())
        if not requests or source.has_received or len(moves) + len(requests) > max_moves:
            continue
        rooms.drop(source.replica_id)
        planned = _place(rooms, sizes, source.replica_id, requests)
        if planned is None:
            rooms.put(source)
        else:
            moves += planned
    return moves


class _Room(ReplicaState):
    """A replica's working set as the planned moves would leave it."""

    __slots__ = ("has_received",)

    def __init__(self, replica: ReplicaState) -> None:
        super().__init__(replica.replica_id)
        self.num_requests = replica.num_requests
        self.num_free_kv_tokens = replica.num_free_kv_tokens
        self.adapter_counts = dict(replica.adapter_counts)
        self.has_received = False


def _place(
    rooms: LargestWorkingSet,
    sizes: Mapping[ReplicaId, _Room],
    source: ReplicaId,
    requests: Sequence[tuple[RequestKey, RouteRequest]],
) -> list[Move[RequestKey]] | None:
    """Put each request on the fullest replica with room; None, with everything as before, if one finds none."""
    placed: list[tuple[Move[RequestKey], RouteRequest]] = []
    for key, request in requests:
        target = rooms.choose(request)
        if target is None:
            for move, moved in placed:
                sizes[move.target].num_requests -= 1
                sizes[move.target].give_kv(moved)
                rooms.put(sizes[move.target])
            return None
        placed.append((Move(key, source, target), request))
        sizes[target].num_requests += 1
        sizes[target].take_kv(request)
        rooms.put(sizes[target])
    for move, _ in placed:
        sizes[move.target].has_received = True
    return [move for move, _ in placed]
