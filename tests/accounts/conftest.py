"""Every test of accounts runs on SQLite and on PostgreSQL."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest

from pomona.accounts.config import AccountsConfig
from pomona.accounts.database import Database
from support.accounts import ServedAccounts, serve_accounts
from support.databases import PostgresServer, postgres_server
from support.server import listen


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="session")
def migrated(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a database that has all tables, and nothing in them."""
    url = postgres.create_database()
    database = Database(AccountsConfig(data_dir=tmp_path_factory.mktemp("migrated"), database_url=url).url)
    database.migrate()
    database.close()
    return url.rpartition("/")[2]


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str | None:
    """None is the SQLite file in the data folder. The other has its tables already, which saves a tenth of a second."""
    if request.param == "sqlite":
        return None
    return request.getfixturevalue("postgres").create_database(request.getfixturevalue("migrated"))


@pytest.fixture
def config(database_url: str | None, tmp_path: Path) -> AccountsConfig:
    return AccountsConfig(data_dir=tmp_path, database_url=database_url, revision_poll_s=0.05)


@pytest.fixture
def database(config: AccountsConfig) -> Iterator[Database]:
    database = Database(config.url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
async def served(config: AccountsConfig, tmp_path: Path) -> AsyncIterator[ServedAccounts]:
    async with serve_accounts(tmp_path, config) as running:
        yield running


@pytest.fixture
async def clients(served: ServedAccounts) -> AsyncIterator[dict[str, openai.AsyncOpenAI]]:
    """OpenAI clients of both tenants."""
    async with listen(served.served.app) as url:
        found = {
            who: openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=served.keys[who], max_retries=0)
            for who in ("acme", "bolt")
        }
        yield found
        for client in found.values():
            await client.close()
