"""Routing by what a replica already holds: the adapter's weights, and the KV of the prompt's beginning.

Both are worth seconds, and so is a shorter queue, so the score is one sum in seconds, without weights to tune by eye.
``Affinity`` weighs the least loaded replica against the latest few holders; ``CreditAffinity`` follows the holders and
bounds the unfairness with dLoRA's credits.
"""

from dataclasses import dataclass

from pomona.core.errors import ConfigError
from pomona.core.ids import AdapterId, ReplicaId
from pomona.router.holders import Holders
from pomona.router.policy import LeastLoaded
from pomona.router.snapshot import ReplicaState, RouteRequest


@dataclass(frozen=True, slots=True)
class AffinityConfig:
    """What holding things is worth.

    Raises:
        ConfigError: a value is negative, or there are no holders to consider.
    """

    request_wait_s: float = 0.01
    """Time that each request already on a replica costs a new one."""
    prompt_token_s: float = 2e-5
    """Time to compute one prompt token that no cached prefix covers."""
    adapter_load_s: float = 0.02
    """Time to make an adapter resident."""
    prefix_tokens: int = 512
    """Prompt tokens per prefix key."""
    max_holders: int = 4
    """Holders of the adapter, and of the longest held prefix, that are considered: the latest users."""
    credit_requests: float = 8.0
    """Credit at which a bypassed replica gets the request, in requests of load difference (``credit`` policy)."""

    def __post_init__(self) -> None:
        """Check every range once."""
        for name in ("request_wait_s", "prompt_token_s", "adapter_load_s", "credit_requests"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 0")
        for name in ("prefix_tokens", "max_holders"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 1")


class Affinity:
    """The cheapest, in seconds until the first token, of the least loaded replica, the latest holders of the adapter
    and the latest holders of the longest held prefix. Equals: the less loaded, then the lower number.

    O(max_holders + prefix keys + log replicas).
    """

    def __init__(self, config: AffinityConfig, adapters: Holders[AdapterId], prefixes: Holders[bytes]) -> None:
        self._config = config
        self._adapters = adapters
        self._prefixes = prefixes
        self._states: dict[ReplicaId, ReplicaState] = {}
        self._least_loaded = LeastLoaded()

    def put(self, replica: ReplicaState) -> None:
        """See ``RoutingPolicy``."""
        self._states[replica.replica_id] = replica
        self._least_loaded.put(replica)

    def drop(self, replica_id: ReplicaId) -> None:
        """See ``RoutingPolicy``."""
        self._states.pop(replica_id, None)
        self._least_loaded.drop(replica_id)

    def choose(self, request: RouteRequest) -> ReplicaId | None:
        """See ``RoutingPolicy``."""
        least_loaded = self._least_loaded.choose(request)
        if least_loaded is None:
            return None
        candidates = [least_loaded]
        if request.adapter_id is not None:
            candidates += self._adapters.latest(request.adapter_id, self._config.max_holders, self._states)
        for key in reversed(request.prefix_keys):
            holders = self._prefixes.latest(key, self._config.max_holders, self._states)
            if holders:
                candidates += holders
                break
        return min(self.cost(request, self._states[candidate]) for candidate in candidates)[2]

    def cost(self, request: RouteRequest, replica: ReplicaState) -> tuple[float, int, ReplicaId]:
        """What replicas are compared by, smallest best: seconds, load, number."""
        config, replica_id = self._config, replica.replica_id
        num_cached = 0
        for num_keys in range(len(request.prefix_keys), 0, -1):
            if self._prefixes.has(replica_id, request.prefix_keys[num_keys - 1]):
                num_cached = num_keys * config.prefix_tokens
                break
        cost_s = replica.num_requests * config.request_wait_s
        cost_s += max(0, request.num_prompt_tokens - num_cached) * config.prompt_token_s
        if request.adapter_id is not None and not self._adapters.has(replica_id, request.adapter_id):
            cost_s += config.adapter_load_s
        return cost_s, replica.num_requests, replica_id


class CreditAffinity:
    """The least loaded of the adapter's latest holders, until the bypassed replica has credit enough.

    dLoRA (OSDI'24, section 4.2) lets a batch pass over an adapter at the price of credit, which at a limit buys the
    adapter its turn. Here a holder passes over the least loaded replica, at the price of the difference in load; at
    the limit the least loaded one gets the request, becomes a holder too, and its credit is spent. So popular adapters
    spread as far as their load needs. O(max_holders + log replicas).
    """

    def __init__(self, config: AffinityConfig, adapters: Holders[AdapterId]) -> None:
        self._config = config
        self._adapters = adapters
        self._states: dict[ReplicaId, ReplicaState] = {}
        self._least_loaded = LeastLoaded()
        self._credits: dict[ReplicaId, float] = {}

    def put(self, replica: ReplicaState) -> None:
        """See ``RoutingPolicy``."""
        self._states[replica.replica_id] = replica
        self._least_loaded.put(replica)

    def drop(self, replica_id: ReplicaId) -> None:
        """See ``RoutingPolicy``."""
        self._states.pop(replica_id, None)
        self._credits.pop(replica_id, None)
        self._least_loaded.drop(replica_id)

    def choose(self, request: RouteRequest) -> ReplicaId | None:
        """See ``RoutingPolicy``."""
        least_loaded = self._least_loaded.choose(request)
        if least_loaded is None or request.adapter_id is None:
            return least_loaded
        latest = self._adapters.latest(request.adapter_id, self._config.max_holders, self._states)
        holders = [self._states[holder] for holder in latest]
        if not holders:
            return least_loaded
        best = min(holders, key=lambda state: (state.num_requests, state.replica_id))
        num_more = best.num_requests - self._states[least_loaded].num_requests
        credit = self._credits.get(least_loaded, 0.0) + num_more
        if num_more > 0 and credit >= self._config.credit_requests:
            self._credits[least_loaded] = 0.0
            return least_loaded
        self._credits[least_loaded] = credit
        return best.replica_id
