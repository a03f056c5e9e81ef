"""Servers that share a database follow each other's changes of adapters."""

import contextlib
import functools
import shutil

import pytest

from pomona.accounts import accounts as accounts_module
from pomona.accounts.accounts import Accounts
from pomona.adapters.catalogue import Catalogue
from pomona.adapters.sources import AdapterSources
from pomona.cli.accounts import announce_adapters
from pomona.core.errors import AdapterFailedError
from pomona.server.adapter_service import AdapterService
from support.accounts import ServedAccounts, serve_accounts
from support.driver import make_adapter, until
from support.server import BASE


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


@contextlib.asynccontextmanager
async def another_server(served: ServedAccounts, sources: AdapterSources | None = None):
    """The adapters of a server that has just started."""
    service = AdapterService(served.served.client, sources or served.served.adapters.sources, Catalogue(BASE))
    announce_adapters(service, served.accounts.adapters)
    try:
        yield service
    finally:
        await service.close()


async def load(served, who, name, source, **fields):
    response = await served.call(who, "POST", "/v1/adapters", {"name": name, "source": str(source), **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def leased_id(service, name):
    async with service.lease(name) as lease:
        return lease.adapter_id


async def test_the_folder_that_a_source_meant_is_written_down(config, tmp_path):
    (tmp_path / "acme").mkdir()
    folder = make_adapter(tmp_path / "acme" / "one", "one")
    (tmp_path / "acme" / "link").symlink_to(folder)
    async with serve_accounts(tmp_path, config) as served:
        # A path below "~nobody" is one below the current folder, as long as nobody takes it for a home folder.
        tilde = "~nobody/" + "../" * 40 + folder.lstrip("/")
        for name, source in (("plain", folder), ("link", f"{tmp_path}/acme/link"), ("tilde", tilde)):
            loaded = await load(served, "acme", name, source)
            assert loaded["source"] == served.accounts.adapters[f"acme/{name}"].source == folder
        async with another_server(served) as service:
            for name in ("plain", "link", "tilde"):
                assert await leased_id(service, f"acme/{name}") == loaded["id"]


@pytest.mark.parametrize("has_link_in_between", [False, True])
async def test_a_folder_that_has_become_a_link_leads_nowhere_on_other_servers_either(
    config, tmp_path, has_link_in_between
):
    for tenant in ("acme", "bolt"):
        (tmp_path / tenant).mkdir()
    secret = make_adapter(tmp_path / "acme" / "secret", "secret")
    mine = tmp_path / "bolt" / "mine"
    source = make_adapter(mine, "mine")
    if has_link_in_between:
        source = tmp_path / "bolt" / "alias"
        source.symlink_to(mine)
    async with serve_accounts(tmp_path, config) as served:
        await load(served, "bolt", "mine", source)
        async with another_server(served) as early:
            shutil.rmtree(mine)
            mine.symlink_to(secret)
            refused = await served.call("bolt", "POST", "/v1/adapters", {"name": "again", "source": str(mine)})
            assert refused.status_code == 403
            async with another_server(served) as late:
                for service in (early, late):
                    with pytest.raises(AdapterFailedError, match="outside the allowed adapter folders"):
                        await leased_id(service, "bolt/mine")


async def test_what_an_operator_no_longer_allows_is_not_served_for_having_been_loaded_once(config, tmp_path):
    source = make_adapter(tmp_path / "common", "common")
    async with serve_accounts(tmp_path, config) as served:
        loaded = await load(served, "admin", "x", source, tenant="acme")
        await served.accounts.change(served.accounts.shares.put, "acme", "hub", "org/name")
        async with another_server(served) as service:
            assert await leased_id(service, "acme/x") == loaded["id"]
            with pytest.raises(AdapterFailedError, match="outside the allowed adapter folders"):
                await leased_id(service, "acme/hub")
        async with another_server(served, AdapterSources((str(tmp_path / "other"),))) as service:
            with pytest.raises(AdapterFailedError, match="outside the allowed adapter folders"):
                await leased_id(service, "acme/x")


async def test_an_adapter_that_cannot_be_announced_holds_up_no_other(config, tmp_path, monkeypatch, caplog):
    async with serve_accounts(tmp_path, config) as served:
        for name in ("first", "second"):
            await served.accounts.change(served.accounts.shares.put, "acme", name, make_adapter(tmp_path / name))
        service = served.served.adapters
        announce = service.announce

        def fail_first(stored, sources=None):
            if stored[0].name == "acme/first":
                raise RuntimeError("a bug")
            announce(stored, sources)

        monkeypatch.setattr(service, "announce", fail_first)
        announce_adapters(service, served.accounts.adapters)
        assert [entry.name for entry in service.entries] == ["acme/second"]
        assert "acme/first is not served" in caplog.text


async def test_changes_are_followed_and_made_whatever_goes_wrong_with_them(config, monkeypatch, caplog):
    monkeypatch.setattr(accounts_module, "_MAINTENANCE_S", 0.01)
    async with Accounts(config) as here, Accounts(config) as there:

        def fail_later(adapters):
            if adapters:
                raise RuntimeError("a bug of the listener")

        for accounts in (here, there):
            accounts.on_adapters(fail_later)
        read = here.shares.adapters
        failures = [RuntimeError("a bug of the store")]
        monkeypatch.setattr(
            here.shares, "adapters", lambda: (_ for _ in ()).throw(failures.pop()) if failures else read()
        )
        await there.change(there.tenants.create_tenant, "acme")
        await there.change(there.shares.put, "acme", "legal", "/adapters/legal")
        await until(lambda: "acme/legal" in here.adapters, "the adapter is known")
        await there.change(there.shares.remove, "acme", "legal")
        await until(lambda: not here.adapters, "the adapter is forgotten")
        for failure in ("a bug of the listener", "a bug of the store"):
            assert failure in caplog.text
