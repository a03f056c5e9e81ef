"""The search behind ``pomona plan``: the smallest fleet that meets its objectives, by simulation and nothing else.

Galloping and halving find the smallest number of replicas for the first settings; then every other setting is tried
with one replica fewer, and so on until none meets the objectives there. So the answer's claim is exactly what was
simulated: it meets them, and no setting of the grid does with one replica fewer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from pomona.core.errors import ConfigError
from pomona.router.fleet import PolicyName

Relaxation = Literal["none", "compute", "kv", "adapter memory", "cold starts"]
"""A resource made plentiful, to see whether it is what the fleet lacks."""


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """One configuration of the fleet."""

    num_replicas: int
    adapter_share: float | None
    """Part of a replica's memory for KV and adapters that is given to adapter rows; None leaves it as it is."""
    policy: PolicyName


@dataclass(frozen=True, slots=True)
class Trial:
    """One simulation to run."""

    settings: PlanSettings
    relaxation: Relaxation = "none"
    rate_scale: float = 1.0
    """Arrivals per second relative to the workload's."""
    is_whole: bool = False
    """The whole workload, not the part that the search looks at."""


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """What a simulation showed."""

    attainment: float
    ttft_p99_s: float | None
    """None if nobody got a token."""
    tpot_p99_s: float | None
    """None if no answer had two."""
    busy_share: float
    """Of the replicas' time."""
    num_adapter_loads: int
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """What may be chosen.

    Raises:
        ConfigError: a value is out of range.
    """

    max_replicas: int = 64
    adapter_shares: tuple[float | None, ...] = (None,)
    policies: tuple[PolicyName, ...] = ("least-loaded", "affinity")
    min_attainment: float = 0.95

    def __post_init__(self) -> None:
        """Check every range once."""
        if self.max_replicas < 1:
            raise ConfigError(f"max_replicas is {self.max_replicas}: must be at least 1")
        if not self.adapter_shares or not all(share is None or 0.0 < share < 1.0 for share in self.adapter_shares):
            raise ConfigError(f"adapter_shares is {list(self.adapter_shares)}: must be shares between 0 and 1")
        if not self.policies:
            raise ConfigError("policies is empty: must name at least one")
        if not 0.0 < self.min_attainment <= 1.0:
            raise ConfigError(f"min_attainment is {self.min_attainment}: must be greater than 0 and at most 1")


@dataclass(slots=True)
class Plan:
    """The answer."""

    settings: PlanSettings
    outcome: TrialOutcome
    """On the whole workload."""
    one_fewer: TrialOutcome | None
    """The best settings with one replica fewer, on the whole workload; None if the answer is one replica."""
    one_fewer_settings: PlanSettings | None
    binding: dict[Relaxation, float] = field(default_factory=dict)
    """Attainment with one replica fewer when a resource is made plentiful; "none" is as it is."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(replicas, attainment) with the answer's other settings."""
    sensitivity: list[tuple[str, float]] = field(default_factory=list)
    """(what is changed, attainment)."""
    num_trials: int = 0

    @property
    def binds(self) -> str:
        """What the fleet would lack with one replica fewer (a fleet of one: at twice the rate): the resource that helps
        most when it is plentiful; "nothing" if none helps."""
        as_it_is = self.binding.get("none", 0.0)
        helped = {name: value for name, value in self.binding.items() if name != "none" and value > as_it_is}
        return max(helped, key=lambda name: helped[name]) if helped else "nothing"


Simulate = Callable[[Trial], TrialOutcome]


