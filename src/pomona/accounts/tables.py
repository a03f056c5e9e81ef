"""The tables of accounts, as SQLAlchemy models. Migrations make them; a test compares the two.

Times are Unix seconds. Money is whole nano-units (10^-9 of the operator's currency), so that sums are exact.
"""

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Table(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {str: Text, int: BigInteger, bytes: LargeBinary}  # noqa: RUF012  # SQLAlchemy's own name


class RevisionRow(Table):
    """One row, counted up by every change of identities, limits, prices or shares: caches compare it with their own."""

    __tablename__ = "revision"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int]


class TenantRow(Table):
    """A tenant."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(primary_key=True)
    created_s: Mapped[float]
    disabled_s: Mapped[float | None]
    """When it was disabled: none of its keys is accepted since."""
    cache_secret: Mapped[bytes]
    """From which its prefix-cache salt is derived; never leaves the server."""
    prefix_group: Mapped[str | None]
    """Tenants of one group find each other's prompt beginnings in the prefix cache; None shares with nobody."""
    weight: Mapped[float]
    """Its share where tenants compete."""
    priority: Mapped[str] = mapped_column(server_default="standard")
    """interactive, standard or batch: the class of its requests."""
    ttft_s: Mapped[float | None]
    """Target for the time to first token."""
    tpot_s: Mapped[float | None]
    """Target for the time per output token."""


class KeyRow(Table):
    """An API key: of a tenant, or of an administrator."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    """The visible part of the key."""
    tenant_id: Mapped[str | None] = mapped_column(ForeignKey("tenants.id"), index=True)
    role: Mapped[str | None]
    """Of an administrator; None for a tenant's key."""
    name: Mapped[str]
    digest: Mapped[bytes]
    """SHA-256 of the whole key, which is random, so that nothing slower is needed."""
    created_s: Mapped[float]
    expires_s: Mapped[float | None]
    revoked_s: Mapped[float | None]
    root_id: Mapped[str]
    """The first key of the rotation that this one belongs to; limits are counted under it."""
    replaces: Mapped[str | None]
    """Id of the key that it was rotated from."""


class LimitsRow(Table):
    """What a tenant, a key or an adapter may use. None is no limit."""

    __tablename__ = "limits"

    scope: Mapped[str] = mapped_column(primary_key=True)
    """tenant, key or adapter."""
    scope_id: Mapped[str] = mapped_column(primary_key=True)
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None]
    max_concurrency: Mapped[int | None]
    monthly_tokens: Mapped[int | None]
    monthly_cost_nanos: Mapped[int | None]


class BucketRow(Table):
    """How much of a rate limit is used: drains at the limit's rate, must stay below its minute's worth."""

    __tablename__ = "buckets"

    name: Mapped[str] = mapped_column(primary_key=True)
    level: Mapped[float]
    at_s: Mapped[float]
    """When the level was that."""


class SlotsRow(Table):
    """How many requests a server process may have in flight within one concurrency limit."""

    __tablename__ = "slots"

    name: Mapped[str] = mapped_column(primary_key=True)
    process_id: Mapped[str] = mapped_column(primary_key=True)
    num_held: Mapped[int]
    expires_s: Mapped[float]
    """After this the process counts as dead."""


class PriceRow(Table):
    """Prices of an adapter's tokens, in nano-units per token."""

    __tablename__ = "prices"

    adapter: Mapped[str] = mapped_column(primary_key=True)
    """Qualified name; the empty name holds for all that have no row."""
    input_nanos: Mapped[int]
    cached_nanos: Mapped[int]
    output_nanos: Mapped[int]


class UsageRow(Table):
    """The ledger: one row per request that was accepted, whatever became of it; of a batch's line, when it is
    answered."""

    __tablename__ = "usage"
    __table_args__ = (Index("ix_usage_tenant_id_ended_s", "tenant_id", "ended_s"), Index("ix_usage_ended_s", "ended_s"))

    request_id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str]
    key_id: Mapped[str]
    adapter: Mapped[str]
    """Qualified name of the adapter, or the base model's."""
    adapter_id: Mapped[str]
    """Digest of the very version that answered; empty for the base."""
    input_tokens: Mapped[int]
    """Each prompt once, whatever ``n``."""
    cached_tokens: Mapped[int]
    """Those of them that were found in the prefix cache."""
    output_tokens: Mapped[int]
    """All that the engine reported, of all choices."""
    engine_s: Mapped[float]
    """Seconds in the engine, from the first step that computed a part of it to its end; summed over choices."""
    outcome: Mapped[str]
    """finish, abort, fail, reject, or lost (the server died)."""
    started_s: Mapped[float]
    ended_s: Mapped[float]
    day: Mapped[str]
    """Of the end, in UTC, such as 2026-11-21."""
    cost_nanos: Mapped[int]


class SpendingRow(Table):
    """Sums of the ledger per month: changed in the transaction that inserts a row of the ledger, and nowhere else."""

    __tablename__ = "spending"

    scope: Mapped[str] = mapped_column(primary_key=True)
    """tenant, key or adapter."""
    scope_id: Mapped[str] = mapped_column(primary_key=True)
    month: Mapped[str] = mapped_column(primary_key=True)
    num_requests: Mapped[int]
    num_tokens: Mapped[int]
    cost_nanos: Mapped[int]


class AdapterRow(Table):
    """An adapter that belongs to a tenant."""

    __tablename__ = "adapters"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]
    is_public: Mapped[bool]
    """Shared with all tenants."""
    created_s: Mapped[float]


class ShareRow(Table):
    """An adapter shared with one more tenant."""

    __tablename__ = "adapter_shares"

    owner_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)


class FileRow(Table):
    """A file that a tenant has uploaded, or that a batch has written; its content lies in the data folder."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    """batch, or batch_output."""
    num_bytes: Mapped[int]
    created_s: Mapped[float]


class BatchRow(Table):
    """A batch: a file of requests that are carried out when there is room."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    key_id: Mapped[str]
    """On whose behalf its requests are made."""
    endpoint: Mapped[str]
    input_file_id: Mapped[str]
    output_file_id: Mapped[str | None]
    error_file_id: Mapped[str | None]
    status: Mapped[str]
    """validating, in_progress, finalizing, completed, failed, expired, cancelling or cancelled, as OpenAI has them."""
    errors: Mapped[str | None]
    """JSON: what is wrong with the input file."""
    user_metadata: Mapped[str | None]
    """JSON: what the client attached."""
    num_total: Mapped[int]
    num_completed: Mapped[int]
    num_failed: Mapped[int]
    created_s: Mapped[float]
    in_progress_s: Mapped[float | None]
    ended_s: Mapped[float | None]
    expires_s: Mapped[float]
    process_id: Mapped[str | None]
    """The server process that works on it."""
    leased_until_s: Mapped[float]
    """After this another process may take it over."""
