"""Settings of a cluster simulation: what a replica can do and costs, how many there are, who chooses among them, and
what goes wrong.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

from pomona.core.errors import ConfigError
from pomona.core.ids import ReplicaId
from pomona.metrics.slo import Slo
from pomona.router.autoscale import AutoscalerConfig
from pomona.router.fleet import RouterConfig
from pomona.router.snapshot import ReplicaSnapshot
from pomona.sched.config import SchedulerConfig
from pomona.sim.cost_model import CostModel, PerTokenCost
from pomona.workload.spec import WorkloadRequest

MAX_REPLICAS = 100_000
"""Most replicas, or instances, that a simulation may be told of."""


@dataclass(frozen=True, slots=True)
class LossConfig:
    """How replicas are lost.

    Raises:
        ConfigError: a value is out of range, or the capacity's times do not ascend.
    """

    mean_life_s: float | None = None
    """Mean of exponential times to failure of each replica; None never fails."""
    capacity: tuple[tuple[float, int], ...] = ()
    """(time in seconds, instances that can be had from then on): spot availability. When some go, each instance is as
    likely to be one of them, and with it the replica it may carry."""
    notice_s: float = 30.0
    """Time between an interruption's notice and its execution."""
    on_notice: Literal["move", "stay"] = "stay"
    """What happens to a replica's requests at the notice: they begin again elsewhere at once, or run on to the end.
    Beginning again costs the same prefill at either time, and some of those that stay are done by then."""
    on_loss: Literal["restart", "fail"] = "restart"
    """What happens to requests that a lost replica still had."""

    def __post_init__(self) -> None:
        """Check every range once."""
        if self.mean_life_s is not None and not self.mean_life_s > 0.0:
            raise ConfigError(f"mean_life_s is {self.mean_life_s}: must be positive")
        if not self.notice_s >= 0.0:
            raise ConfigError(f"notice_s is {self.notice_s}: must be at least 0")
        last_s = 0.0
        for place, (time_s, num_replicas) in enumerate(self.capacity):
            if not time_s >= last_s:
                raise ConfigError(f"capacity[{place}] is at {time_s} s: times must not be negative, and must ascend")
            if not 0 <= num_replicas <= MAX_REPLICAS:
                raise ConfigError(f"capacity[{place}] is {num_replicas} replicas: must be between 0 and {MAX_REPLICAS}")
            last_s = time_s

    def since(self, start_s: float) -> Self:
        """The same for a simulation that begins at this moment."""
        before = tuple((0.0, count) for time_s, count in self.capacity if time_s <= start_s)
        later = tuple((time_s - start_s, count) for time_s, count in self.capacity if time_s > start_s)
        return replace(self, capacity=before[-1:] + later)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """A cluster.

    Raises:
        ConfigError: a value is out of range.
    """

    scheduler: SchedulerConfig
    """Of every replica. Unless a prompt source says otherwise no two prompts begin alike, so the prefix cache finds
    nothing, and simulations are faster without it."""
    cost_model: CostModel = field(default_factory=PerTokenCost)
    router: RouterConfig = field(default_factory=RouterConfig)
    autoscaler: AutoscalerConfig = field(default_factory=AutoscalerConfig)
    num_replicas: int = 1
    """Replicas that serve from the start."""
    start_s: float = 60.0
    """Time from asking for a further replica until it serves."""
    losses: LossConfig = field(default_factory=LossConfig)
    slo: Slo = field(default_factory=Slo)
    counts_output_kv: bool = True
    """The router counts a request's whole output as KV that it will need, not its prompt alone."""
    consolidation_interval_s: float | None = None
    """Time between rounds of moving requests off light replicas (Punica); None never moves."""
    max_moves: int = 32
    """Most requests moved in a round."""
    sample_interval_s: float | None = None
    """Time between samples of the fleet; None takes none."""
    max_samples: int | None = None
    """An odd number: with so many samples every second one goes, and the interval doubles; None keeps all."""
    seed: int = 0
    overlap_steps: bool = False
    """Every replica plans its next step while one is under way, as on a GPU."""

    def __post_init__(self) -> None:
        """Check every range once."""
        if self.num_replicas < 1:
            raise ConfigError(f"num_replicas is {self.num_replicas}: must be at least 1")
        if not self.start_s >= 0.0:
            raise ConfigError(f"start_s is {self.start_s}: must be at least 0")
        if self.max_moves < 1:
            raise ConfigError(f"max_moves is {self.max_moves}: must be at least 1")
        for name in ("consolidation_interval_s", "sample_interval_s"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ConfigError(f"{name} is {value}: must be positive")
        if self.max_samples is not None and (self.max_samples < 3 or self.max_samples % 2 == 0):
            raise ConfigError(f"max_samples is {self.max_samples}: must be odd, and at least 3")

    def num_kv_tokens(self, request: WorkloadRequest) -> int:
        """KV that the router counts for a request: at most what an empty replica has for one, or it would wait for room
        for ever."""
        wanted = request.num_prompt_tokens + (request.num_output_tokens if self.counts_output_kv else 0)
        return min(wanted, self.scheduler.max_model_len, self.scheduler.num_kv_blocks * self.scheduler.block_size)

    def num_page_kv_tokens(self, num_pages: int) -> int:
        """KV that so many adapter pages are lent as while nobody needs them."""
        return num_pages * self.scheduler.blocks_per_page * self.scheduler.block_size

    def empty_replica(self, replica_id: ReplicaId, rows_per_page: int) -> ReplicaSnapshot:
        """What the router knows of a replica that joins."""
        num_pages = self.scheduler.num_adapter_pages
        num_kv_tokens = self.scheduler.num_kv_blocks * self.scheduler.block_size + self.num_page_kv_tokens(num_pages)
        return ReplicaSnapshot(
            replica_id,
            num_kv_tokens=num_kv_tokens,
            num_free_kv_tokens=num_kv_tokens,
            num_adapter_rows=num_pages * rows_per_page,
        )
