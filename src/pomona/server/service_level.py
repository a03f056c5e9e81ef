"""What the scheduler is told to give a request: its class, from the body; share and targets, from the tenant.

OpenAI's ``service_tier`` names the classes: "priority" is the interactive one, "flex" the batch one, "auto" and
"default" the one between. On a server with accounts the interactive class is for tenants that the operator named: who
could put all their requests before those of others would. Asked for by anybody else it is the standard class, as
OpenAI's API does it for projects without access.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pomona.core.errors import ConfigError, InvalidRequestError
from pomona.core.request import Priority, ServiceLevel
from pomona.server.tenant import Caller

ServiceTier = Literal["auto", "default", "flex", "priority"]

EVERYBODY: Final = "*"
"""Stands for every tenant in settings."""
_PRIORITY_OF: Final[Mapping[ServiceTier | None, Priority]] = {
    "priority": Priority.INTERACTIVE,
    "flex": Priority.BATCH,
}


@dataclass(frozen=True, slots=True)
class Targets:
    """Targets of a tenant; None sets none."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class ServiceLevels:
    """The operator's part of it."""

    priority_tenants: frozenset[str] = frozenset()
    """Who may use the interactive class where there are accounts; ``*`` is everybody."""
    targets: tuple[tuple[str, Targets], ...] = ()
    """By tenant; ``*`` for those not named."""

    def level_of(self, caller: Caller, tier: ServiceTier | None) -> ServiceLevel:
        """What a request of this caller is to be given: the tenant's own level, as far as nothing else is said."""
        own = caller.service_level
        is_named = not self.priority_tenants.isdisjoint((caller.tenant_id, EVERYBODY))
        may_hurry = caller.principal is None or own.priority is Priority.INTERACTIVE or is_named
        priority = _PRIORITY_OF.get(tier, own.priority)
        if own.priority is Priority.BATCH or (priority is Priority.INTERACTIVE and not may_hurry):
            priority = own.priority
        if priority is Priority.BATCH:
            return ServiceLevel(priority, own.weight)  # nobody waits, so there is nothing to be in time for
        targets = Targets(own.ttft_s, own.tpot_s)
        for tenant_id, theirs in self.targets:
            if tenant_id == caller.tenant_id:
                targets = theirs
                break
            if tenant_id == EVERYBODY and targets == Targets():
                targets = theirs
        return ServiceLevel(priority, own.weight, targets.ttft_s, targets.tpot_s)


def parse_targets(text: str) -> tuple[str, Targets]:
    """Read a setting such as ``acme=0.5,0.05``: TTFT, then TPOT, in seconds; either may be left empty.

    Raises:
        ConfigError: it does not read so, or a target is not a positive number.
    """
    tenant_id, separator, values = text.partition("=")
    parts = values.split(",")
    if not tenant_id or not separator or len(parts) > 2 or not any(parts):
        raise ConfigError(f"target {text!r}: must be TENANT=TTFT_S,TPOT_S")
    try:
        ttft_s, tpot_s = ([float(part) if part else None for part in parts] + [None])[:2]
        ServiceLevel(ttft_s=ttft_s, tpot_s=tpot_s)
    except (ValueError, InvalidRequestError) as error:
        raise ConfigError(f"target {text!r}: {error}") from error
    return tenant_id, Targets(ttft_s, tpot_s)
