"""Migrations and transactions, on both databases."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from pomona.accounts import clock
from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from pomona.accounts.tables import SpendingRow, Table, UsageRow
from pomona.core.errors import AccountConflictError, ConfigError, DatabaseUnavailableError


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
