"""CaraServe's rank-aware routing (arXiv 2401.11240, section 5): send a request where it costs everybody least.

The cost of a replica is what the request adds to the time of a step there, times the requests that would all pay it; a
replica where the step would then exceed the objective comes after every one where it would not (the paper's "large
penalty"). Both of the paper's kernel models are here: time grows with the sum of the rows' ranks, or with rows times
the largest rank. In each model, replicas that differ in load alone are ordered by load, so an index finds the best.
"""

from dataclasses import dataclass
from typing import Literal

from pomona.core.errors import ConfigError
from pomona.core.ids import ReplicaId
from pomona.router.max_tree import ABSENT, ANY, LevelIndex, MaxTree
from pomona.router.snapshot import ReplicaState, RouteRequest

RankForm = Literal["sum", "max"]


@dataclass(frozen=True, slots=True)
class StepModel:
    """Seconds of a decode step of n rows: ``base_s + row_s * n + rank_row_s * ranks``, where ranks is the sum of the
    rows' ranks ("sum", unpadded kernels) or n times the largest ("max", padded kernels).

    Raises:
        ConfigError: a value is out of range.
    """

    base_s: float = 0.0
    """A step's, whatever is in it."""
    row_s: float = 0.0
    """A row's."""
    rank_row_s: float = 0.0
    """A rank's, as the form counts ranks."""
    prompt_token_s: float = 0.0
    """A prompt token's share of a prefill."""
    num_output_tokens: float = 128.0
    """Mean answer: a prefill is paid once per answer, a slower step once per token of it."""
    form: RankForm = "sum"
    """How ranks count: those of the rows summed, or the largest once per row."""

    def __post_init__(self) -> None:
        """Check every range once."""
        for name in ("base_s", "row_s", "rank_row_s", "prompt_token_s"):
            if not getattr(self, name) >= 0.0:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 0")
        if not self.num_output_tokens >= 1.0:
            raise ConfigError(f"num_output_tokens is {self.num_output_tokens}: must be at least 1")

    def decode_s(self, num_rows: int, sum_lora_ranks: int, max_lora_rank: int) -> float:
        """Time of a step with these rows."""
        ranks = sum_lora_ranks if self.form == "sum" else num_rows * max_lora_rank
        return self.base_s + self.row_s * num_rows + self.rank_row_s * ranks

    def added_s(self, num_rows: int, max_lora_rank: int, request: RouteRequest) -> float:
        """What one more row adds to each step, its prefill spread over its answer included."""
        ranks = request.lora_rank
        if self.form == "max":
            ranks = (num_rows + 1) * max(max_lora_rank, request.lora_rank) - num_rows * max_lora_rank
        prefill_s = self.prompt_token_s * request.num_prompt_tokens / self.num_output_tokens
        return prefill_s + self.row_s + self.rank_row_s * ranks


class SumRankAware:
    """Under the "sum" form a request adds the same everywhere, so the cost is ordered by load: the least loaded replica
    whose step stays within the objective, or the least loaded of all; the lowest number among equals.

    O(loads passed over * log replicas).
    """

    def __init__(self, model: StepModel, max_step_s: float) -> None:
        assert model.form == "sum"
        self._model = model
        self._max_step_s = max_step_s
        self._spare = LevelIndex()

    def put(self, replica: ReplicaState) -> None:
        """See ``RoutingPolicy``."""
        num_requests = replica.num_requests
        decode_s = self._model.decode_s(num_requests, replica.sum_lora_ranks, 0)
        self._spare.put(replica.replica_id, num_requests, -decode_s)

    def drop(self, replica_id: ReplicaId) -> None:
        """See ``RoutingPolicy``."""
        self._spare.drop(replica_id)

    def choose(self, request: RouteRequest) -> ReplicaId | None:
        """See ``RoutingPolicy``."""
        max_decode_s = self._max_step_s - self._model.row_s - self._model.rank_row_s * request.lora_rank
        index = self._spare.first_of_lowest(max(-max_decode_s, ANY))  # without an objective, anybody
        if index is None:
            index = self._spare.first_of_lowest(ANY)
        return None if index is None else ReplicaId(index)


class MaxRankAware:
    """Under the "max" form, replicas of equal largest rank are ordered by load, so only the least loaded one of each
    rank is weighed; the lighter, then the lower number, among equals. O(ranks + log replicas)."""

    def __init__(self, model: StepModel, max_step_s: float) -> None:
        assert model.form == "max"
        self._model = model
        self._max_step_s = max_step_s
        self._loads: dict[int, MaxTree] = {}
        self._rank_of: dict[ReplicaId, int] = {}

    def put(self, replica: ReplicaState) -> None:
        """See ``RoutingPolicy``."""
        rank = replica.max_lora_rank
        if self._rank_of.get(replica.replica_id, rank) != rank:
            self.drop(replica.replica_id)
        self._rank_of[replica.replica_id] = rank
        self._loads.setdefault(rank, MaxTree()).put(replica.replica_id, -replica.num_requests)

    def drop(self, replica_id: ReplicaId) -> None:
        """See ``RoutingPolicy``."""
        rank = self._rank_of.pop(replica_id, None)
        if rank is not None:
            self._loads[rank].put(replica_id, ABSENT)

    def choose(self, request: RouteRequest) -> ReplicaId | None:
        """See ``RoutingPolicy``."""
        best: tuple[bool, float, int, int] | None = None
        for rank, loads in self._loads.items():
            index = loads.first(max(loads.largest, ANY))
            if index is not None:
                cost = self.cost(request, round(-loads.largest), rank, index)
                best = cost if best is None else min(best, cost)
        return None if best is None else ReplicaId(best[3])

    def cost(
        self, request: RouteRequest, num_rows: int, max_lora_rank: int, index: int
    ) -> tuple[bool, float, int, int]:
        """What replicas are compared by, smallest best: objective missed, cost in seconds, load, number."""
        model = self._model
        step_s = model.decode_s(num_rows + 1, 0, max(max_lora_rank, request.lora_rank))
        cost_s = model.added_s(num_rows, max_lora_rank, request) * num_rows
        return step_s > self._max_step_s, cost_s, num_rows, index
