"""How many replicas there should be: policies over what the controller observes, without clock or side effect.

A policy sees one observation after another and returns the number of replicas wanted; whoever asked starts new ones or
drains old ones. All keep between ``min_replicas`` and ``max_replicas``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from pomona.core.errors import ConfigError

AutoscalerName = Literal["fixed", "light-load", "load-proportional", "target-utilisation"]


@dataclass(frozen=True, slots=True)
class FleetObservation:
    """The fleet at one moment, and what happened since the last observation."""

    now_s: float
    loads: tuple[int, ...]
    """Requests on each replica that serves or starts, by replica number; draining ones are left out."""
    num_waiting: int
    """Requests that wait for a replica."""
    num_ended: int
    """Requests that ended since the last observation."""
    num_missed: int
    """Those of them that missed the objective."""
    idle_share: tuple[float, ...] = ()
    """Share of the time since the last observation, or since it began to serve, that each replica of ``loads`` was
    idle; 0 for one that starts."""
    num_starting: int = 0
    """Replicas of ``loads`` that do not serve yet."""


@dataclass(frozen=True, slots=True)
class AutoscalerConfig:
    """Which policy, and its settings.

    Raises:
        ConfigError: a value is out of range.
    """

    policy: AutoscalerName = "fixed"
    """What decides. ``fixed`` starts others for those that are lost, ``light-load`` is Punica's way,
    ``load-proportional`` Symphony's, ``target-utilisation`` that of Kubernetes."""
    min_replicas: int = 1
    """The fleet never gets smaller."""
    max_replicas: int = 1
    """The fleet never gets larger."""
    interval_s: float = 10.0
    """Time between observations."""
    light_requests: int = 8
    """Fewer requests than this is a light load (``light-load``)."""
    target_requests: float = 16.0
    """Requests per replica to aim at (``target-utilisation``)."""
    deadband: float = 0.1
    """Relative change of the load that changes nothing (``target-utilisation``)."""
    max_missed_share: float = 0.01
    """Share of late requests at which the fleet grows (``load-proportional``)."""
    min_idle_share: float = 0.9
    """A replica at the end of the order that is idle for this share of the time is given back
    (``load-proportional``)."""
    grow_share: float = 0.1
    """Growth in one observation, relative to the fleet, at least one replica (``load-proportional``)."""
    num_calm: int = 3
    """Observations in a row that must agree before the fleet shrinks."""

    def __post_init__(self) -> None:
        """Check every range once."""
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"min_replicas is {self.min_replicas}, max_replicas {self.max_replicas}: must be 1 <= min <= max"
            )
        for name in ("interval_s", "target_requests"):
            if not getattr(self, name) >= 1e-3:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 0.001")
        for name in ("deadband", "max_missed_share", "min_idle_share", "grow_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be between 0 and 1")
        for name in ("light_requests", "num_calm"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be at least 1")


class Autoscaler(Protocol):
    """Says how many replicas there should be."""

    def wanted(self, seen: FleetObservation) -> int:
        """The number of replicas wanted, starting ones included, draining ones not."""
        ...


class FixedSize:
    """Always as many as ``max_replicas``; lost ones are replaced."""

    def __init__(self, config: AutoscalerConfig) -> None:
        self._config = config

    def wanted(self, seen: FleetObservation) -> int:
        """See ``Autoscaler``."""
        del seen
        return self._config.max_replicas


class LightLoad:
    """Punica (section 5.1): one more replica when none is lightly loaded; empty ones go, except one to take what comes.

    It goes with routing to the largest working set, which is what makes replicas empty.
    """

    def __init__(self, config: AutoscalerConfig) -> None:
        self._config = config
        self._calm = _Calm(config.num_calm)

    def wanted(self, seen: FleetObservation) -> int:
        """See ``Autoscaler``."""
        config, num_replicas = self._config, len(seen.loads)
        num_light = sum(load < config.light_requests for load in seen.loads)
        num_empty = sum(load == 0 for load in seen.loads)
        if num_light == 0 or seen.num_waiting > 0:
            # Those that start will take who waits, and stay lightly loaded if these are few.
            is_enough = seen.num_waiting < config.light_requests * seen.num_starting
            return _within(config, self._calm.settle(num_replicas, num_replicas + (not is_enough)))
        num_spare = min(num_empty, num_light - 1)
        return _within(config, self._calm.settle(num_replicas, num_replicas - num_spare))


class LoadProportional:
    """Symphony's two signals (arXiv 2308.07470): late requests make the fleet grow, idle replicas at the end of the
    order make it shrink. It needs routing that fills replicas in a fixed order, such as ``punica``."""

    def __init__(self, config: AutoscalerConfig) -> None:
        self._config = config
        self._calm = _Calm(config.num_calm)

    def wanted(self, seen: FleetObservation) -> int:
        """See ``Autoscaler``."""
        config, num_replicas = self._config, len(seen.loads)
        is_late = seen.num_ended > 0 and seen.num_missed > config.max_missed_share * seen.num_ended
        if is_late or seen.num_waiting > 0:
            growth = max(1, math.floor(config.grow_share * num_replicas))
            return _within(config, self._calm.settle(num_replicas, num_replicas + growth))
        num_idle = sum(share >= config.min_idle_share for share in seen.idle_share)
        return _within(config, self._calm.settle(num_replicas, num_replicas - max(0, num_idle - 1)))


class TargetUtilisation:
    """As many replicas as bring the mean load to the target; small differences change nothing (the Kubernetes
    horizontal autoscaler's rule)."""

    def __init__(self, config: AutoscalerConfig) -> None:
        self._config = config
        self._calm = _Calm(config.num_calm)

    def wanted(self, seen: FleetObservation) -> int:
        """See ``Autoscaler``."""
        config, num_replicas = self._config, len(seen.loads)
        load = (sum(seen.loads) + seen.num_waiting) / config.target_requests
        is_near = num_replicas > 0 and abs(load - num_replicas) <= config.deadband * num_replicas
        return _within(config, self._calm.settle(num_replicas, num_replicas if is_near else math.ceil(load)))


class _Calm:
    """Growth at once, shrinking only after several observations that would shrink, and then by the least of them."""

    def __init__(self, num_calm: int) -> None:
        self._num_calm = num_calm
        self._lower: list[int] = []

    def settle(self, num_replicas: int, wanted: int) -> int:
        if wanted >= num_replicas:
            self._lower.clear()
            return wanted
        self._lower.append(num_replicas - wanted)
        if len(self._lower) < self._num_calm:
            return num_replicas
        num_fewer = min(self._lower)
        self._lower.clear()
        return num_replicas - num_fewer


def _within(config: AutoscalerConfig, wanted: int) -> int:
    return min(max(wanted, config.min_replicas), config.max_replicas)


def make_autoscaler(config: AutoscalerConfig) -> Autoscaler:
    """Build the policy of that name."""
    policies: dict[AutoscalerName, Callable[[AutoscalerConfig], Autoscaler]] = {
        "fixed": FixedSize,
        "light-load": LightLoad,
        "load-proportional": LoadProportional,
        "target-utilisation": TargetUtilisation,
    }
    return policies[config.policy](config)
