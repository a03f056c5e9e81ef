"""What is written down of tenants' adapters is what is served, whatever fails and whoever comes at once."""

import asyncio
from pathlib import Path

import pytest

from pomona.core.errors import DatabaseUnavailableError
from support.accounts import serve_accounts
from support.driver import make_adapter, until


@pytest.fixture
def database_url():
    """What is tested here does not depend on the database: SQLite will do."""


@pytest.fixture
async def served(config, tmp_path):
    (tmp_path / "acme").mkdir()
    async with serve_accounts(tmp_path, config) as running:
        yield running


async def load(served, content):
    source = make_adapter(served.served.folder / "acme" / content, content)
    return await served.call("acme", "POST", "/v1/adapters", {"name": "legal", "source": source})


async def names(served, who):
    return [card["name"] for card in (await served.call(who, "GET", "/v1/adapters")).json()["data"]]


async def test_an_adapter_that_cannot_be_written_down_changes_nothing(served, monkeypatch):
    def fail(*_):
        raise DatabaseUnavailableError("down")

    with monkeypatch.context() as patch:
        patch.setattr(served.accounts.shares, "put", fail)
        assert (await load(served, "one")).status_code == 503
        assert await names(served, "admin") == []
        await until(lambda: not served.served.adapters.host.cache.ids, "its memory is free")
    assert (await load(served, "one")).status_code == 200
    before = await served.complete("acme", model="legal")
    with monkeypatch.context() as patch:
        patch.setattr(served.accounts.shares, "put", fail)
        assert (await load(served, "two")).status_code == 503
    after = await served.complete("acme", model="legal")
    assert after.json()["choices"] == before.json()["choices"]
    assert len(served.served.adapters.host.cache.ids) == 1


async def test_an_adapter_that_cannot_be_struck_out_stays(served, monkeypatch):
    def fail(*_):
        raise DatabaseUnavailableError("down")

    assert (await load(served, "one")).status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(served.accounts.shares, "remove", fail)
        assert (await served.call("acme", "DELETE", "/v1/adapters/legal")).status_code == 503
    assert (await served.complete("acme", model="legal")).status_code == 200


async def test_an_adapter_deleted_while_it_is_replaced_is_gone_for_good(served):
    assert (await load(served, "one")).status_code == 200
    slow = Path(make_adapter(served.served.folder / "acme" / "two", "two"))
    (slow / "seconds").write_text("0.3")
    replacing = asyncio.create_task(served.call("acme", "POST", "/v1/adapters", {"name": "legal", "source": str(slow)}))
    await until(lambda: served.served.adapters.record("acme/legal").step is not None, "the replacement has begun")
    assert (await served.call("acme", "DELETE", "/v1/adapters/legal")).status_code == 200
    assert (await replacing).status_code == 200
    assert await names(served, "admin") == []
    assert not served.accounts.shares.adapters()
