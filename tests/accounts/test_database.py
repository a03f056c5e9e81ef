"""Migrations and transactions, on both databases."""

import asyncio
import os
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from pomona.accounts import accounts as accounts_module
from pomona.accounts import clock
from pomona.accounts import database as database_module
from pomona.accounts import ledger as ledger_module
from pomona.accounts.accounts import Accounts, Booking
from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from pomona.accounts.limiter import Scope
from pomona.accounts.principal import Limits, Principal
from pomona.accounts.tables import SpendingRow, Table, UsageRow
from pomona.accounts.usage import UsageFilter, UsageStore
from pomona.core.errors import AccountConflictError, ConfigError, DatabaseUnavailableError
from pomona.core.ids import TenantId
from support.driver import until


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request):
    """Empty databases: migrations are what is tested here."""
    return None if request.param == "sqlite" else request.getfixturevalue("postgres").create_database()


def test_migrations_make_exactly_the_tables_of_the_models(database):
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_migrating_twice_changes_nothing(database):
    revision = database.revision()
    database.migrate()
    assert database.revision() == revision


def test_the_months_sums_of_adapters_are_made_of_the_ledger(database):
    month = clock.month_of(clock.now_s())
    with database.write() as connection:
        rows = [usage_row(index, ended_s) for index, ended_s in enumerate((1000.0, clock.now_s(), clock.now_s()))]
        connection.execute(sqlalchemy.insert(UsageRow), rows)
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = '0002'"))
    database.migrate()
    with database.read() as connection:
        found = connection.execute(sqlalchemy.select(SpendingRow.__table__)).one()
    assert tuple(found) == ("adapter", "acme/legal", month, 2, 30, 14)


def usage_row(index, ended_s):
    row = dict.fromkeys(("tenant_id", "key_id", "adapter_id", "outcome", "day"), "")
    row |= dict.fromkeys(("cached_tokens", "engine_s", "started_s"), 0)
    row |= {"request_id": str(index), "adapter": "acme/legal", "input_tokens": 10, "output_tokens": 5}
    return row | {"cost_nanos": 7, "ended_s": ended_s}


def test_processes_that_start_together_on_an_empty_database_all_find_it_migrated(config):
    databases = [Database(config.url) for _ in range(4)]
    with ThreadPoolExecutor(len(databases)) as threads:
        for done in [threads.submit(database.migrate) for database in databases]:
            done.result()
    for database in databases:
        assert database.revision() == 0
        database.close()


def test_a_process_that_starts_waits_for_another_that_migrates_for_long(postgres, monkeypatch):
    monkeypatch.setattr(database_module, "_POSTGRESQL_WAIT_S", 1)
    url = AccountsConfig(Path(), postgres.create_database()).url
    first, second = Database(url), Database(url)
    with ThreadPoolExecutor(1) as threads, first.write() as connection:
        lock = {"lock": database_module._MIGRATION_LOCK}
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:lock)"), lock)
        waiting = threads.submit(second.migrate)
        time.sleep(2)
        connection.commit()
        waiting.result()
    first.close()
    second.close()


def test_a_report_that_takes_too_long_does_not_mean_that_the_database_is_down(postgres, monkeypatch):
    monkeypatch.setattr(database_module, "_POSTGRESQL_WAIT_S", 1)
    database = Database(AccountsConfig(Path(), postgres.create_database()).url)
    database.migrate()
    usage = UsageStore(database)
    with database.write() as connection:
        connection.execute(sqlalchemy.text("LOCK TABLE usage IN ACCESS EXCLUSIVE MODE"))
        for report in (lambda: usage.sums(UsageFilter(), []), lambda: list(usage.rows(UsageFilter()))):
            with pytest.raises(DatabaseUnavailableError, match="timeout"):
                report()
            assert database.down_since_s is None
    database.close()


def test_on_sqlite_too_a_start_waits_for_another_that_migrates_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(database_module, "_SQLITE_WAIT_S", 0.2)
    first, second = Database(AccountsConfig(tmp_path).url), Database(AccountsConfig(tmp_path).url)
    with ThreadPoolExecutor(1) as threads:
        with first.write():
            waiting = threads.submit(second.migrate)
            time.sleep(1)
        waiting.result()
        with first.write(), pytest.raises(DatabaseUnavailableError, match="locked"), second.write():
            pass
    first.close()
    second.close()


