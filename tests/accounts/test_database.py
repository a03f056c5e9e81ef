"""Migrations and transactions, on both databases."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from pomona.accounts.tables import Table
from pomona.core.errors import AccountConflictError, ConfigError, DatabaseUnavailableError


def test_migrations_make_exactly_the_tables_of_the_models(database):
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_migrating_twice_changes_nothing(database):
    revision = database.revision()
    database.migrate()
    assert database.revision() == revision


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
