"""SimulationSpec: what ``pomona simulate`` is told, checked before anything runs. Files that it names are opened by
whoever reads it.
"""

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeAlias, Union

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from pomona.core.errors import ConfigError
from pomona.metrics.slo import Slo
from pomona.router.autoscale import AutoscalerConfig
from pomona.router.fleet import RouterConfig
from pomona.sim.cluster_config import MAX_REPLICAS, LossConfig
from pomona.sim.hardware import MACHINES, MODELS
from pomona.sim.sections import STRICT, problem, refuse_huge, section
from pomona.workload.arrivals import AllAtOnce, ConstantArrivals, GammaArrivals, PoissonArrivals
from pomona.workload.checks import MAX_COUNT, MAX_SECONDS
from pomona.workload.lengths import FixedLength, LognormalLength, UniformLength
from pomona.workload.popularity import BaseOnly, GroupPopularity, ZipfPopularity
from pomona.workload.traces import TraceSelection

MAX_RANK = 4096
MIN_INTERVAL_S = 1e-3
"""Shortest time between two looks at the fleet."""

ARRIVALS: dict[str, type] = {
    "all-at-once": AllAtOnce,
    "constant": ConstantArrivals,
    "poisson": PoissonArrivals,
    "gamma": GammaArrivals,
}
LENGTHS: dict[str, type] = {"fixed": FixedLength, "uniform": UniformLength, "lognormal": LognormalLength}
POPULARITIES: dict[str, type] = {"base": BaseOnly, "zipf": ZipfPopularity, "group": GroupPopularity}

_Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
_Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
_Positive = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
_Interval = Annotated[float, Field(ge=MIN_INTERVAL_S, le=MAX_SECONDS)]


if TYPE_CHECKING:
    # Made when the module is read, so a type checker cannot know them.
    _Arrivals: TypeAlias = Any
    _Lengths: TypeAlias = Any
    _Base: TypeAlias = Any
    _Zipf: TypeAlias = Any
    _Selection: TypeAlias = Any
    _Losses: TypeAlias = Any
    _Router: TypeAlias = Any
    _Autoscaler: TypeAlias = Any
    _Slo: TypeAlias = Any
else:
    _Base, _Zipf = section(BaseOnly, "base"), section(ZipfPopularity, "zipf")
    _Selection, _Losses, _Router = section(TraceSelection), section(LossConfig), section(RouterConfig)
    _Autoscaler, _Slo = section(AutoscalerConfig), section(Slo)
    _Arrivals = Annotated[
        Union[tuple(section(kind, tag) for tag, kind in ARRIVALS.items())], Field(discriminator="kind")  # noqa: UP007
    ]
    _Lengths = Annotated[
        Union[tuple(section(kind, tag) for tag, kind in LENGTHS.items())], Field(discriminator="kind")  # noqa: UP007
    ]


class _Section(BaseModel):
    model_config = STRICT


class ReplicaSection(_Section):
    """One replica: a profile that was measured, or a machine and a model; sizes given here go before theirs."""

    profile: str | None = None
    """File of `pomona profile`."""
    machine: str | None = None
    """Instead of a profile: a roofline from its data sheet."""
    model: str | None = None
    """What a machine serves."""
    num_devices: Annotated[int, Field(ge=1, le=1024)] = 1
    """Machines that share one replica; with a machine only."""
    use_tables: bool = False
    """H200 only: measured operators instead of the data sheet."""
    adapter_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Of the memory that the weights leave, what adapters get; with a machine only."""
    rows_per_page: Annotated[int, Field(ge=1, le=MAX_RANK)] = 4
    """Rank rows of an adapter page."""
    num_kv_blocks: _Count | None = None
    num_adapter_pages: Annotated[int, Field(ge=0)] | None = None
    blocks_per_page: Annotated[int, Field(ge=0)] | None = None
    """KV blocks that an adapter page stands in the place of, and KV may borrow; the profile's, or 0, by default."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    block_size: _Count | None = None
    max_num_batched_tokens: _Count | None = None
    max_num_seqs: _Count | None = None
    overlap_steps: bool = False
    """The next step is planned while one is under way, as `pomona serve` does on a GPU."""
    max_waiting: _Count = 1_000_000
    """Requests that may wait on a replica; one more is rejected. `pomona serve` lets 1024 wait."""
    enable_prefix_cache: bool = False
    """Share the KV of equal prefixes within a tenant, as `pomona serve` does. Only a trace of format mooncake says
    which prompts begin alike: in other workloads none do."""
    adapter_wait_limit_s: _Seconds = 2.0

    @field_validator("machine", "model")
    @classmethod
    def _is_known(cls, name: str | None, info: ValidationInfo) -> str | None:
        known = MACHINES if info.field_name == "machine" else MODELS
        if name is not None and name not in known:
            raise ValueError(f"{name!r} is not known: must be one of {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if (self.profile is None) == (self.machine is None):
            raise ValueError("needs either a profile, or a machine and a model")
        if (self.machine is None) != (self.model is None):
            raise ValueError("a machine needs a model, and a model a machine")
        return self


class RecordedSection(_Section):
    """Independent draws in proportion to uses counted in a file of Alibaba's GenTD26 trace."""

    kind: Literal["recorded"]
    file: str
    """CSV with a column lora_args."""
    base_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the requests without an adapter; by default the trace's own."""


class GroupsSection(_Section):
    """Each group of consecutive requests divides among adapters exactly as ``groups`` says, in an order of its own."""

    kind: Literal["group"]
    groups: Literal["identical", "distinct", "uniform", "zipf-1.5"]
    """identical: all requests of a group ask for one adapter. distinct: all adapters in turn. uniform: the square root
    of group_size adapters, evenly. zipf-1.5: each adapter is asked for 1.5 times as often as the next."""
    num_adapters: _Count
    group_size: _Count = 32


class AdaptersSection(_Section):
    """What adapters there are and which are asked for."""

    lora_ranks: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_RANK)], ...], Field(min_length=1)] = (16,)
    """Adapter k has rank lora_ranks[k % their number]."""
    extras_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the adapters that have more than low-rank parts (DoRA, biases, saved modules), drawn by the seed; needs
    a profile that was taken with such adapters."""
    popularity: Annotated[
        _Base | _Zipf | GroupsSection | RecordedSection,
        Field(discriminator="kind"),
    ] = Field(default_factory=lambda: _Base(kind="base"))
    """Which of them each request asks for."""


class SyntheticSection(_Section):
    """A workload made of distributions."""

    kind: Literal["synthetic"]
    num_requests: _Count | None = None
    """How many; this, or for how long."""
    duration_s: _Positive | None = None
    """For how long requests arrive."""
    arrivals: _Arrivals
    """When requests arrive."""
    prompt_lengths: _Lengths
    """Tokens of the prompts."""
    output_lengths: _Lengths
    """Tokens of the answers."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if (self.num_requests is None) == (self.duration_s is None):
            raise ValueError("needs either num_requests or duration_s")
        if self.duration_s is not None and self.arrivals.kind == "all-at-once":
            raise ValueError("all-at-once needs num_requests")
        return self


