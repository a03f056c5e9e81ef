"""Wire types of /v1/admin, /v1/shares and /v1/usage: bodies and answers."""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from pomona.server.protocol import Wire
from pomona.server.wire_fields import Metadata, Neutral

Weight = Annotated[float | None, Field(ge=0.001, le=1000)]
Target = Annotated[float | None, Field(ge=0, le=86_400)]
PriorityName = Literal["interactive", "standard", "batch"]


class TenantCreateRequest(Wire):
    """Body of POST /v1/admin/tenants."""

    id: str
    """1 to 63 lower-case letters, digits and inner dashes."""
    weight: Weight = None
    """Share where tenants compete, relative to others. Default 1."""
    priority: PriorityName | None = None
    """Class of its requests: a class gives way to those above it. Default: standard."""
    ttft_s: Target = None
    """Target for the time to first token: a request that would miss it is refused at once. Default: none."""
    tpot_s: Target = None
    """Target for the time per output token. Default: none."""
    prefix_group: str | None = None
    """Tenants of one group share their prefix cache. Default: with nobody."""


class TenantUpdateRequest(Wire):
    """Body of PATCH /v1/admin/tenants/{id}: what is left out stays as it is."""

    weight: Weight = None
    priority: PriorityName | None = None
    ttft_s: Target = None
    """0 takes the target away."""
    tpot_s: Target = None
    """0 takes the target away."""
    is_disabled: bool | None = None
    """None of a disabled tenant's keys is accepted."""
    prefix_group: str | None = None
    """An empty text leaves the group."""


class KeyCreateRequest(Wire):
    """Body of POST /v1/admin/keys: a tenant's key, or with a role an administrator's."""

    tenant: str | None = None
    role: Literal["admin", "operator", "auditor"] | None = None
    name: str | None = None
    """For people."""
    expires_at: float | None = None
    """Unix time. Default: never."""


class KeyRotateRequest(Wire):
    """Body of POST /v1/admin/keys/{id}/rotate."""

    overlap_s: float = Field(0.0, ge=0, le=366 * 86_400)
    """The old key is accepted for so many seconds more."""


class LimitsRequest(Wire):
    """Body of PUT /v1/admin/limits/{scope}/{id}: replaces all limits; null is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and output tokens."""
    max_concurrency: int | None = None
    """Requests in flight."""
    monthly_tokens: int | None = None
    monthly_cost: float | None = Field(None, ge=0, le=9e6)
    """In units of the operator's currency. Months are calendar months in UTC."""


class PriceRequest(Wire):
    """Body of PUT /v1/admin/prices: units of the operator's currency per million tokens."""

    adapter: str | None = None
    """An adapter's qualified name (``tenant/name``) or the base model's; null is the price of all others."""
    input_per_million: float = Field(0.0, ge=0, le=1e6)
    cached_per_million: float | None = Field(None, ge=0, le=1e6)
    """Prompt tokens found in the prefix cache. Default: as input."""
    output_per_million: float = Field(0.0, ge=0, le=1e6)


class ShareRequest(Wire):
    """Body of PUT /v1/shares: with whom an adapter is shared, from now on and with nobody else."""

    name: str
    """Of the caller's adapter; an administrator writes ``tenant/name``."""
    tenants: list[str] = Field(default_factory=list, max_length=1000, fail_fast=True)
    """Of a tenant's request, those that do not exist are passed over; an administrator's is refused."""
    public: bool = False
    """Shared with all tenants."""


class BatchCreateRequest(Wire):
    """Body of POST /v1/batches."""

    input_file_id: str
    """A file of purpose "batch": one JSON object per line, with custom_id, method, url and body."""
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    """Where its requests go."""
    completion_window: Literal["24h"]
    metadata: Metadata = None
    """Kept with the batch."""
    output_expires_after: Annotated[Any, Neutral()] = None


class TenantCard(msgspec.Struct, frozen=True):
    """A tenant."""

    id: str
    created_at: float
    is_disabled: bool
    weight: float
    priority: str
    ttft_s: float | None
    tpot_s: float | None
    prefix_group: str | None
    object: str = "tenant"


class TenantList(msgspec.Struct, frozen=True):
    """Answer to GET /v1/admin/tenants."""

    data: list[TenantCard]
    object: str = "list"


class KeyCard(msgspec.Struct, frozen=True):
    """An API key, without its secret."""

    id: str
    prefix: str
    tenant: str | None
    role: str | None
    name: str
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    replaces: str | None
    """Id of the key that it was rotated from."""
    key: str | None = None
    """The whole key: in the answer that makes it, and never again."""
    object: str = "api_key"


class KeyList(msgspec.Struct, frozen=True):
    """Answer to GET /v1/admin/keys."""

    data: list[KeyCard]
    object: str = "list"


class LimitsCard(msgspec.Struct, frozen=True):
    """All limits of a tenant, a key or an adapter."""

    scope: str
    id: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrency: int | None
    monthly_tokens: int | None
    monthly_cost: float | None
    object: str = "limits"


class PriceCard(msgspec.Struct, frozen=True):
    """A price."""

    adapter: str | None
    input_per_million: float
    cached_per_million: float
    output_per_million: float
    object: str = "price"


class PriceList(msgspec.Struct, frozen=True):
    """Answer to GET /v1/admin/prices."""

    data: list[PriceCard]
    object: str = "list"


class ShareCard(msgspec.Struct, frozen=True):
    """With whom an adapter is shared."""

    owner: str
    name: str
    tenants: list[str]
    public: bool
    object: str = "share"


class UsageSums(msgspec.Struct, frozen=True):
    """Usage of one group."""

    group: dict[str, str]
    """The columns it is summed up by."""
    num_requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    engine_seconds: float
    cost: float
    """In units of the operator's currency."""


class UsageReport(msgspec.Struct, frozen=True):
    """Answer to GET /v1/usage."""

    data: list[UsageSums]
    object: str = "usage"


class FileCard(msgspec.Struct, frozen=True):
    """A file, in OpenAI's shape."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str = "processed"
    object: str = "file"


class FileList(msgspec.Struct, frozen=True):
    """Answer to GET /v1/files."""

    data: list[FileCard]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"


class FileDeleted(msgspec.Struct, frozen=True):
    """Answer to DELETE /v1/files/{file_id}."""

    id: str
    deleted: bool = True
    object: str = "file"


class BatchError(msgspec.Struct, frozen=True):
    """What is wrong with a line of a batch's input file."""

    code: str
    message: str
    line: int | None
    param: str | None = None


class BatchErrors(msgspec.Struct, frozen=True):
    """What is wrong with a batch's input file."""

    data: list[BatchError]
    object: str = "list"


class BatchCounts(msgspec.Struct, frozen=True):
    """How far a batch has come."""

    total: int
    completed: int
    failed: int


class BatchCard(msgspec.Struct, frozen=True):
    """A batch, in OpenAI's shape."""

    id: str
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str] | None
    object: str = "batch"


class BatchList(msgspec.Struct, frozen=True):
    """Answer to GET /v1/batches."""

    data: list[BatchCard]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: str = "list"