def test_a_new_file_that_another_process_is_writing_into_is_waited_for(tmp_path):
    config = AccountsConfig(data_dir=tmp_path)
    other = sqlite3.connect(tmp_path / "accounts.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # still without a write-ahead log
    commit = threading.Timer(0.1, other.execute, ["COMMIT"])
    commit.start()
    database = Database(config.url)
    database.migrate()
    assert database.revision() == 0
    commit.join()
    database.close()
    other.close()


def test_a_new_file_is_its_owners_alone(tmp_path):
    """In a folder that was there before, and that others may read."""
    database = Database(f"sqlite:///{tmp_path / 'new.db'}")
    database.migrate()
    with database.write() as connection:
        connection.execute(sqlalchemy.text("INSERT INTO buckets (name, level, at_s) VALUES ('b', 1.0, 1.0)"))
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("new.db*")}
    database.close()
    assert modes == {"new.db": 0o600, "new.db-shm": 0o600, "new.db-wal": 0o600}


def test_a_block_that_raises_leaves_nothing_behind(database):
    def fail():
        with database.session(is_change=True) as session:
            session.execute(sqlalchemy.text("INSERT INTO buckets VALUES ('x', 1, 1)"))
            raise AccountConflictError("no")

    with pytest.raises(AccountConflictError):
        fail()
    with database.read() as connection:
        assert connection.execute(sqlalchemy.text("SELECT COUNT(*) FROM buckets")).scalar() == 0
    assert database.revision() == 0


def test_a_database_that_is_not_there_is_named_without_its_password(tmp_path):
    config = AccountsConfig(data_dir=tmp_path, database_url="postgresql://ann:hunter2@127.0.0.1:9/db")
    database = Database(config.url)
    with pytest.raises(DatabaseUnavailableError) as caught:
        database.migrate()
    assert "hunter2" not in str(caught.value)
    assert database.down_since_s is not None
    database.close()


def test_a_url_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="database_url"):
        AccountsConfig(data_dir=tmp_path, database_url="mysql://localhost/db")


def test_a_connection_that_nothing_arrives_from_is_given_up_by_the_kernel(postgres):
    database = Database(AccountsConfig(Path(), postgres.create_database()).url)
    with database.read() as connection, socket.socket(fileno=os.dup(connection.connection.fileno())) as end:
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 3
    database.close()


async def test_accounts_go_on_after_tables_were_gone_for_a_while(config, monkeypatch):
    monkeypatch.setattr(accounts_module, "_MAINTENANCE_S", 0.05)
    monkeypatch.setattr(ledger_module, "_RETRY_S", 0.05)
    names = ("buckets", "prices", "revision", "slots", "spending", "usage")
    other = Database(config.url)

    def rename(old, new):
        with other.write() as connection:
            for name in names:
                connection.execute(sqlalchemy.text(f"ALTER TABLE {old}{name} RENAME TO {new}{name}"))

    async with Accounts(config) as accounts:
        limits = [Scope("tenant", "acme", Limits(requests_per_minute=100))]
        key = Principal("k1", "k1", TenantId("acme"), None, b"", None)
        await asyncio.to_thread(rename, "", "old_")
        await accounts.limiter.admit(limits, 1)
        accounts.begin(key, Booking("r1", "base", "", (10,))).close("finish", 1.0)
        await asyncio.sleep(1.0)
        await asyncio.to_thread(rename, "old_", "")
        with other.session(is_change=True):
            pass
        known = accounts.authenticator._generation
        await until(lambda: accounts.authenticator._generation > known, "the change is heard of")
        await until(lambda: accounts.ledger.totals()["rows"] == 1, "the row arrives")
        maintained = asyncio.Event()
        monkeypatch.setattr(accounts.limiter, "maintain", lambda **_: asyncio.sleep(0, maintained.set()))
        async with asyncio.timeout(5):
            await maintained.wait()
    other.close()
