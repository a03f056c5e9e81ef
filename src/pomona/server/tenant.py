"""Who a request belongs to. Until accounts exist, everybody is the one default tenant."""

import hashlib
import hmac
from typing import Final

from pomona.core.ids import TenantId

DEFAULT_TENANT: Final = TenantId("default")
_NUM_SALT_BYTES = 16


def cache_salt(secret: bytes, tenant_id: TenantId) -> bytes:
    """Return the salt that keeps this tenant's prefix-cache blocks from everybody else.

    Args:
        secret: known to the server only, so that no client can compute another tenant's salt.
        tenant_id: whose salt.
    """
    return hmac.new(secret, b"prefix-cache\0" + tenant_id.encode(), hashlib.sha256).digest()[:_NUM_SALT_BYTES]
