"""Fleet: the router's book of replicas. It hears what starts, is sent where, ends, and is reported, and keeps the state
of every replica and the policy's index up to date; each event costs time logarithmic in the number of replicas.
"""

import random
from dataclasses import dataclass, field
from typing import Literal

from pomona.core.errors import ConfigError
from pomona.core.ids import AdapterId, ReplicaId
from pomona.router.affinity import Affinity, AffinityConfig, CreditAffinity
from pomona.router.holders import Holders
from pomona.router.policy import LeastLoaded, RandomChoice, RoundRobin, RoutingPolicy, TwoChoices
from pomona.router.punica import LargestWorkingSet
from pomona.router.rank_aware import MaxRankAware, StepModel, SumRankAware
from pomona.router.snapshot import ReplicaSnapshot, ReplicaState, RouteRequest

PolicyName = Literal[
    "random", "round-robin", "least-loaded", "two-choices", "punica", "rank-aware", "affinity", "credit"
]


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Which policy, and its settings.

    Raises:
        ConfigError: a value is out of range.
    """

    policy: PolicyName = "least-loaded"
    """What chooses the replica of a request."""
    seed: int = 0
    """Of what is drawn (``random``, ``two-choices``)."""
    max_requests: int = 32
    """Working-set limit of a replica (``punica``)."""
    max_step_s: float = 0.1
    """Longest decode step within the objective (``rank-aware``)."""
    step_model: StepModel = field(default_factory=StepModel)
    """What a request adds to a step (``rank-aware``)."""
    affinity: AffinityConfig = field(default_factory=AffinityConfig)
    """What holding an adapter or a prefix is worth (``affinity``, ``credit``)."""

    def __post_init__(self) -> None:
        """Check every range once."""
        if self.max_requests < 1:
            raise ConfigError(f"max_requests is {self.max_requests}: must be at least 1")
        if not self.max_step_s > 0.0:
            raise ConfigError(f"max_step_s is {self.max_step_s}: must be positive")


class Fleet:
    """Every replica as the router believes it to be, and the policy that chooses among them.

    Args:
        config: the policy.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._adapters: Holders[AdapterId] = Holders()
        self._prefixes: Holders[bytes] = Holders()
        self._prefix_tokens = config.affinity.prefix_tokens
        self._policy = make_policy(config, self._adapters, self._prefixes)
        self._tracks_adapters = config.policy in ("affinity", "credit")
        self._states: dict[ReplicaId, ReplicaState] = {}
        self._draining: set[ReplicaId] = set()

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, replica_id: ReplicaId) -> bool:
        return replica_id in self._states

    @property
    def states(self) -> list[ReplicaState]:
        """Every replica, in the order they joined; for periodic work, not for each request."""
        return list(self._states.values())

    def state(self, replica_id: ReplicaId) -> ReplicaState:
        """One replica."""
        return self._states[replica_id]

    def is_draining(self, replica_id: ReplicaId) -> bool:
        """True if the replica takes no new requests."""
        return replica_id in self._draining

    def report(self, snapshot: ReplicaSnapshot) -> None:
        """Take a replica's own word for its state; a replica not known yet joins."""
        replica_id = snapshot.replica_id
        state = self._states[replica_id] = ReplicaState(replica_id)
        state.num_requests = snapshot.num_running + snapshot.num_waiting
        state.num_free_kv_tokens = snapshot.num_free_kv_tokens
        for lora_rank in snapshot.lora_ranks:
            state.add_rank(lora_rank)
        if self._tracks_adapters:
            self._adapters.replace(replica_id, snapshot.num_adapter_rows, snapshot.resident_adapters)
            held = ((key, self._prefix_tokens) for key in snapshot.prefix_keys)
            self._prefixes.replace(replica_id, snapshot.num_kv_tokens, held)
        self._changed(state)

    def leave(self, replica_id: ReplicaId) -> None:
        """The replica is gone."""
        del self._states[replica_id]
        self._draining.discard(replica_id)
        self._adapters.forget(replica_id)
        self._prefixes.forget(replica_id)
        self._policy.drop(replica_id)

    def drain(self, replica_id: ReplicaId) -> None:
        """Send the replica nothing new; it stays known until it leaves."""
        self._draining.add(replica_id)
        self._policy.drop(replica_id)

    def undrain(self, replica_id: ReplicaId) -> None:
        """Let the replica take new requests again."""
        self._draining.discard(replica_id)
        self._policy.put(self._states[replica_id])

    def choose(self, request: RouteRequest) -> ReplicaId | None:
        """The replica for a request; None if it has to wait. ``sent`` tells the fleet that it went there."""
        return self._policy.choose(request)

    def sent(self, replica_id: ReplicaId, request: RouteRequest) -> None:
        """A request is on its way to a replica."""
        state = self._states[replica_id]
        state.num_requests += 1
        state.take_kv(request)
        state.add_rank(request.lora_rank)
        if self._tracks_adapters:
            if request.adapter_id is not None:
                self._adapters.use(replica_id, request.adapter_id, request.num_adapter_rows)
            for key in reversed(request.prefix_keys):  # a replica drops a prefix from its end
                self._prefixes.use(replica_id, key, self._prefix_tokens)
        self._changed(state)

    def ended(self, replica_id: ReplicaId, request: RouteRequest) -> None:
        """A request sent to a replica has ended there, however it did."""
        state = self._states[replica_id]
        state.num_requests -= 1
        state.give_kv(request)
        state.remove_rank(request.lora_rank)
        assert state.num_requests >= 0, "ended more often than sent"
        self._changed(state)

    def _changed(self, state: ReplicaState) -> None:
        if state.replica_id not in self._draining:
            self._policy.put(state)


def make_policy(config: RouterConfig, adapters: Holders[AdapterId], prefixes: Holders[bytes]) -> RoutingPolicy:
    """Build the policy of that name."""
    rng = random.Random(f"{config.seed}/{config.policy}")
    match config.policy:
        case "random":
            return RandomChoice(rng)
        case "round-robin":
            return RoundRobin()
        case "least-loaded":
            return LeastLoaded()
        case "two-choices":
            return TwoChoices(rng)
        case "punica":
            return LargestWorkingSet(config.max_requests)
        case "rank-aware" if config.step_model.form == "sum":
            return SumRankAware(config.step_model, config.max_step_s)
        case "rank-aware":
            return MaxRankAware(config.step_model, config.max_step_s)
        case "affinity":
            return Affinity(config.affinity, adapters, prefixes)
        case "credit":
            return CreditAffinity(config.affinity, adapters)