class TraceSection(_Section):
    """Arrivals and lengths from a trace; the bundled samples have names without a path."""

    kind: Literal["trace"]
    file: str
    """The trace."""
    format: Literal["azure", "mooncake", "plain"]
    """azure: CSV with TIMESTAMP, ContextTokens, GeneratedTokens. mooncake: JSON lines of timestamp (ms), input_length,
    output_length, hash_ids. plain: CSV with arrival_s, num_prompt_tokens, num_output_tokens."""
    selection: _Selection = Field(default_factory=_Selection)
    """Which part of it."""


class ClientsSection(_Section):
    """ServeGen's clients; each is a tenant."""

    kind: Literal["clients"]
    rates_file: str
    """CSV with client, window_start_s, rate_rps, cv; windows last 600 s."""
    lengths_file: str
    """CSV with client, window_start_s, field (input_tokens or output_tokens), p50, p90, p99. Clients that it does not
    have send nothing."""
    start_s: _Seconds = 0.0
    """Where in the files to begin."""
    duration_s: _Positive
    """For how long requests arrive."""


class LossesSection(_Losses):  # type: ignore[misc]
    """How replicas are lost; capacity may come from a file."""

    mean_life_s: Annotated[float, Field(ge=1, le=MAX_SECONDS)] | None = None
    """Mean time to failure of a replica; by default none fails. With much shorter lives no request would ever end."""
    notice_s: _Seconds = 30.0
    capacity_file: str | None = None
    """Spot availability: lines of time_ms,add|remove,node; bundled samples have names without a path."""
    capacity_start_s: _Seconds = 0.0
    """What the file says of this moment is what the simulation begins with."""


class ClusterSection(_Section):
    """How many replicas there are, and what happens between them."""

    num_replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] = 1
    start_s: _Seconds = 60.0
    counts_output_kv: bool = True
    consolidation_interval_s: _Interval | None = None
    max_moves: _Count = 32


class SimulationSpec(_Section):
    """A simulation."""

    seed: int = 0
    """Of everything that is drawn, but what the router draws (``router.seed``) and where requests of a trace of format
    mooncake come within the three seconds that it tells."""
    until_s: _Positive | None = None
    """When to stop, at the latest; it ends when the last request has ended."""
    sample_interval_s: _Interval | None = None
    """Time between samples of queue, memory and service; by default there are some hundreds of them."""
    replica: ReplicaSection
    adapters: AdaptersSection = Field(default_factory=AdaptersSection)
    workload: Annotated[SyntheticSection | TraceSection | ClientsSection, Field(discriminator="kind")]
    """The requests."""
    tenants: Annotated[dict[str, _Positive], Field(min_length=1)] = Field(default_factory=lambda: {"default": 1.0})
    """Share of the requests, by tenant; clients (workload.kind) bring their own."""
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    router: _Router = Field(default_factory=_Router)
    autoscaler: _Autoscaler = Field(default_factory=_Autoscaler)
    losses: LossesSection = Field(default_factory=LossesSection)
    slo: _Slo = Field(default_factory=_Slo)


_TAGS: dict[str, Container[str]] = {
    "workload": ("synthetic", "trace", "clients"),
    "popularity": (*POPULARITIES, "recorded"),
    "arrivals": ARRIVALS,
    "prompt_lengths": LENGTHS,
    "output_lengths": LENGTHS,
}
"""Key of alternatives -> their kinds."""


def parse_spec(values: Mapping[str, Any], name: str) -> SimulationSpec:
    """Check a spec. A section ``plan``, which is for ``pomona plan``, is passed over.

    Args:
        values: the file's content.
        name: of the file, for messages.

    Raises:
        ConfigError: says which key is wrong, and how.
    """
    refuse_huge(values, f"{name}: ")
    try:
        return SimulationSpec.model_validate({key: value for key, value in values.items() if key != "plan"})
    except ValidationError as error:
        raise ConfigError(f"{name}: {problem(error, _TAGS)}") from error
