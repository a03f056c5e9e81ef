"""Servers that share a database follow each other's changes of adapters."""

import functools

from pomona.accounts.accounts import Accounts
from pomona.cli.accounts import announce_adapters
from support.accounts import serve_accounts
from support.driver import make_adapter, until


async def test_who_may_use_an_adapter_is_soon_known_to_all_servers(config):
    async with Accounts(config) as here, Accounts(config) as there:
        for tenant in ("acme", "bolt"):
            await there.change(there.tenants.create_tenant, tenant)
        await there.change(there.shares.put, "acme", "legal", "/adapters/legal")
        await until(lambda: "acme/legal" in here.adapters, "the adapter is known")
        for tenants in (frozenset({"bolt"}), frozenset()):
            await there.change(there.shares.share, "acme", "legal", tenants, is_public=False)
            await until(
                lambda tenants=tenants: here.adapters["acme/legal"].shared_with == tenants, "the share has changed"
            )
        await there.change(there.shares.remove, "acme", "legal")
        await until(lambda: not here.adapters, "the adapter is forgotten")


async def test_an_adapter_loaded_through_one_server_is_served_by_all(config, tmp_path):
    async with serve_accounts(tmp_path, config) as served, Accounts(config) as elsewhere:
        served.accounts.on_adapters(functools.partial(announce_adapters, served.served.adapters))
        assert (await served.complete("acme", model="legal")).status_code == 404
        await elsewhere.change(elsewhere.shares.put, "acme", "legal", make_adapter(tmp_path / "legal"))
        await until(lambda: "acme/legal" in served.accounts.adapters, "the adapter is known")
        assert (await served.complete("acme", model="legal")).status_code == 200
        assert (await served.complete("bolt", model="acme/legal")).status_code == 404
