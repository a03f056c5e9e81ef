"""A workload: who asks for what, when. A spec is a few numbers and a seed; the requests follow from it exactly.

Each aspect (arrivals, lengths, adapters, tenants) has a random stream of its own, so that changing one leaves the
others as they were: two popularities are compared under the same arrivals and lengths. No text, no tokens, no clock:
the load generator and the simulator turn these requests into their own.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from pomona.core.errors import ConfigError
from pomona.core.ids import TenantId
from pomona.workload.arrivals import Arrivals
from pomona.workload.checks import require_count, require_positive
from pomona.workload.lengths import Lengths
from pomona.workload.popularity import Popularity

DEFAULT_TENANT = TenantId("default")


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request to come."""

    arrival_s: float
    """Seconds after the workload's start."""
    num_prompt_tokens: int
    num_output_tokens: int
    """Tokens to ask for; a server may stop earlier unless told to ignore the end of sequence."""
    adapter_index: int | None = None
    """0 is the most popular adapter; None is the base model alone."""
    tenant_id: TenantId = DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What to generate. Equal specs generate equal requests, on any machine."""

    num_requests: int
    arrivals: Arrivals
    prompt_lengths: Lengths
    output_lengths: Lengths
    popularity: Popularity
    tenant_weights: tuple[tuple[TenantId, float], ...] = ((DEFAULT_TENANT, 1.0),)
    """(tenant, share of the requests); shares need not sum to 1."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse empty workloads, and tenants that are missing, doubled or without a positive share."""
        require_count("num_requests", self.num_requests)
        tenants = [tenant for tenant, _ in self.tenant_weights]
        if not tenants or len(set(tenants)) != len(tenants):
            raise ConfigError(f"tenant_weights names {tenants}: must be at least one tenant, each once")
        for tenant, weight in self.tenant_weights:
            require_positive(f"tenant_weights[{tenant}]", weight)


def _stream(spec: WorkloadSpec, aspect: str) -> random.Random:
    return random.Random(f"{spec.seed}/{aspect}")


def iter_requests(spec: WorkloadSpec) -> Iterator[WorkloadRequest]:
    """Yield the spec's requests one by one, by ascending arrival, without holding them all."""
    prompt_rng, output_rng, tenant_rng = (_stream(spec, aspect) for aspect in ("prompt", "output", "tenant"))
    arrivals = spec.arrivals.times(_stream(spec, "arrivals"))
    adapters = spec.popularity.indices(_stream(spec, "adapters"))
    tenants = [tenant for tenant, _ in spec.tenant_weights]
    weights = list(itertools.accumulate(weight for _, weight in spec.tenant_weights))
    for arrival_s, adapter_index in itertools.islice(zip(arrivals, adapters, strict=False), spec.num_requests):
        yield WorkloadRequest(
            arrival_s=arrival_s,
            num_prompt_tokens=spec.prompt_lengths.draw(prompt_rng),
            num_output_tokens=spec.output_lengths.draw(output_rng),
            adapter_index=adapter_index,
            tenant_id=tenant_rng.choices(tenants, cum_weights=weights)[0],
        )


def generate(spec: WorkloadSpec) -> list[WorkloadRequest]:
    """Return the spec's requests, by ascending arrival."""
    return list(iter_requests(spec))
