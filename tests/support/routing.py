"""Routing as a plain scan over all replicas: what the indexed policies must equal, and events to drive both with."""

from dataclasses import dataclass, field

from hypothesis import strategies as st

from pomona.core.ids import AdapterId, ReplicaId
from pomona.router.fleet import Fleet, RouterConfig
from pomona.router.rank_aware import StepModel
from pomona.router.snapshot import ReplicaSnapshot, ReplicaState, RouteRequest

RANKS = (8, 16, 64)


@dataclass(frozen=True)
class RouteEvent:
    """One thing that happens to a fleet; ``pick`` selects a replica or a request among those there are."""

    kind: str
    pick: int = 0
    request: RouteRequest = field(default_factory=lambda: RouteRequest(1, 1))
    num_requests: int = 0
    num_free_kv_tokens: int = 0


def make_route(adapter: int | None = None, num_kv_tokens: int = 10, num_keys: int = 0) -> RouteRequest:
    """A request; the adapter's number decides its rank."""
    lora_rank = 0 if adapter is None else RANKS[adapter % len(RANKS)]
    return RouteRequest(
        num_prompt_tokens=num_kv_tokens,
        num_kv_tokens=num_kv_tokens,
        adapter_id=None if adapter is None else AdapterId(f"a{adapter}"),
        lora_rank=lora_rank,
        prefix_keys=tuple(bytes([k]) for k in range(num_keys)),
        num_adapter_rows=lora_rank,
    )


def make_snapshot(
    replica_id: int, num_requests: int = 0, num_free_kv_tokens: int = 100, **changes: object
) -> ReplicaSnapshot:
    values: dict[str, object] = {
        "replica_id": ReplicaId(replica_id),
        "num_running": num_requests,
        "num_kv_tokens": 100,
        "num_free_kv_tokens": num_free_kv_tokens,
        "lora_ranks": (0,) * num_requests,
        "num_adapter_rows": 128,
    }
    return ReplicaSnapshot(**(values | changes))  # type: ignore[arg-type]


requests = st.builds(
    make_route,
    st.none() | st.integers(0, 5),
    st.integers(1, 60),
    st.integers(0, 3),
)
events = st.lists(
    st.one_of(
        st.builds(
            RouteEvent,
            st.just("join"),
            num_requests=st.integers(0, 6),
            num_free_kv_tokens=st.integers(0, 100),
        ),
        st.builds(RouteEvent, st.sampled_from(["leave", "drain", "undrain", "end"]), st.integers(0, 50)),
        st.builds(RouteEvent, st.just("route"), st.integers(0, 50), requests),
        st.builds(RouteEvent, st.just("route"), st.integers(0, 50), requests),
    ),
    max_size=60,
)


class RoutingWorld:
    """Plays events on a fleet, asking at every request, and keeps what a scan needs to answer the same."""

    def __init__(self, config: RouterConfig) -> None:
        self.fleet = Fleet(config)
        self.eligible: dict[ReplicaId, ReplicaState] = {}
        """Replicas that take requests, in the order they joined or came back."""
        self._num_joined = 0
        self._sent: list[tuple[ReplicaId, RouteRequest]] = []

    def play(self, event: RouteEvent) -> tuple[ReplicaId | None] | None:
        """Carry out an event; for a request, what the fleet chose, in a tuple."""
        fleet = self.fleet
        known = [state.replica_id for state in fleet.states]
        if event.kind == "join":
            snapshot = make_snapshot(self._num_joined, event.num_requests, event.num_free_kv_tokens)
            self._num_joined += 1
            fleet.report(snapshot)
            self.eligible[snapshot.replica_id] = fleet.state(snapshot.replica_id)
        elif event.kind == "route":
            return (fleet.choose(event.request),)
        elif event.kind == "end" and self._sent:
            fleet.ended(*self._sent.pop(event.pick % len(self._sent)))
        elif known:
            self._change(event.kind, known[event.pick % len(known)])
        return None

    def send(self, replica_id: ReplicaId, request: RouteRequest) -> None:
        self.fleet.sent(replica_id, request)
        self._sent.append((replica_id, request))

    def _change(self, kind: str, replica_id: ReplicaId) -> None:
        if kind == "leave":
            self.fleet.leave(replica_id)
            self.eligible.pop(replica_id, None)
            self._sent = [sent for sent in self._sent if sent[0] != replica_id]
        elif kind == "drain":
            self.fleet.drain(replica_id)
            self.eligible.pop(replica_id, None)
        elif kind == "undrain" and self.fleet.is_draining(replica_id):
            self.fleet.undrain(replica_id)
            self.eligible[replica_id] = self.fleet.state(replica_id)


def scan_least_loaded(replicas: list[ReplicaState], request: RouteRequest) -> ReplicaId | None:
    return min(((r.num_requests, r.replica_id) for r in replicas), default=(0, None))[1]


def scan_largest_working_set(replicas: list[ReplicaState], request: RouteRequest, limit: int) -> ReplicaId | None:
    fitting = [r for r in replicas if r.num_requests < limit and r.num_free_kv_tokens >= request.num_kv_tokens]
    return max(((r.num_requests, r.replica_id) for r in fitting), default=(0, None))[1]


def scan_rank_aware(
    replicas: list[ReplicaState], request: RouteRequest, model: StepModel, max_step_s: float
) -> ReplicaId | None:
    """The paper's score, replica by replica: added time times requests, replicas that miss the objective last."""

    def cost(replica: ReplicaState) -> tuple[bool, float, int, ReplicaId]:
        n, largest = replica.num_requests, max(replica.max_lora_rank, request.lora_rank)
        after_s = model.decode_s(n + 1, replica.sum_lora_ranks + request.lora_rank, largest)
        added_s = model.added_s(n, replica.max_lora_rank, request)
        return after_s > max_step_s, added_s * n, n, replica.replica_id

    return min((cost(r) for r in replicas), default=(False, 0.0, 0, None))[3]
