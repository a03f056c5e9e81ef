"""The file that ``pomona plan`` reads: workload, adapters, replica, objectives, and what may be chosen. Unknown fields
and impossible values are refused with the path of the field.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pomona.core.errors import ConfigError, PomonaError
from pomona.metrics.slo import Slo
from pomona.router.fleet import PolicyName
from pomona.sim.cost_model import CostTerm, LinearCost
from pomona.sim.plan_search import SearchSpace
from pomona.sim.profile_file import TermEntry


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WorkloadPart(_Part):
    """Recorded requests."""

    trace: str
    """Path of the trace, relative to the spec, or the name of a sample of the package."""
    format: Literal["azure", "mooncake", "plain"] = "azure"
    start_s: float = Field(default=0.0, ge=0)
    """Leave out what arrived before."""
    duration_s: float | None = Field(default=None, gt=0)
    """Length of the part of the trace that counts, in its own time; without it, all."""
    speed: float = Field(default=1.0, gt=0)
    """2 lets requests arrive twice as fast as recorded."""
    seed: int = 0


class AdaptersPart(_Part):
    """Who is asked for."""

    num_adapters: int = Field(ge=1)
    lora_ranks: tuple[int, ...] = Field(min_length=1)
    """Dealt out in turn."""
    zipf_alpha: float = Field(default=0.92, ge=0, le=20)

    @model_validator(mode="after")
    def _ranks_are_positive(self) -> Self:
        if min(self.lora_ranks) < 1:
            raise ValueError(f"lora_ranks has {min(self.lora_ranks)}: ranks must be at least 1")
        return self


class ReplicaPart(_Part):
    """One replica: its memory, limits and speed."""

    cache_bytes: int = Field(ge=1)
    """Device memory for KV and adapter rows together."""
    kv_token_bytes: int = Field(ge=1)
    """KV of one token."""
    rank_row_bytes: int = Field(ge=1)
    """One rank row of an adapter, all projections of all layers."""
    rows_per_page: int = Field(default=8, ge=1)
    block_size: int = Field(default=16, ge=1)
    max_model_len: int = Field(default=8192, ge=2)
    max_num_seqs: int = Field(default=256, ge=1)
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    step_s: float = Field(ge=0)
    """Seconds of every step, before its terms."""
    terms: tuple[TermEntry, ...] = ()
    """Seconds in proportion to quantities of a step, as in a profile."""

    def cost_model(self, compute_scale: float, *, has_free_loads: bool) -> LinearCost:
        """Seconds of a step.

        Args:
            compute_scale: factor on everything but loads.
            has_free_loads: copying adapters costs nothing.
        """
        terms = []
        for term in self.terms:
            is_load = term.quantity in ("num_loads", "num_loaded_pages")
            scale = (0.0 if has_free_loads else 1.0) if is_load else compute_scale
            up_to = float("inf") if term.up_to is None else term.up_to
            terms.append(CostTerm(term.quantity, scale * term.seconds_each, term.above, up_to))
        return LinearCost(compute_scale * self.step_s, tuple(terms))


class SloPart(_Part):
    """What every request should meet, and how many of them must."""

    ttft_s: float | None = Field(default=None, gt=0)
    tpot_s: float | None = Field(default=None, gt=0)
    e2e_s: float | None = Field(default=None, gt=0)
    min_attainment: float = Field(default=0.95, gt=0, le=1)
    """Share of the requests that arrive."""

    @property
    def slo(self) -> Slo:
        """The objectives."""
        return Slo(self.ttft_s, self.tpot_s, self.e2e_s)


class SearchPart(_Part):
    """What may be chosen."""

    max_replicas: int = Field(default=64, ge=1)
    adapter_shares: tuple[float, ...] = (0.1, 0.25, 0.5)
    policies: tuple[PolicyName, ...] = ("least-loaded", "affinity")
    window_start_s: float = Field(default=0.0, ge=0)
    """Beginning of the part of the workload that the search looks at."""
    window_s: float = Field(default=300.0, gt=0)
    """Its length; the answer is verified on the whole."""


class PlanSpec(_Part):
    """One question."""

    workload: WorkloadPart
    adapters: AdaptersPart
    replica: ReplicaPart
    slo: SloPart
    search: SearchPart = SearchPart()

    @property
    def space(self) -> SearchSpace:
        """What may be chosen, checked."""
        search = self.search
        return SearchSpace(search.max_replicas, search.adapter_shares, search.policies, self.slo.min_attainment)

    @classmethod
    def parse(cls, fields: dict[str, object], name: str) -> Self:
        """Check a spec.

        Args:
            fields: as read from the file.
            name: of the file, for messages.

        Raises:
            ConfigError: with the path of the first field that is wrong.
        """
        try:
            spec = cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{name}: {path}: {first['msg']}") from error
        try:
            _ = spec.space
        except PomonaError as error:
            raise ConfigError(f"{name}: search.{error}") from error
        return spec
