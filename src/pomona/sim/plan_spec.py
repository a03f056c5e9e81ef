"""What ``pomona plan`` is told: the spec of a simulation, and a section ``plan`` that says what may be chosen and how
much must be met. Unknown keys and impossible values are refused with the path of the key.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from pomona.core.errors import ConfigError
from pomona.router.fleet import PolicyName
from pomona.sim.cluster_config import MAX_REPLICAS
from pomona.sim.plan_search import SearchSpace
from pomona.sim.sections import STRICT, problem
from pomona.sim.spec import SimulationSpec, parse_spec


class PlanSection(BaseModel):
    """For `pomona plan` only: what it may choose, and how much must be met."""

    model_config = STRICT

    min_attainment: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the requests that arrive that must meet ``slo``."""
    max_replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] = 64
    """Largest fleet to try."""
    adapter_shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Values of replica.adapter_share to choose from; without any, replicas are as they are. With a machine only: a
    profile does not say what a KV block and an adapter page cost in bytes."""
    policies: Annotated[tuple[PolicyName, ...], Field(min_length=1)] = ("least-loaded", "affinity")
    """Routers to choose from."""
    window_start_s: Annotated[float, Field(ge=0)] = 0.0
    """Beginning of the part of the workload that the search looks at."""
    window_s: Annotated[float, Field(gt=0)] = 300.0
    """Its length; the answer is verified on the whole workload."""


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """One question."""

    simulation: SimulationSpec
    plan: PlanSection

    @property
    def space(self) -> SearchSpace:
        """What may be chosen."""
        plan = self.plan
        shares = plan.adapter_shares or (None,)
        return SearchSpace(plan.max_replicas, shares, plan.policies, plan.min_attainment)


def parse_plan(values: Mapping[str, Any], name: str) -> PlanSpec:
    """Check a spec.

    Args:
        values: the file's content.
        name: of the file, for messages.

    Raises:
        ConfigError: says which key is wrong, and how.
    """
    simulation = parse_spec(values, name)
    try:
        plan = PlanSection.model_validate(values.get("plan", {}))
    except ValidationError as error:
        raise ConfigError(f"{name}: {problem(error, {}, 'plan')}") from error
    if simulation.until_s is not None:
        raise ConfigError(f"{name}: until_s: a plan is made for the whole workload; shorten that instead")
    if plan.adapter_shares and simulation.replica.profile is not None:
        raise ConfigError(
            f"{name}: plan.adapter_shares: needs replica.machine; a profile's memory cannot be divided anew"
        )
    if not any(getattr(simulation.slo, name) is not None for name in ("ttft_s", "tpot_s", "e2e_s")):
        raise ConfigError(f"{name}: slo: needs at least one objective to plan for")
    return PlanSpec(simulation, plan)
