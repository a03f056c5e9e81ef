"""Accounts for ``pomona serve``: opened if the settings want them, with names for the tenants' adapters."""

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from pomona.accounts.accounts import Accounts
from pomona.accounts.config import AccountsConfig
from pomona.accounts.shares import OwnedAdapter
from pomona.adapters.sources import AdapterSources
from pomona.adapters.stores import StoredAdapter
from pomona.cli.config import AppConfig
from pomona.core.errors import ConfigError
from pomona.server.adapter_service import AdapterService

_LOGGER = logging.getLogger(__name__)


def accounts_config(config: AppConfig) -> AccountsConfig:
    """Return the accounts' own part of the settings."""
    return AccountsConfig(
        data_dir=Path(config.data_dir).expanduser(),
        database_url=None if config.database_url is None else config.database_url.get_secret_value(),
        when_database_is_down=config.when_database_is_down,
    )


def check_settings(config: AppConfig) -> None:
    """Refuse settings that contradict each other, or that the accounts cannot be opened with.

    Raises:
        ConfigError: they do.
    """
    if config.accounts and config.api_key is not None:
        raise ConfigError("api_key and accounts: with accounts every key is a tenant's or an administrator's")
    if config.accounts:
        accounts_config(config).make_data_dir()


def announce_adapters(service: AdapterService, adapters: Mapping[str, OwnedAdapter]) -> None:
    """Let requests use the adapters that belong to tenants, whichever server they were loaded through. Names that this
    server has already stay what they are; one that cannot be announced is left out, with a line in the log."""
    known = {entry.name for entry in service.entries}
    for name in sorted(adapters.keys() - known):
        adapter = adapters[name]
        try:
            sources = _sources_of(adapter, service.sources)
            service.announce((StoredAdapter(adapter.qualified_name, adapter.source),), sources)
        except Exception:  # what a tenant wrote must stop nobody else's adapters
            _LOGGER.exception("Adapter %s is not served", name)


def _sources_of(adapter: OwnedAdapter, sources: AdapterSources) -> AdapterSources:
    """What may be at an adapter's source: what its owner may load, or if an administrator loaded it from elsewhere,
    what administrators may. Whatever has become of the folder since, a link leads no further than at a load."""
    own = sources.below(adapter.owner)
    return sources if sources.has(adapter.source) and not own.has(adapter.source) else own


@contextlib.asynccontextmanager
async def open_accounts(config: AppConfig, service: AdapterService) -> AsyncIterator[Accounts | None]:
    """Open the accounts for the length of the block, and load what belongs to tenants; None if they are off.

    Raises:
        ConfigError: the settings contradict each other.
        DatabaseUnavailableError: the database does not answer.
    """
    if not config.accounts:
        yield None
        return
    check_settings(config)
    if any("/" in entry.name for entry in service.entries):
        raise ConfigError(
            "accounts: names of the operator's adapters must not have slashes, which part tenant and name"
        )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    async with Accounts(accounts_config(config)) as accounts:
        accounts.on_adapters(functools.partial(announce_adapters, service))
        if not await accounts.database.run(accounts.tenants.has_admin):
            _LOGGER.warning(
                "There is no administrator's key yet. Make one: pomona keys admin --data-dir %s", config.data_dir
            )
        yield accounts
