"""Who is asking: what an API key stands for, resolved once per request and never changed afterwards."""

import enum
from dataclasses import dataclass
from typing import Final

from pomona.core.ids import TenantId
from pomona.core.request import ServiceLevel


class Role(enum.StrEnum):
    """What an administrator's key may do."""

    ADMIN = "admin"
    """Everything."""
    OPERATOR = "operator"
    """Load and share adapters, read everything but usage; no tenants, keys, limits or prices are changed."""
    AUDITOR = "auditor"
    """Read everything, usage included; change nothing."""


DEFAULT_SERVICE_LEVEL: Final = ServiceLevel()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant, a key or an adapter may use; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    monthly_tokens: int | None = None
    monthly_cost_nanos: int | None = None

    @property
    def is_empty(self) -> bool:
        """True if nothing is limited."""
        return self == NO_LIMITS


NO_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Principal:
    """What a valid key stands for: a tenant, or an administrator with a role."""

    key_id: str
    root_id: str
    """Id of the first key of its rotation: what its limits are counted under."""
    tenant_id: TenantId | None
    """None for an administrator."""
    role: Role | None
    """None for a tenant."""
    digest: bytes
    expires_s: float | None
    cache_salt: bytes = b""
    """Of the tenant's blocks in the prefix cache."""
    service_level: ServiceLevel = DEFAULT_SERVICE_LEVEL
    """What the tenant may expect of the scheduler."""
    tenant_limits: Limits = NO_LIMITS
    key_limits: Limits = NO_LIMITS

    def __repr__(self) -> str:
        """Neither digest nor salt: representations end up in logs."""
        return f"Principal(pk-{self.key_id}, tenant={self.tenant_id}, role={self.role})"
