"""Where adapters may come from, and reading them: a source (a folder inside the allowed roots, or a hub id) becomes a
local folder, a folder becomes bytes. A folder is read exactly once, so what is checked is what is used.
"""

import errno
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

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

from pomona.adapters.peft_config import MAX_CONFIG_BYTES
from pomona.core.adapter import AdapterFiles
from pomona.core.errors import AdapterError, AdapterForbiddenError, AdapterNotFoundError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES: tuple[tuple[str, Literal["safetensors", "bin"]], ...] = (
    ("adapter_model.safetensors", "safetensors"),
    ("adapter_model.bin", "bin"),
)
"""In PEFT's order of preference."""
MAX_WEIGHTS_BYTES = 16 * 2**30
MAX_SOURCE_CHARS = 4096
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]{1,200})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class AdapterSources:
    """What an operator allows ``source`` to be."""

    allowed_roots: tuple[str, ...] = ()
    """Folders; anything inside them (once symbolic links are followed) may be loaded."""
    allow_hub: bool = False
    """Whether ``org/name`` or ``org/name@revision`` may be fetched from the Hugging Face hub."""

    def below(self, folder: str) -> "AdapterSources":
        """Return the same, with every root narrowed down to its sub-folder ``folder``, one plain name."""
        assert folder not in ("", ".", ".."), folder
        assert os.sep not in folder, folder
        return replace(self, allowed_roots=tuple(os.path.join(root, folder) for root in self.allowed_roots))

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
        is_allowed_path = any(_is_inside(path, os.path.realpath(root)) for root in self.allowed_roots)
        if is_allowed_path and os.path.isdir(path):
            return path
        if _HUB_ID.fullmatch(source) and self.allow_hub:
            return _fetch(source)
        if is_allowed_path:
            raise AdapterNotFoundError(f"source {source!r}: there is no such folder")
        kinds = "the allowed adapter folders" + (" and not a hub id (org/name)" if self.allow_hub else "")
        raise AdapterForbiddenError(f"source {source!r}: outside {kinds}")


def read_files(folder: str, *, max_weights_bytes: int = MAX_WEIGHTS_BYTES) -> AdapterFiles:
    """Read an adapter folder into memory.

    Symbolic links are followed only inside the folder, or inside the hub's cache if the folder lies there.

    Args:
        folder: a local folder with adapter_config.json and adapter_model.safetensors (or .bin).
        max_weights_bytes: larger weight files are refused unread.

    Raises:
        AdapterNotFoundError: the folder, or adapter_config.json in it, does not exist.
        AdapterForbiddenError: a file is a link that leads outside.
        AdapterError: there are no weights, or a file is too large or not a regular file.
    """
    real_folder = os.path.realpath(folder)
    roots = [real_folder]
    cache = os.path.realpath(hub_constants.HF_HUB_CACHE)
    if _is_inside(real_folder, cache):
        roots.append(cache)
    config_bytes = _read(real_folder, CONFIG_FILE, roots, MAX_CONFIG_BYTES)
    if config_bytes is None:
        raise AdapterNotFoundError(f"no {CONFIG_FILE} in {folder!r}: not a PEFT adapter folder")
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
        raise AdapterError(f"{name} cannot be read: {error.strerror}") from error
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
            raise AdapterError(f"{name} cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise AdapterError(f"{name} has more than {max_bytes} bytes, the limit")
    return content


def _fetch(source: str) -> str:
    """Download an adapter's files into the hub's cache, or find them there."""
    repo_id, _, revision = source.partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision or None,
            allow_patterns=[CONFIG_FILE, *(name for name, _ in WEIGHTS_FILES)],
        )
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
        raise AdapterError(
            f"source {source!r}: not in the local cache, and the Hugging Face hub cannot be reached. "
            f"Download it where there is a network (hf download {repo_id}) and copy the cache, or pass a local folder"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise AdapterError(f"source {source!r}: the Hugging Face hub could not be read: {error}") from error
    return str(Path(folder).resolve())


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
