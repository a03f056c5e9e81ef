"""RemoteFolders: adapters in object stores and other places that fsspec reaches (s3://, gs://, memory://, ...), brought
to this machine's disk. Called from worker threads.
"""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec

from pomona.adapters.digest import DigestWriter
from pomona.adapters.disk_cache import DiskCache
from pomona.adapters.layout import CONFIG_FILE, MAX_WEIGHTS_BYTES, WEIGHTS_FILES
from pomona.adapters.peft_config import MAX_CONFIG_BYTES
from pomona.core.errors import AdapterError, AdapterNotFoundError, AdapterUnavailableError, ConfigError
from pomona.core.ids import AdapterId

_PIECE_BYTES = 2**20
_OPTIONS: dict[str, dict[str, Any]] = {
    # A store that does not answer must not hold a thread for minutes; retrying is the caller's affair.
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 20, "retries": {"max_attempts": 1}}}
}
_VERSIONS = ("ETag", "etag", "VersionId", "LastModified", "mtime")
"""What stores call that which changes with a file."""


def is_url(source: str) -> bool:
    """True for what fsspec is to read; a plain path is not."""
    return "://" in source


class RemoteFolders:
    """Fetches folders of adapters.

    Args:
        cache: keeps what was fetched; closed with this.
    """

    def __init__(self, cache: DiskCache) -> None:
        self.cache = cache
        self._lock = threading.Lock()
        self._systems: dict[str, Any] = {}

    def system(self, url: str) -> Any:
        """The fsspec file system of a URL, made once per protocol.

        Raises:
            ConfigError: what speaks this protocol is not installed.
        """
        protocol = url.partition("://")[0]
        with self._lock:
            if protocol not in self._systems:
                try:
                    options = {"skip_instance_cache": True, "use_listings_cache": False, **_OPTIONS.get(protocol, {})}
                    self._systems[protocol] = fsspec.filesystem(protocol, **options)
                except (ImportError, ValueError) as error:
                    raise ConfigError(f"{protocol}:// cannot be read: {error}") from error
            return self._systems[protocol]

    def fetch(self, url: str, expected_id: AdapterId | None) -> tuple[AdapterId, Path]:
        """Bring an adapter here, or find it here; its folder stays until ``cache.release``.

        Args:
            url: of the adapter's folder.
            expected_id: if it is here already, the store is not asked at all.

        Raises:
            AdapterNotFoundError: the store has nothing there.
            AdapterError: what it has there is no adapter.
            AdapterUnavailableError: the store or the disk fails, and nothing of before can be used.
        """
        if expected_id is not None and (path := self.cache.take(expected_id)) is not None:
            return expected_id, path
        known = self.cache.source(url)
        try:
            files = self._look(url)
        except AdapterUnavailableError:
            # What the store said last counts for as long as it says nothing.
            if known is not None and (path := self.cache.take(known.adapter_id)) is not None:
                return known.adapter_id, path
            raise
        if known is not None and known.tag == files.tag and (path := self.cache.take(known.adapter_id)) is not None:
            return known.adapter_id, path
        return self.cache.put(url, files.tag, files.num_bytes, lambda folder: self._download(files, folder))

    def _look(self, url: str) -> "_RemoteFiles":
        """What lies at a URL, without reading the weights."""
        folder = url.rstrip("/")
        config = self._stat(f"{folder}/{CONFIG_FILE}", MAX_CONFIG_BYTES)
        if config is None:
            # As of local folders: of one that is there, its name is known, and what is wrong with it may be told.
            kind = AdapterError if self._has(folder) else AdapterNotFoundError
            raise kind(f"no {CONFIG_FILE} at {url}: not a PEFT adapter folder")
        for name, weights_format in WEIGHTS_FILES:
            weights = self._stat(f"{folder}/{name}", MAX_WEIGHTS_BYTES)
            if weights is not None:
                return _RemoteFiles(folder, config, name, weights, weights_format)
        raise AdapterError(f"no weights at {url}: expected {' or '.join(name for name, _ in WEIGHTS_FILES)}")

    def _has(self, url: str) -> bool:
        """True if there is anything at a URL."""
        try:
            return bool(self.system(url).exists(url))
        except Exception as error:
            raise _unavailable(url, error) from error

    def _stat(self, url: str, max_bytes: int) -> tuple[int, str] | None:
        """Size and version of a file; None if there is none."""
        try:
            facts = self.system(url).info(url)
        except FileNotFoundError:
            return None
        except Exception as error:  # every file system has errors of its own
            raise _unavailable(url, error) from error
        size = facts["size"]
        if facts.get("type") != "file" or not isinstance(size, int):
            return None
        if size > max_bytes:
            raise AdapterError(f"{url} has {size} bytes; the limit is {max_bytes}")
        versions = [facts.get(key) for key in _VERSIONS]
        # A store with other words for it: anything that it says may be one of them.
        return size, "/".join(map(str, versions if any(versions) else sorted(facts.items())))

    def _download(self, files: "_RemoteFiles", folder: Path) -> AdapterId:
        config_bytes = b"".join(self._read(f"{files.url}/{CONFIG_FILE}", files.config[0]))
        (folder / CONFIG_FILE).write_bytes(config_bytes)
        digest = DigestWriter(files.weights_format, config_bytes, files.weights[0])
        with (folder / files.weights_name).open("wb") as file:
            for piece in self._read(f"{files.url}/{files.weights_name}", files.weights[0]):
                digest.write(piece)
                file.write(piece)
        return digest.adapter_id()

    def _read(self, url: str, num_bytes: int) -> Iterator[bytes]:
        """Yield a file's pieces; it must have exactly so many bytes."""
        num_read = 0
        try:
            with self.system(url).open(url, "rb", cache_type="none", block_size=_PIECE_BYTES) as file:
                while num_read <= num_bytes and (piece := file.read(_PIECE_BYTES)):
                    num_read += len(piece)
                    yield piece
        except Exception as error:
            raise _unavailable(url, error) from error
        if num_read != num_bytes:
            raise AdapterUnavailableError(f"{url} changed while it was read: {num_read} bytes of {num_bytes}")


@dataclass(frozen=True, slots=True)
class _RemoteFiles:
    """An adapter's files in a store; each with its size and version."""

    url: str
    config: tuple[int, str]
    weights_name: str
    weights: tuple[int, str]
    weights_format: Literal["safetensors", "bin"]

    @property
    def num_bytes(self) -> int:
        return self.config[0] + self.weights[0]

    @property
    def tag(self) -> str:
        return hashlib.sha256(repr((self.config, self.weights_name, self.weights)).encode()).hexdigest()


def _unavailable(url: str, error: Exception) -> AdapterUnavailableError:
    return AdapterUnavailableError(f"{url} cannot be read: {type(error).__name__}: {error}"[:500])
