"""Adapters that belong to tenants, and with whom they are shared. Blocking: the server calls it through a thread."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import delete, select

from pomona.accounts.clock import now_s
from pomona.accounts.database import Database
from pomona.accounts.tables import AdapterRow, ShareRow, TenantRow
from pomona.core.errors import AccountNotFoundError


@dataclass(frozen=True, slots=True)
class OwnedAdapter:
    """An adapter of a tenant."""

    owner: str
    name: str
    source: str
    is_public: bool
    """Every tenant may use it."""
    shared_with: frozenset[str]
    """These tenants may use it."""

    @property
    def qualified_name(self) -> str:
        """Its name among all tenants' adapters."""
        return f"{self.owner}/{self.name}"

    def is_visible_to(self, tenant_id: str) -> bool:
        """True if a tenant may use it."""
        return self.is_public or tenant_id == self.owner or tenant_id in self.shared_with


class ShareStore:
    """Ownership of adapters in the database.

    Args:
        database: migrated.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def adapters(self) -> Mapping[str, OwnedAdapter]:
        """All adapters that belong to tenants, by qualified name."""
        with self._database.session() as session:
            shares: dict[tuple[str, str], set[str]] = {}
            for share in session.scalars(select(ShareRow)):
                shares.setdefault((share.owner_id, share.name), set()).add(share.tenant_id)
            found = [
                OwnedAdapter(
                    row.tenant_id,
                    row.name,
                    row.source,
                    row.is_public,
                    frozenset(shares.get((row.tenant_id, row.name), ())),
                )
                for row in session.scalars(select(AdapterRow).order_by(AdapterRow.tenant_id, AdapterRow.name))
            ]
        return {adapter.qualified_name: adapter for adapter in found}

    def put(self, owner: str, name: str, source: str) -> None:
        """Write down that an adapter belongs to a tenant; its shares stay if it was there before.

        Raises:
            AccountNotFoundError: there is no such tenant.
        """
        with self._database.session(is_change=True) as session:
            if session.get(TenantRow, owner) is None:
                raise AccountNotFoundError(f"There is no tenant {owner!r}.")
            row = session.get(AdapterRow, (owner, name))
            if row is None:
                session.add(AdapterRow(tenant_id=owner, name=name, source=source, is_public=False, created_s=now_s()))
            else:
                row.source = source

    def remove(self, owner: str, name: str) -> None:
        """Forget an adapter and its shares."""
        with self._database.session(is_change=True) as session:
            session.execute(delete(ShareRow).where(ShareRow.owner_id == owner, ShareRow.name == name))
            session.execute(delete(AdapterRow).where(AdapterRow.tenant_id == owner, AdapterRow.name == name))

    def share(
        self, owner: str, name: str, tenants: frozenset[str], *, is_public: bool, ignores_unknown: bool = False
    ) -> None:
        """Replace whom an adapter is shared with.

        Args:
            owner: of the adapter.
            name: of the adapter.
            tenants: who may use it.
            is_public: all may.
            ignores_unknown: leave out tenants that there are not, for callers who must not learn of others.

        Raises:
            AccountNotFoundError: there is no such adapter, or no such tenant.
        """
        with self._database.session(is_change=True) as session:
            row = session.get(AdapterRow, (owner, name))
            if row is None:
                raise AccountNotFoundError(f"The tenant {owner!r} has no adapter {name[:200]!r}.")
            row.is_public = is_public
            session.execute(delete(ShareRow).where(ShareRow.owner_id == owner, ShareRow.name == name))
            for tenant_id in sorted(tenants):
                if session.get(TenantRow, tenant_id) is None:
                    if ignores_unknown:
                        continue
                    raise AccountNotFoundError(f"There is no tenant {tenant_id[:200]!r}.")
                session.add(ShareRow(owner_id=owner, name=name, tenant_id=tenant_id))
