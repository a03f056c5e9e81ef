"""Tenants, their keys and limits, in the database. Blocking: the server calls it through ``Database.run``."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Final

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from pomona.accounts.buckets import bucket_name
from pomona.accounts.clock import now_s
from pomona.accounts.database import Database
from pomona.accounts.keys import NewKey, new_key, visible_prefix
from pomona.accounts.principal import NO_LIMITS, Limits, Principal, Role
from pomona.accounts.tables import BucketRow, KeyRow, LimitsRow, TenantRow
from pomona.core.errors import AccountConflictError, AccountNotFoundError, InvalidRequestError
from pomona.core.ids import TenantId
from pomona.core.request import Priority, ServiceLevel

_TENANT_ID: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_MAX_NAME_CHARS: Final = 100
_MAX_LIMIT: Final = 2**53
_MAX_EXPIRES_S: Final = 253_402_300_799.0
"""The last second of the year 9999: later is no date for most who read it."""
_NUM_SALT_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant as administrators see it."""

    id: str
    created_s: float
    is_disabled: bool
    service_level: ServiceLevel
    prefix_group: str | None


@dataclass(frozen=True, slots=True)
class Key:
    """A key as administrators see it."""

    id: str
    prefix: str
    tenant: str | None
    role: str | None
    name: str
    created_s: float
    expires_s: float | None
    revoked_s: float | None
    replaces: str | None


