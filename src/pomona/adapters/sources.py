"""Where adapters may come from, and reading them: a source (a folder or URL inside the allowed roots, or a hub id)
becomes a local folder, a folder becomes bytes. A folder is read exactly once, so what is checked is what is used.
"""

import errno
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pomona.adapters.layout import CONFIG_FILE, MAX_WEIGHTS_BYTES, WEIGHTS_FILES
from pomona.adapters.peft_config import MAX_CONFIG_BYTES
from pomona.adapters.remote import RemoteFolders, is_url
from pomona.core.adapter import AdapterFiles
from pomona.core.errors import AdapterError, AdapterForbiddenError, AdapterNotFoundError, AdapterUnavailableError
from pomona.core.ids import AdapterId

MAX_SOURCE_CHARS = 4096
_URL_SEPARATOR = re.compile(r"[/\\]")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,200})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """An adapter's files on this machine."""

    path: str
    num_weights_bytes: int
    """As the file system says; 0 if there are none."""
    cached_id: AdapterId | None
    """Its digest, if it lies in the cache on disk."""


@dataclass(frozen=True, slots=True)
class AdapterSources:
    """What an operator allows ``source`` to be."""

    allowed_roots: tuple[str, ...] = ()
    """Folders and URLs; anything inside them (in folders: once symbolic links are followed) may be loaded."""
    allow_hub: bool = False
    """Whether ``org/name`` or ``org/name@revision`` may be fetched from the Hugging Face hub."""
    remote: RemoteFolders | None = None
    """Fetches what lies below URLs; None refuses them."""

    def below(self, folder: str) -> "AdapterSources":
        """Return the same, with every root narrowed down to its sub-folder ``folder``, one plain name."""
        assert folder not in ("", ".", ".."), folder
        assert os.sep not in folder, folder
        return replace(self, allowed_roots=tuple(os.path.join(root, folder) for root in self.allowed_roots))

    def has(self, place: str) -> bool:
        """True if a place lies in the roots by its spelling, which ``settled`` has made; nothing is followed."""
        if is_url(place):
            return any(_is_below(place, root) for root in self.allowed_roots)
        return os.path.normpath(place) == place and self._is_allowed(place)

    def settled(self, source: str) -> str:
        """Return a source as it is to be written down: of a folder inside the roots, the path without symbolic links.

        Anything else stays as it is, for ``fetch`` to take or refuse.
        """
        if is_url(source) or not 0 < len(source) <= MAX_SOURCE_CHARS or "\0" in source:
            return source
        path = os.path.realpath(source)
        return path if self._is_allowed(path) and os.path.isdir(path) else source

    def fetch(self, source: str, expected_id: AdapterId | None = None) -> LocalAdapter:
        """Bring a source to this machine; ``release`` it once it has been read.

        Args:
            source: folder, URL or hub id.
            expected_id: what must be there; if the cache on disk has it, nobody else is asked.

        Raises:
            AdapterError: as ``resolve``.
            AdapterUnavailableError: the source, or the disk, fails for now.
        """
        if is_url(source):
            self._check_url(source)
            assert self.remote is not None
            adapter_id, path = self.remote.fetch(source, expected_id)
            return LocalAdapter(str(path), _weights_bytes(str(path)), adapter_id)
        folder = self.resolve(source)
        return LocalAdapter(folder, _weights_bytes(folder), None)

    def release(self, adapter: LocalAdapter, *, is_corrupt: bool = False) -> None:
        """Give back what ``fetch`` returned.

        Args:
            adapter: fetched.
            is_corrupt: its bytes are not what they were when they were fetched: fetch it anew next time.
        """
        if self.remote is not None and adapter.cached_id is not None:
            if is_corrupt:
                self.remote.cache.drop(adapter.cached_id)
            self.remote.cache.release(adapter.cached_id)

    def lane(self, source: str) -> str:
        """What to wait behind: a source that is slow delays only those of its own lane."""
        if is_url(source):
            return next((root for root in self.allowed_roots if _is_below(source, root)), "")
        return "local"

    def _check_url(self, source: str) -> None:
        # Those who speak to web servers drop control characters and undo percent signs; so do servers, once more.
        parts = _URL_SEPARATOR.split(unquote(unquote(source.partition("://")[2])))
        is_plain = not _CONTROL_CHARACTER.search(source) and ".." not in parts and "." not in parts
        is_allowed = any(_is_below(source, root) for root in self.allowed_roots)
        if not 0 < len(source) <= MAX_SOURCE_CHARS or not is_plain or not is_allowed:
            raise AdapterForbiddenError(
                f"source {source[:200]!r}: outside the allowed adapter folders; the server's operator can allow more "
                f"with --allowed-adapter-root"
            )
        if self.remote is None:
            raise AdapterForbiddenError(f"source {source[:200]!r}: URLs need adapter_cache_dir")

    def _is_allowed(self, path: str) -> bool:
        return any(_is_inside(path, os.path.realpath(root)) for root in self.allowed_roots if not is_url(root))

    def resolve(self, source: str) -> str:
        """Find the local folder a source means, downloading it from the hub if need be.

        An existing folder inside the roots wins over a hub id of the same spelling.

        Returns:
            Absolute path of a folder, without symbolic links.

        Raises:
            AdapterForbiddenError: outside the allowed roots; the message is the same whether or not it exists.
            AdapterNotFoundError: allowed, but nothing is there.
            AdapterError: the hub could not be reached.
        """
        if not 0 < len(source) <= MAX_SOURCE_CHARS or "\0" in source:
            raise AdapterError(f"source: must be 1 to {MAX_SOURCE_CHARS} characters without NUL")
        path = os.path.realpath(source)
        is_allowed_path = self._is_allowed(path)
        if is_allowed_path and os.path.isdir(path):
            return path
        if _HUB_ID.fullmatch(source) and self.allow_hub:
            return _fetch(source)
        if is_allowed_path:
            raise AdapterNotFoundError(f"source {source!r}: there is no such folder")
        kinds = "the allowed adapter folders" + (" and not a hub id (org/name)" if self.allow_hub else "")
        hub = "" if self.allow_hub else ", and hub ids with --allow-hub-adapters"
        raise AdapterForbiddenError(
            f"source {source!r}: outside {kinds}; the server's operator can allow more with --allowed-adapter-root{hub}"
        )


