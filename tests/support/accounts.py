"""A server with accounts and everybody's keys at hand."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from pomona.accounts.accounts import Accounts
from pomona.accounts.config import AccountsConfig
from pomona.accounts.principal import Role
from pomona.server.config import ServerConfig
from support.server import BASE, Served, serve


@dataclass
class ServedAccounts:
    """A server with two tenants, acme and bolt, and an administrator of each role."""

    served: Served
    accounts: Accounts
    keys: dict[str, str]
    """Tenant or role -> key."""

    async def call(self, who: str | None, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """One request with somebody's key, or with none."""
        headers = {} if who is None else {"authorization": f"Bearer {self.keys[who]}"}
        return await self.served.http.request(method, path, json=body, headers=headers, **options)

    async def complete(self, who: str | None, prompt: str = "one two three", **parameters: Any) -> httpx.Response:
        """POST /v1/completions with somebody's key."""
        body = {"model": BASE, "prompt": prompt, "max_tokens": 8, "temperature": 0, **parameters}
        return await self.call(who, "POST", "/v1/completions", body)

    async def usage(self, **which: Any) -> list[dict[str, Any]]:
        """All rows of the ledger, everything that has ended included."""
        await self.accounts.ledger.flush()
        from pomona.accounts.usage import UsageFilter

        return [row for page in self.accounts.usage.rows(UsageFilter(**which)) for row in page]


@contextlib.asynccontextmanager
async def serve_accounts(
    folder: Path, config: AccountsConfig, server_config: ServerConfig | None = None, **limits: Any
) -> AsyncIterator[ServedAccounts]:
    """Run it until the block ends."""
    async with Accounts(config) as accounts:
        keys = {}
        for tenant in ("acme", "bolt"):
            await accounts.change(accounts.tenants.create_tenant, tenant)
            keys[tenant] = (await accounts.change(accounts.tenants.create_key, tenant))[1].text
        for role in Role:
            keys[role.value] = (await accounts.change(accounts.tenants.create_key, None, role=role))[1].text
        async with serve(folder, server_config, accounts=accounts, **limits) as served:
            yield ServedAccounts(served, accounts, keys)