class TenantStore:
    """Tenants and keys.

    Args:
        database: migrated.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create_tenant(
        self, tenant_id: str, service_level: ServiceLevel | None = None, *, prefix_group: str | None = None
    ) -> Tenant:
        """Add a tenant.

        Raises:
            InvalidRequestError: the id is malformed.
            AccountConflictError: there is one of that id.
        """
        if not _TENANT_ID.fullmatch(tenant_id):
            raise InvalidRequestError.out_of_range(
                "id", tenant_id[:_MAX_NAME_CHARS], "1 to 63 lower-case letters, digits and inner dashes"
            )
        level = service_level or ServiceLevel()
        with self._database.session(is_change=True) as session:
            if session.get(TenantRow, tenant_id) is not None:
                raise AccountConflictError(f"There is a tenant {tenant_id!r} already.")
            row = TenantRow(
                id=tenant_id,
                created_s=now_s(),
                disabled_s=None,
                cache_secret=secrets.token_bytes(32),
                prefix_group=prefix_group,
                weight=level.weight,
                priority=level.priority.name.lower(),
                ttft_s=level.ttft_s,
                tpot_s=level.tpot_s,
            )
            session.add(row)
            return _tenant(row)

    def update_tenant(
        self,
        tenant_id: str,
        *,
        change_level: Callable[[ServiceLevel], ServiceLevel] | None = None,
        is_disabled: bool | None = None,
        prefix_group: str | None = None,
    ) -> Tenant:
        """Change what is given.

        Args:
            tenant_id: which.
            change_level: makes the new service level of the old one.
            is_disabled: none of its keys is accepted.
            prefix_group: whom it shares its prefix cache with; empty leaves the group.

        Raises:
            AccountNotFoundError: there is none of that id.
            InvalidRequestError: the service level is out of range.
        """
        with self._database.session(is_change=True) as session:
            row = _tenant_row(session, tenant_id)
            if change_level is not None:
                level = change_level(_service_level(row))
                row.weight, row.priority = level.weight, level.priority.name.lower()
                row.ttft_s, row.tpot_s = level.ttft_s, level.tpot_s
            if is_disabled is not None:
                row.disabled_s = now_s() if is_disabled else None
            if prefix_group is not None:
                row.prefix_group = prefix_group or None
            return _tenant(row)

    def tenants(self) -> list[Tenant]:
        """All of them, by id."""
        with self._database.session() as session:
            return [_tenant(row) for row in session.scalars(select(TenantRow).order_by(TenantRow.id))]

    def tenant(self, tenant_id: str) -> Tenant:
        """Look one up.

        Raises:
            AccountNotFoundError: there is none of that id.
        """
        with self._database.session() as session:
            return _tenant(_tenant_row(session, tenant_id))

    def create_key(
        self,
        tenant_id: str | None,
        *,
        role: Role | None = None,
        name: str = "",
        expires_s: float | None = None,
    ) -> tuple[Key, NewKey]:
        """Make a key of a tenant, or with a role an administrator's. Its text is returned here and never again.

        Raises:
            AccountNotFoundError: there is no such tenant.
            InvalidRequestError: the name is too long, or the key would have expired already, or that is no date.
        """
        assert (tenant_id is None) == (role is not None), "a key is a tenant's or an administrator's"
        if len(name) > _MAX_NAME_CHARS:
            raise InvalidRequestError.out_of_range("name", name[:20] + "...", f"at most {_MAX_NAME_CHARS} characters")
        if expires_s is not None and expires_s <= now_s():
            raise InvalidRequestError.out_of_range("expires_at", expires_s, "in the future")
        if expires_s is not None and expires_s > _MAX_EXPIRES_S:
            raise InvalidRequestError.out_of_range("expires_at", expires_s, f"at most {_MAX_EXPIRES_S:.0f}, year 9999")
        with self._database.session(is_change=True) as session:
            if tenant_id is not None:
                _tenant_row(session, tenant_id)
            new = new_key()
            row = KeyRow(
                id=new.key_id,
                tenant_id=tenant_id,
                role=None if role is None else role.value,
                name=name,
                digest=new.digest,
                created_s=now_s(),
                expires_s=expires_s,
                revoked_s=None,
                root_id=new.key_id,
                replaces=None,
            )
            session.add(row)
            return _key(row), new

    def rotate_key(self, key_id: str, overlap_s: float, tenant_id: str | None = None) -> tuple[Key, NewKey]:
        """Make a key that stands for the same; the old one is accepted for ``overlap_s`` more seconds.

        Limits of the key hold for both together.

        Args:
            key_id: of the old key.
            overlap_s: zero ends the old key at once.
            tenant_id: whose key it must be; None for any.

        Raises:
            AccountNotFoundError: there is no such key, or it is revoked or expired.
        """
        with self._database.session(is_change=True) as session:
            old = _key_row(session, key_id, tenant_id)
            now = now_s()
            if old.revoked_s is not None or (old.expires_s is not None and old.expires_s <= now):
                raise AccountNotFoundError(f"The key {visible_prefix(key_id)} is no longer valid.")
            # That of the newest, which no overlap has shortened: the old one may be rotated once more meanwhile.
            rotation = select(KeyRow.expires_s).where(KeyRow.root_id == old.root_id)
            expires_s = session.scalars(rotation.order_by(KeyRow.created_s.desc()).limit(1)).one()
            new = new_key()
            row = KeyRow(
                id=new.key_id,
                tenant_id=old.tenant_id,
                role=old.role,
                name=old.name,
                digest=new.digest,
                created_s=now,
                expires_s=expires_s,
                revoked_s=None,
                root_id=old.root_id,
                replaces=old.id,
            )
            session.add(row)
            end_s = now + max(0.0, overlap_s)
            old.expires_s = end_s if old.expires_s is None else min(end_s, old.expires_s)
            return _key(row), new

    def revoke_key(self, key_id: str, tenant_id: str | None = None) -> Key:
        """End a key now. Revoking twice changes nothing.

        Raises:
            AccountNotFoundError: there is no such key.
        """
        with self._database.session(is_change=True) as session:
            row = _key_row(session, key_id, tenant_id)
            if row.revoked_s is None:
                row.revoked_s = now_s()
            return _key(row)

    def keys(self, tenant_id: str | None = None) -> list[Key]:
        """All keys, or a tenant's; the oldest first."""
        query = select(KeyRow).order_by(KeyRow.created_s, KeyRow.id)
        if tenant_id is not None:
            query = query.where(KeyRow.tenant_id == tenant_id)
        with self._database.session() as session:
            return [_key(row) for row in session.scalars(query)]

    def set_limits(self, scope: str, scope_id: str, limits: Limits) -> Limits:
        """Replace all limits of a tenant, a key or an adapter.

        Raises:
            AccountNotFoundError: there is no such tenant or key.
            InvalidRequestError: a limit is out of range.
        """
        for field in fields(limits):
            value = getattr(limits, field.name)
            if value is not None and not 0 <= value <= _MAX_LIMIT:
                raise InvalidRequestError.out_of_range(field.name, value, f"between 0 and {_MAX_LIMIT}, or null")
        with self._database.session(is_change=True) as session:
            scope_id = _limited_id(session, scope, scope_id)
            row = session.get(LimitsRow, (scope, scope_id))
            _forget_buckets(session, scope, scope_id, _limits(row), limits)
            if row is not None:
                session.delete(row)
                session.flush()
            if not limits.is_empty:
                session.add(LimitsRow(scope=scope, scope_id=scope_id, **asdict(limits)))
        return limits

    def limits(self, scope: str, scope_id: str) -> Limits:
        """Limits of a tenant, a key or an adapter.

        Raises:
            AccountNotFoundError: there is no such tenant or key.
        """
        with self._database.session() as session:
            scope_id = _limited_id(session, scope, scope_id)
            return _limits(session.get(LimitsRow, (scope, scope_id)))

    def adapter_limits(self) -> dict[str, Limits]:
        """Limits of all adapters that have some, by qualified name."""
        with self._database.session() as session:
            rows = session.scalars(select(LimitsRow).where(LimitsRow.scope == "adapter"))
            return {row.scope_id: _limits(row) for row in rows}

    def find_principal(self, key_id: str) -> Principal | None:
        """Return what a key stands for; None if it is unknown, revoked or expired, or its tenant is disabled."""
        with self._database.session() as session:
            row = session.get(KeyRow, key_id)
            if row is None or row.revoked_s is not None or (row.expires_s is not None and row.expires_s <= now_s()):
                return None
            if row.tenant_id is None:
                assert row.role is not None
                return Principal(row.id, row.root_id, None, Role(row.role), row.digest, row.expires_s)
            tenant = _tenant_row(session, row.tenant_id)
            if tenant.disabled_s is not None:
                return None
            return Principal(
                key_id=row.id,
                root_id=row.root_id,
                tenant_id=TenantId(tenant.id),
                role=None,
                digest=row.digest,
                expires_s=row.expires_s,
                cache_salt=_salt(session, tenant),
                service_level=_service_level(tenant),
                tenant_limits=_limits(session.get(LimitsRow, ("tenant", tenant.id))),
                key_limits=_limits(session.get(LimitsRow, ("key", row.root_id))),
            )

    def has_admin(self) -> bool:
        """True if some administrator's key is valid."""
        now = now_s()
        with self._database.session() as session:
            rows: Sequence[KeyRow] = session.scalars(
                select(KeyRow).where(KeyRow.role == Role.ADMIN.value, KeyRow.revoked_s.is_(None))
            ).all()
        return any(row.expires_s is None or row.expires_s > now for row in rows)


