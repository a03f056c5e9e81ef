"""FleetSize: which replicas there are over time. It starts, drains and releases them as the autoscaler wants, and takes
them away as failures and spot capacity demand; what that means for requests is its host's business.
"""

import random
from functools import partial
from typing import Protocol

from pomona.core.ids import ReplicaId
from pomona.router.autoscale import FleetObservation, make_autoscaler
from pomona.router.fleet import Fleet
from pomona.sim.clock import EventHeap
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.ledger import ReplicaRecord


class ReplicaHost(Protocol):
    """Holds the replicas themselves."""

    @property
    def is_over(self) -> bool:
        """True when no request is left or to come; nothing that happens to replicas then counts."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a replica."""
        ...

    def join(self, record: ReplicaRecord) -> None:
        """A replica begins to serve."""
        ...

    def serve_waiting(self) -> None:
        """There may be room for requests that wait for a replica."""
        ...

    def move_away(self, replica_id: ReplicaId) -> None:
        """A replica will be lost: let its requests go on elsewhere."""
        ...

    def remove(self, replica_id: ReplicaId) -> None:
        """A replica is gone, and the router does not know it any more."""
        ...

    def busy_s(self, replica_id: ReplicaId) -> float:
        """Seconds of all its steps so far."""
        ...


class FleetSize:
    """Keeps the number of replicas.

    A replica is starting, serving, draining (serves what it has, is released when empty) or noticed (will be lost); the
    latter two take no new requests, and are no longer counted.
    """

    def __init__(self, config: ClusterConfig, heap: EventHeap, fleet: Fleet, host: ReplicaHost) -> None:
        self._config = config
        self._heap = heap
        self._fleet = fleet
        self._host = host
        self._autoscaler = make_autoscaler(config.autoscaler)
        self._rng = random.Random(f"{config.seed}/losses")
        self.records: dict[ReplicaId, ReplicaRecord] = {}
        """Every replica that was ever asked for."""
        self._starting: dict[ReplicaId, ReplicaRecord] = {}
        self._serving: dict[ReplicaId, ReplicaRecord] = {}
        self._draining: dict[ReplicaId, None] = {}
        self._noticed: set[ReplicaId] = set()
        self._available: int | None = None
        self._busy_before_s: dict[ReplicaId, float] = {}
        self._num_ended = 0
        self._num_missed = 0

    @property
    def num_starting(self) -> int:
        """Replicas asked for that do not serve yet."""
        return len(self._starting)

    def begin(self) -> None:
        """Start the first replicas at once, and put on the heap what changes their number later."""
        config = self._config
        for time_s, num_replicas in config.losses.capacity:
            if time_s == 0.0:
                self._available = num_replicas
            else:
                self._heap.at(time_s, partial(self._set_capacity, num_replicas))
        limit = config.num_replicas if self._available is None else min(config.num_replicas, self._available)
        for _ in range(limit):
            self._serve(self._ask())
        self._heap.after(config.autoscaler.interval_s, self._tick)

    def note_ended(self, *, is_missed: bool) -> None:
        """A request has ended, within the objectives or not."""
        self._num_ended += 1
        self._num_missed += is_missed

    def release_if_drained(self, replica_id: ReplicaId) -> None:
        """Let a draining replica go once nothing is left on it."""
        if replica_id in self._draining and self._fleet.state(replica_id).num_requests == 0:
            self._remove(replica_id, is_lost=False)

    def _counted(self) -> list[ReplicaId]:
        return [k for k in self._serving if k not in self._draining and k not in self._noticed]

    def _ask(self) -> ReplicaRecord:
        record = ReplicaRecord(ReplicaId(len(self.records)), self._heap.now_s)
        self.records[record.replica_id] = self._starting[record.replica_id] = record
        return record

    def _serve(self, record: ReplicaRecord) -> None:
        replica_id = record.replica_id
        if self._starting.pop(replica_id, None) is None:
            return  # called off while it started
        record.ready_s = self._heap.now_s
        self._serving[replica_id] = record
        self._busy_before_s[replica_id] = 0.0
        mean_life_s = self._config.losses.mean_life_s
        if mean_life_s is not None:
            self._heap.after(self._rng.expovariate(1.0 / mean_life_s), partial(self._fail, replica_id))
        self._host.join(record)

    def _tick(self) -> None:
        if self._host.is_over:
            return
        config = self._config.autoscaler
        counted = self._counted()
        loads = [self._fleet.state(replica_id).num_requests for replica_id in counted]
        idle = {replica_id: self._idle_share(record) for replica_id, record in self._serving.items()}
        seen = FleetObservation(
            now_s=self._heap.now_s,
            loads=(*loads, *(0 for _ in self._starting)),
            num_waiting=self._host.num_waiting,
            num_ended=self._num_ended,
            num_missed=self._num_missed,
            idle_share=(*(idle[replica_id] for replica_id in counted), *(0.0 for _ in self._starting)),
            num_starting=len(self._starting),
        )
        self._num_ended = self._num_missed = 0
        self._resize(self._autoscaler.wanted(seen))
        self._heap.after(config.interval_s, self._tick)

    def _idle_share(self, record: ReplicaRecord) -> float:
        """Of the time since the last observation, or since the replica began to serve."""
        busy_s = self._host.busy_s(record.replica_id)
        spent_s = busy_s - self._busy_before_s[record.replica_id]
        self._busy_before_s[record.replica_id] = busy_s
        span_s = min(self._config.autoscaler.interval_s, self._heap.now_s - record.ready_s)
        return max(0.0, 1.0 - spent_s / span_s) if span_s > 0.0 else 0.0

    def _resize(self, wanted: int) -> None:
        if self._available is not None:
            wanted = min(wanted, self._available)
        counted = self._counted()
        num_more = wanted - len(counted) - len(self._starting)
        for _ in range(num_more):
            if self._draining:
                replica_id, _ = self._draining.popitem()
                self._fleet.undrain(replica_id)
            else:
                self._heap.after(self._config.start_s, partial(self._serve, self._ask()))
        if num_more >= 0:
            self._host.serve_waiting()
            return
        for replica_id in list(reversed(self._starting))[:-num_more]:
            self._call_off(replica_id, is_lost=False)
            num_more += 1
        counted.sort(key=lambda replica_id: (self._fleet.state(replica_id).num_requests, replica_id))
        for replica_id in counted[: -num_more if num_more < 0 else 0]:
            self._draining[replica_id] = None
            self._fleet.drain(replica_id)
            self.release_if_drained(replica_id)

    def _set_capacity(self, num_replicas: int) -> None:
        if self._host.is_over:
            return
        alive = sorted([*self._starting, *(k for k in self._serving if k not in self._noticed)])
        before = len(alive) if self._available is None else max(self._available, len(alive))
        self._available = num_replicas
        # Any of the instances that there were may be the one that goes, whether it is ours or not.
        gone = self._rng.sample(range(before), max(0, before - num_replicas))
        num_lost = max(sum(k < len(alive) for k in gone), len(alive) - num_replicas)
        for replica_id in self._rng.sample(alive, num_lost):
            if replica_id in self._starting:
                self._call_off(replica_id, is_lost=True)
            else:
                self._notice(replica_id)

    def _call_off(self, replica_id: ReplicaId, *, is_lost: bool) -> None:
        record = self._starting.pop(replica_id)
        record.end_s, record.is_lost = self._heap.now_s, is_lost

    def _notice(self, replica_id: ReplicaId) -> None:
        self._draining.pop(replica_id, None)
        self._noticed.add(replica_id)
        self._fleet.drain(replica_id)
        if self._config.losses.on_notice == "move":
            self._host.move_away(replica_id)
        self._heap.after(self._config.losses.notice_s, partial(self._fail, replica_id))

    def _fail(self, replica_id: ReplicaId) -> None:
        if replica_id in self._serving and not self._host.is_over:
            self._remove(replica_id, is_lost=True)

    def _remove(self, replica_id: ReplicaId, *, is_lost: bool) -> None:
        record = self._serving.pop(replica_id)
        record.end_s, record.is_lost = self._heap.now_s, is_lost
        self._draining.pop(replica_id, None)
        self._noticed.discard(replica_id)
        self._fleet.leave(replica_id)
        self._host.remove(replica_id)
