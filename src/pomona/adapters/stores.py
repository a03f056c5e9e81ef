"""Stores: places with many adapters, known by an index and not by their weights. A folder is listed; a URL is listed,
or says itself what it has in ``index.json``:

    {"adapters": [{"name": "legal", "path": "legal/v7", "digest": "<64 hex digits, optional>"}]}

Called from worker threads.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pomona.adapters.remote import RemoteFolders
from pomona.core.errors import AdapterUnavailableError, ConfigError
from pomona.core.ids import AdapterId

INDEX_FILE = "index.json"
_REFRESH_S = 10.0
_NUM_DIGEST_CHARS = 64


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """One line of an index."""

    name: str
    source: str
    adapter_id: AdapterId | None = None
    """What the index says must be there; None takes what is found."""


class AdapterStore(Protocol):
    """A place with many adapters."""

    def list(self) -> list[StoredAdapter]:
        """Everything the index has.

        Raises:
            ConfigError: there is no such place, or its index is malformed.
            AdapterUnavailableError: it does not answer now.
        """
        ...

    def find(self, name: str) -> StoredAdapter | None:
        """What is called ``name``, also if it came after ``list``; a bounded look, whatever the size of the store.

        Raises:
            AdapterUnavailableError: it does not answer now.
        """
        ...


class FolderStore:
    """A folder whose sub-folders are adapters under their own names.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def list(self) -> list[StoredAdapter]:
        """See AdapterStore: one directory is read, nothing in the sub-folders."""
        try:
            with os.scandir(self._root) as entries:
                names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
        except OSError as error:
            raise ConfigError(f"adapters_dir {str(self._root)!r}: {error.strerror}") from error
        return [StoredAdapter(name, str(self._root / name)) for name in sorted(names)]

    def find(self, name: str) -> StoredAdapter | None:
        """See AdapterStore: one stat."""
        if "/" in name or name.startswith("."):
            return None
        path = self._root / name
        return StoredAdapter(name, str(path)) if path.is_dir() else None


class RemoteStore:
    """A URL below which every folder is an adapter under its own name, or which has an index file.

    Args:
        url: of the store.
        remote: reads it.
    """

    def __init__(self, url: str, remote: RemoteFolders) -> None:
        self._url = url.rstrip("/")
        self._remote = remote
        self._lock = threading.Lock()
        self._found: dict[str, StoredAdapter] = {}
        self._read_s = float("-inf")

    def list(self) -> list[StoredAdapter]:
        """See AdapterStore: the index file is read, or the first level listed."""
        with self._lock:
            self._read()
            return list(self._found.values())

    def find(self, name: str) -> StoredAdapter | None:
        """See AdapterStore: the index is read anew if it is some seconds old, however many names are asked for."""
        with self._lock:
            if name not in self._found and time.monotonic() - self._read_s > _REFRESH_S:
                self._read()
            return self._found.get(name)

    def _read(self) -> None:
        self._read_s = time.monotonic()
        system = self._remote.system(self._url)
        try:
            try:
                lines = list(_indexed(self._url, system.cat_file(f"{self._url}/{INDEX_FILE}")))
            except FileNotFoundError:
                lines = list(_listed(self._url, system.ls(self._url, detail=True)))
        except ConfigError:
            raise
        except Exception as error:
            raise AdapterUnavailableError(
                f"{self._url} cannot be read: {type(error).__name__}: {error}"[:500]
            ) from error
        self._found = {line.name: line for line in lines}


def _listed(url: str, entries: list[dict[str, Any]]) -> Iterator[StoredAdapter]:
    for entry in entries:
        name = str(entry["name"]).rstrip("/").rpartition("/")[2]
        if entry["type"] == "directory" and name and not name.startswith("."):
            yield StoredAdapter(name, f"{url}/{name}")


def _indexed(url: str, content: bytes) -> Iterator[StoredAdapter]:
    """Lines of an index file.

    Raises:
        ConfigError: it is malformed; says where.
    """
    where = f"{url}/{INDEX_FILE}"
    try:
        lines = json.loads(content)["adapters"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{where}: must be JSON with a list "adapters"') from error
    seen: set[str] = set()
    if not isinstance(lines, list):
        raise ConfigError(f'{where}: "adapters" must be a list')
    for number, line in enumerate(lines):
        name = line.get("name") if isinstance(line, dict) else None
        path = line.get("path", name) if isinstance(line, dict) else None
        digest = line.get("digest") if isinstance(line, dict) else None
        if not isinstance(name, str) or not isinstance(path, str) or not isinstance(digest, str | None):
            raise ConfigError(f"{where}: adapters[{number}] must have a name, and path and digest must be text")
        if digest is not None and len(digest) != _NUM_DIGEST_CHARS:
            raise ConfigError(f"{where}: adapters[{number}]: digest must be {_NUM_DIGEST_CHARS} hex digits")
        if name in seen:
            raise ConfigError(f"{where}: the name {name!r} is given twice")
        seen.add(name)
        yield StoredAdapter(name, f"{url}/{path}", None if digest is None else AdapterId(digest))