def _salt(session: Session, tenant: TenantRow) -> bytes:
    """The tenant's own salt, or its group's: made of the secret of the group's oldest member."""
    secret, label = tenant.cache_secret, b"tenant\0" + tenant.id.encode()
    if tenant.prefix_group is not None:
        members = select(TenantRow).where(TenantRow.prefix_group == tenant.prefix_group)
        first = session.scalars(members.order_by(TenantRow.created_s, TenantRow.id).limit(1)).one()
        secret, label = first.cache_secret, b"group\0" + tenant.prefix_group.encode()
    return hmac.new(secret, b"prefix-cache\0" + label, hashlib.sha256).digest()[:_NUM_SALT_BYTES]


def _tenant_row(session: Session, tenant_id: str) -> TenantRow:
    row = session.get(TenantRow, tenant_id)
    if row is None:
        raise AccountNotFoundError(f"There is no tenant {tenant_id[:_MAX_NAME_CHARS]!r}.")
    return row


def _key_row(session: Session, key_id: str, tenant_id: str | None) -> KeyRow:
    key_id = key_id.removeprefix("pk-")[:_MAX_NAME_CHARS]
    row = session.get(KeyRow, key_id)
    if row is None or (tenant_id is not None and row.tenant_id != tenant_id):
        raise AccountNotFoundError(f"There is no key {visible_prefix(key_id)}.")
    return row


def _limited_id(session: Session, scope: str, scope_id: str) -> str:
    """Return under which id limits are kept: a key's under the first of its rotation."""
    if scope == "tenant":
        return _tenant_row(session, scope_id).id
    return _key_row(session, scope_id, None).root_id if scope == "key" else scope_id


def _forget_buckets(session: Session, scope: str, scope_id: str, old: Limits, new: Limits) -> None:
    """A bucket filled under a large limit would take hours to drain under a small one."""
    for noun, before, after in (
        ("requests", old.requests_per_minute, new.requests_per_minute),
        ("tokens", old.tokens_per_minute, new.tokens_per_minute),
    ):
        if before != after:
            session.execute(delete(BucketRow).where(BucketRow.name == bucket_name(scope, scope_id, noun)))


def _service_level(row: TenantRow) -> ServiceLevel:
    return ServiceLevel(Priority[row.priority.upper()], row.weight, row.ttft_s, row.tpot_s)


def _tenant(row: TenantRow) -> Tenant:
    return Tenant(row.id, row.created_s, row.disabled_s is not None, _service_level(row), row.prefix_group)


def _key(row: KeyRow) -> Key:
    return Key(
        row.id, visible_prefix(row.id), row.tenant_id, row.role, row.name, row.created_s, row.expires_s,
        row.revoked_s, row.replaces,
    )  # fmt: skip


def _limits(row: LimitsRow | None) -> Limits:
    if row is None:
        return NO_LIMITS
    return Limits(**{field.name: getattr(row, field.name) for field in fields(Limits)})
