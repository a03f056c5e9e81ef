"""The accounts database goes away under a running server, and comes back."""

import asyncio
import time
from dataclasses import replace

import pytest

from pomona.accounts.config import AccountsConfig
from support.accounts import serve_accounts
from support.databases import postgres_server
from support.driver import until


@pytest.fixture
def own_postgres():
    with postgres_server() as server:
        yield server


async def requests_during_outage(served, postgres, outage_s):
    """Ask all the time: before, while the database is down, and after. Returns the statuses seen while it was down."""
    statuses = []
    await served.complete("acme")
    await asyncio.to_thread(postgres.stop)
    end_s = time.monotonic() + outage_s
    while time.monotonic() < end_s:
        statuses.append((await served.complete("acme")).status_code)
        await asyncio.sleep(0.02)
    assert served.accounts.ledger.totals()["database_down_seconds"] > 0
    await asyncio.to_thread(postgres.start)
    await until(lambda: served.accounts.database.down_since_s is None, "the database is back")
    for who in ("acme", "bolt"):
        assert (await served.complete(who)).status_code == 200
    return statuses


@pytest.mark.parametrize("outage_s", [2.0, pytest.param(30.0, marks=pytest.mark.slow)])
async def test_answers_go_on_without_the_database_and_every_row_arrives(tmp_path, own_postgres, outage_s):
    config = AccountsConfig(data_dir=tmp_path, database_url=own_postgres.create_database(), revision_poll_s=0.1)
    async with serve_accounts(tmp_path, config) as served:
        await served.call("admin", "PUT", "/v1/admin/limits/tenant/acme", {"requests_per_minute": 100_000})
        statuses = await requests_during_outage(served, own_postgres, outage_s)
        assert set(statuses) == {200}
        rows = await served.usage()
        totals = served.accounts.ledger.totals()
    print(f"{len(statuses)} requests answered in {outage_s:g} s without the database; {len(rows)} rows")
    assert len(rows) == totals["rows"] == len(statuses) + 3
    assert (totals["waiting_rows"], totals["open_requests"]) == (0, 0)
    assert totals["failed_writes"] > 0
    assert len({row["request_id"] for row in rows}) == len(rows)


async def test_requests_are_refused_without_the_database_if_the_operator_says_so(tmp_path, own_postgres):
    config = AccountsConfig(data_dir=tmp_path, database_url=own_postgres.create_database(), revision_poll_s=0.1)
    async with serve_accounts(tmp_path, replace(config, when_database_is_down="refuse")) as served:
        statuses = await requests_during_outage(served, own_postgres, 2.0)
        assert set(statuses) <= {200, 503}
        assert statuses[-1] == 503
        assert len(await served.usage()) == statuses.count(200) + 3


async def test_an_unknown_key_gets_503_and_not_401_while_nobody_can_know(tmp_path, own_postgres):
    config = AccountsConfig(data_dir=tmp_path, database_url=own_postgres.create_database())
    async with serve_accounts(tmp_path, config) as served:
        await asyncio.to_thread(own_postgres.stop)
        response = await served.complete("bolt")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "accounts_unavailable"
        assert "postgres@" not in response.text
        await asyncio.to_thread(own_postgres.start)
        await until(lambda: served.accounts.database.down_since_s is None, "the database is back")
        assert (await served.complete("bolt")).status_code == 200