class PlanSearch:
    """One search; every trial is simulated once.

    Args:
        space: what may be chosen.
        simulate: runs a trial.
        note: told of every trial that was run.
    """

    def __init__(
        self, space: SearchSpace, simulate: Simulate, note: Callable[[Trial, TrialOutcome], None] = lambda *_: None
    ) -> None:
        self._space = space
        self._simulate = simulate
        self._note = note
        self._known: dict[Trial, TrialOutcome] = {}

    def run(self) -> Plan:
        """Search, verify on the whole workload in both directions, and look around the answer.

        Raises:
            ConfigError: not even the largest fleet meets the objectives.
        """
        space = self._space
        settings = self._smallest(PlanSettings(1, space.adapter_shares[0], space.policies[0]), 1)
        # With other settings one replica fewer may do; with none left to try, none does.
        while settings.num_replicas > 1:
            better = self._best(settings.num_replicas - 1, is_whole=False)
            if not self._meets(Trial(better)):
                break
            settings = better
        settings = self._best(settings.num_replicas, is_whole=False)
        settings, fewer = self._verify(settings), None
        while settings.num_replicas > 1:
            fewer = self._best(settings.num_replicas - 1, is_whole=True)
            if not self._meets(Trial(fewer, is_whole=True)):
                break
            settings, fewer = fewer, None
        plan = Plan(settings, self._try(Trial(settings, is_whole=True)), None, None)
        if fewer is not None:
            plan.one_fewer_settings, plan.one_fewer = fewer, self._try(Trial(fewer, is_whole=True))
        self._look_around(plan)
        plan.num_trials = len(self._known)
        return plan

    def _try(self, trial: Trial) -> TrialOutcome:
        outcome = self._known.get(trial)
        if outcome is None:
            outcome = self._known[trial] = self._simulate(trial)
            self._note(trial, outcome)
        return outcome

    def _meets(self, trial: Trial) -> bool:
        return self._try(trial).attainment >= self._space.min_attainment

    def _smallest(self, settings: PlanSettings, low: int) -> PlanSettings:
        """The smallest fleet with these other settings, ``low`` or larger, taken that more replicas never hurt; with
        the best of all settings if these do not do with the largest fleet."""
        first, high = low, low
        while not self._meets(Trial(replace(settings, num_replicas=high))):
            if high >= self._space.max_replicas:
                settings, low = self._best(high, is_whole=False), first
                if self._meets(Trial(settings)):
                    break
                raise self._too_few(settings, is_whole=False)
            low, high = high + 1, min(2 * high, self._space.max_replicas)
        while low < high:
            middle = (low + high) // 2
            if self._meets(Trial(replace(settings, num_replicas=middle))):
                high = middle
            else:
                low = middle + 1
        return replace(settings, num_replicas=high)

    def _best(self, num_replicas: int, *, is_whole: bool) -> PlanSettings:
        """The settings of the grid with the highest attainment; the first among equals."""
        grid = [
            PlanSettings(num_replicas, share, policy)
            for policy in self._space.policies
            for share in self._space.adapter_shares
        ]
        return max(grid, key=lambda settings: self._try(Trial(settings, is_whole=is_whole)).attainment)

    def _verify(self, settings: PlanSettings) -> PlanSettings:
        """The part of the workload that was searched may be easier than the whole: try other settings, then add
        replicas, until that is met."""
        while not self._meets(Trial(settings, is_whole=True)):
            settings = self._best(settings.num_replicas, is_whole=True)
            if self._meets(Trial(settings, is_whole=True)):
                break
            if settings.num_replicas >= self._space.max_replicas:
                raise self._too_few(settings, is_whole=True)
            settings = replace(settings, num_replicas=settings.num_replicas + 1)
        return settings

    def _too_few(self, best: PlanSettings, *, is_whole: bool) -> ConfigError:
        attainment = self._try(Trial(best, is_whole=is_whole)).attainment
        part = " of the whole workload" if is_whole else ""
        return ConfigError(
            f"plan.max_replicas is {best.num_replicas}: attainment{part} is then {attainment:.1%} at best, and must be "
            f"{self._space.min_attainment:.1%}; allow more replicas or relax the objectives"
        )

    def _look_around(self, plan: Plan) -> None:
        settings, count = plan.settings, plan.settings.num_replicas
        for num_replicas in sorted({max(1, count - 2), max(1, count - 1), count, count + 1, count + 2}):
            trial = Trial(replace(settings, num_replicas=num_replicas))
            plan.curve.append((num_replicas, self._try(trial).attainment))
        for scale in (0.8, 0.9, 1.1, 1.2):
            plan.sensitivity.append((f"rate x {scale:g}", self._try(Trial(settings, rate_scale=scale)).attainment))
        for share in self._space.adapter_shares:
            if share is not None:
                trial = Trial(replace(settings, adapter_share=share))
                plan.sensitivity.append((f"adapter share {share:g}", self._try(trial).attainment))
        for policy in self._space.policies:
            trial = Trial(replace(settings, policy=policy))
            plan.sensitivity.append((f"router {policy}", self._try(trial).attainment))
        starved = plan.one_fewer_settings
        scale = 1.0
        if starved is None:
            starved, scale = settings, 2.0
        resources: tuple[Relaxation, ...] = ("none", "compute", "kv", "adapter memory", "cold starts")
        # Where the part that was searched is met with one replica fewer, only the whole shows what is lacking.
        is_whole = self._meets(Trial(starved, "none", scale))
        for resource in resources:
            plan.binding[resource] = self._try(Trial(starved, resource, scale, is_whole)).attainment
