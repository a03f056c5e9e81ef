"""Where the server's adapters are, from the settings: folders and URLs, and memory and disk for what they hold."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pomona.adapters.catalogue import Catalogue
from pomona.adapters.disk_cache import DiskCache
from pomona.adapters.remote import RemoteFolders, is_url
from pomona.adapters.sources import AdapterSources
from pomona.adapters.stores import AdapterStore, FolderStore, RemoteStore
from pomona.cli.build import AdapterSource, adapters_dirs, named_adapters, sources_of_operator
from pomona.cli.config import AppConfig
from pomona.core.errors import AdapterUnavailableError, ConfigError, PomonaError
from pomona.core.interfaces import EngineClient
from pomona.core.machine import host_bytes
from pomona.server.adapter_loading import ResidencyLimits
from pomona.server.adapter_service import AdapterService

_LOGGER = logging.getLogger(__name__)
_DEFAULT_HOST_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class AdapterPlaces:
    """Where adapters may be."""

    sources: AdapterSources
    stores: tuple[AdapterStore, ...]


@contextlib.contextmanager
def open_places(config: AppConfig) -> Iterator[AdapterPlaces]:
    """Open the cache on disk, if the settings name one, for the length of the block.

    Raises:
        ConfigError: the settings contradict each other, or the cache cannot be used.
    """
    dirs = adapters_dirs(config)
    roots = tuple(dict.fromkeys((*dirs, *config.allowed_adapter_root)))
    if any(is_url(root) for root in roots) and config.adapter_cache_dir is None:
        raise ConfigError("adapters from URLs need adapter_cache_dir: a folder where they are kept")
    cache = None
    if config.adapter_cache_dir is not None:
        cache = DiskCache(Path(config.adapter_cache_dir).expanduser(), int(config.adapter_cache_bytes))
    remote = None if cache is None else RemoteFolders(cache)
    sources = AdapterSources(
        tuple(root if is_url(root) else str(Path(root).expanduser()) for root in roots),
        allow_hub=config.allow_hub_adapters,
        remote=remote,
    )
    stores: list[AdapterStore] = []
    for directory in dirs:
        if is_url(directory):
            assert remote is not None
            stores.append(RemoteStore(directory, remote))
        else:
            stores.append(FolderStore(Path(directory).expanduser()))
    try:
        yield AdapterPlaces(sources, tuple(stores))
    finally:
        if cache is not None:
            cache.close()


def check_adapters(config: AppConfig, places: AdapterPlaces, base_name: str) -> None:
    """Refuse adapters that cannot be there, before minutes of loading the base model: what they are is seen later.

    Raises:
        ConfigError: as ``give_names``.
    """
    names = Catalogue(base_name)
    for adapter in named_adapters(config):
        with _named(adapter):
            names.validate_name(adapter.name)
            if not is_url(adapter.source):
                sources_of_operator(adapter.source).resolve(adapter.source)
    for store in places.stores:
        if isinstance(store, FolderStore):
            store.list()


def make_service(config: AppConfig, client: EngineClient, places: AdapterPlaces, base_name: str) -> AdapterService:
    """The server's adapters; none has a name yet."""
    limits = ResidencyLimits(
        host_adapter_bytes=int(config.host_adapter_bytes or _DEFAULT_HOST_SHARE * host_bytes()),
        load_wait_s=config.adapter_load_wait_s,
    )
    return AdapterService(client, places.sources, Catalogue(base_name), places.stores, limits)


async def give_names(config: AppConfig, service: AdapterService, places: AdapterPlaces) -> None:
    """Load the adapters that the settings name one by one, and let requests use what the stores have.

    Raises:
        ConfigError: an adapter that was named cannot be used, a store is not there, or a name is given twice.
    """
    seen: dict[str, str] = {}
    for adapter in named_adapters(config):
        sources = places.sources if is_url(adapter.source) else sources_of_operator(adapter.source)
        with _named(adapter):
            await service.load(adapter.name, adapter.source, sources)
        seen[adapter.name] = adapter.source
    for store in places.stores:
        try:
            stored = store.list()
        except AdapterUnavailableError as error:
            _LOGGER.warning("Its adapters are looked for when they are asked for: %s", error)
            continue
        for line in stored:
            if line.name in seen:
                raise ConfigError(f"adapter {line.name!r} is given twice: {seen[line.name]} and {line.source}")
            seen[line.name] = line.source
        service.announce(stored)


@contextlib.contextmanager
def _named(adapter: AdapterSource) -> Iterator[None]:
    """Say of what goes wrong with which adapter it does."""
    try:
        yield
    except PomonaError as error:
        raise ConfigError(f"adapter {adapter.name!r} from {adapter.source!r}: {error}") from error
