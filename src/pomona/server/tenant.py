"""Who a request belongs to: the one default tenant of a server without accounts, or whom its API key stands for."""

import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from starlette.requests import HTTPConnection

from pomona.accounts.principal import DEFAULT_SERVICE_LEVEL, Principal
from pomona.core.ids import TenantId
from pomona.core.request import Priority, ServiceLevel

DEFAULT_TENANT: Final = TenantId("default")
_NUM_SALT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf the engine works."""

    tenant_id: TenantId
    cache_salt: bytes
    """Keeps the tenant's prefix-cache blocks from everybody else."""
    service_level: ServiceLevel = DEFAULT_SERVICE_LEVEL
    """What the scheduler is told of the tenant."""
    principal: Principal | None = None
    """None on a server without accounts."""


def cache_salt(secret: bytes, tenant_id: TenantId) -> bytes:
    """Return the salt that keeps this tenant's prefix-cache blocks from everybody else.

    Args:
        secret: known to the server only, so that no client can compute another tenant's salt.
        tenant_id: whose salt.
    """
    return hmac.new(secret, b"prefix-cache\0" + tenant_id.encode(), hashlib.sha256).digest()[:_NUM_SALT_BYTES]


def default_caller(secret: bytes) -> Caller:
    """Return whom a server without accounts works for."""
    return Caller(DEFAULT_TENANT, cache_salt(secret, DEFAULT_TENANT))


def set_principal(connection: HTTPConnection, principal: Principal) -> None:
    """Note whose key this HTTP request came with."""
    connection.scope["state"]["principal"] = principal


def principal_of(connection: HTTPConnection) -> Principal | None:
    """Return whose key this HTTP request came with; None on a server without accounts."""
    principal = connection.scope["state"].get("principal")
    assert principal is None or isinstance(principal, Principal)
    return principal


def tenant_caller(connection: HTTPConnection, principal: Principal) -> Caller:
    """Return whom a tenant's key lets the engine work for; lines of batches give way to everything else."""
    assert principal.tenant_id is not None, "administrators have no adapters and make no requests"
    level = principal.service_level
    if "is_batch" in connection.scope["state"]:
        level = ServiceLevel(Priority.BATCH, level.weight)
    return Caller(principal.tenant_id, principal.cache_salt, level, principal)