def read_files(folder: str, *, max_weights_bytes: int = MAX_WEIGHTS_BYTES) -> AdapterFiles:
    """Read an adapter folder into memory.

    Symbolic links are followed only inside the folder, or inside the hub's cache if the folder lies there.

    Args:
        folder: a local folder with adapter_config.json and adapter_model.safetensors (or .bin).
        max_weights_bytes: larger weight files are refused unread.

    Raises:
        AdapterNotFoundError: the folder does not exist.
        AdapterForbiddenError: a file is a link that leads outside.
        AdapterError: there is no adapter_config.json or no weights, or a file is too large or not a regular file.
    """
    real_folder = os.path.realpath(folder)
    roots = [real_folder]
    cache = os.path.realpath(hub_constants.HF_HUB_CACHE)
    if _is_inside(real_folder, cache):
        roots.append(cache)
    config_bytes = _read(real_folder, CONFIG_FILE, roots, MAX_CONFIG_BYTES)
    if config_bytes is None:
        # Of a folder that is there, its name is known: whoever asks for it is told why it cannot be used.
        kind = AdapterError if os.path.isdir(real_folder) else AdapterNotFoundError
        raise kind(f"no {CONFIG_FILE} in {folder!r}: not a PEFT adapter folder")
    for name, weights_format in WEIGHTS_FILES:
        weights_bytes = _read(real_folder, name, roots, max_weights_bytes)
        if weights_bytes is not None:
            return AdapterFiles(config_bytes=config_bytes, weights_bytes=weights_bytes, weights_format=weights_format)
    names = " or ".join(name for name, _ in WEIGHTS_FILES)
    raise AdapterError(f"no weights in {folder!r}: expected {names} beside {CONFIG_FILE}")


def _read(folder: str, name: str, roots: Sequence[str], max_bytes: int) -> bytes | None:
    """Read one file; None if it does not exist."""
    path = os.path.realpath(os.path.join(folder, name))
    if not any(_is_inside(path, root) for root in roots):
        raise AdapterForbiddenError(f"{name} is a symbolic link that leads outside the adapter's folder")
    try:
        # O_NOFOLLOW: the path is resolved, so a link here was put there since. O_NONBLOCK: a pipe must not hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise AdapterForbiddenError(f"{name} is a symbolic link that leads nowhere") from error
        raise _unreadable(name, error) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise AdapterError(f"{name} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > max_bytes:
            raise AdapterError(f"{name} has {status.st_size} bytes; the limit is {max_bytes}")
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise _unreadable(name, error) from error
    if len(content) > max_bytes:
        raise AdapterError(f"{name} has more than {max_bytes} bytes, the limit")
    return content


def _fetch(source: str) -> str:
    """Download an adapter's files into the hub's cache, or find them there: of its weights the first only."""
    repo_id, _, revision = source.partition("@")
    try:
        for name, _ in WEIGHTS_FILES:
            folder = huggingface_hub.snapshot_download(
                repo_id, revision=revision or None, allow_patterns=[CONFIG_FILE, name]
            )
            if os.path.exists(os.path.join(folder, name)):
                break
    except GatedRepoError as error:
        raise AdapterForbiddenError(
            f"source {source!r}: the repository is gated; accept its terms and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise AdapterNotFoundError(
            f"source {source!r}: no such repository or revision on the hub (a private one needs HF_TOKEN)"
        ) from error
    except HFValidationError as error:
        raise AdapterNotFoundError(f"source {source!r}: not a hub id") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise AdapterUnavailableError(
            f"source {source!r}: not in the local cache, and the Hugging Face hub cannot be reached. "
            f"Download it where there is a network (hf download {repo_id}) and copy the cache, or pass a local folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise AdapterUnavailableError(f"source {source!r}: the Hugging Face hub could not be read: {error}") from error
    return str(Path(folder).resolve())


def _unreadable(name: str, error: OSError) -> AdapterError:
    kind = AdapterError if error.errno in (errno.EACCES, errno.EPERM) else AdapterUnavailableError
    return kind(f"{name} cannot be read: {error.strerror}")


def _weights_bytes(folder: str) -> int:
    for name, _ in WEIGHTS_FILES:
        try:
            return os.stat(os.path.join(folder, name)).st_size
        except OSError:
            continue
    return 0


def _is_below(url: str, root: str) -> bool:
    return is_url(root) and url.startswith(root.rstrip("/") + "/")


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
