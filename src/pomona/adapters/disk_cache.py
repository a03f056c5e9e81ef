"""DiskCache: adapters fetched from far away, kept on this machine's disk over restarts.

``adapters/<digest>/`` holds the files of one adapter, whatever it is called; ``sources/<hash of source>`` says which
digest a source had when it was last read, and under which version tag. Both appear by renaming, complete or not at all.
Whoever reads an adapter computes its digest anyway and calls ``drop`` if it is not the folder's name.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pomona.core.errors import AdapterError, AdapterUnavailableError, ConfigError
from pomona.core.ids import AdapterId


@dataclass(frozen=True, slots=True)
class CachedSource:
    """What a source held when it was last read."""

    tag: str
    """Changes when the source's bytes may have changed."""
    adapter_id: AdapterId


class DiskCache:
    """A folder with a byte budget; the least recently used adapters go first, those in use never. Thread-safe.

    Args:
        root: made if need be; one server's at a time.
        max_bytes: of all files of adapters.

    Raises:
        ConfigError: the folder cannot be written, or another server has it.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._num_uses: Counter[AdapterId] = Counter()
        self._num_late: Counter[AdapterId] = Counter()
        """Uses of files that were dropped: those who have them may yet drop them too."""
        try:
            for folder in ("adapters", "sources", "partial"):
                (root / folder).mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"adapter_cache_dir {str(root)!r}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_file)
            raise ConfigError(f"adapter_cache_dir {str(root)!r}: another server is using it") from error
        for left_over in (root / "partial").iterdir():
            shutil.rmtree(left_over, ignore_errors=True)
        by_age = sorted((root / "adapters").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        self._sizes = {AdapterId(path.name): _num_bytes(path) for path in by_age}
        """Least recently used first."""

    def close(self) -> None:
        """Let another server have the folder."""
        os.close(self._lock_file)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files of adapters."""
        with self._lock:
            return sum(self._sizes.values())

    @property
    def ids(self) -> tuple[AdapterId, ...]:
        """All adapters, the least recently used first."""
        with self._lock:
            return tuple(self._sizes)

    def source(self, source: str) -> CachedSource | None:
        """What a source held when it was last read; None if that is not known."""
        try:
            known = json.loads(self._source_file(source).read_bytes())
            return CachedSource(str(known["tag"]), AdapterId(str(known["adapter_id"])))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def take(self, adapter_id: AdapterId) -> Path | None:
        """The folder of an adapter, kept until ``release``; None if it is not here."""
        with self._lock:
            if adapter_id not in self._sizes:
                return None
            self._sizes[adapter_id] = self._sizes.pop(adapter_id)
            self._num_uses[adapter_id] += 1
        path = self._root / "adapters" / adapter_id
        with contextlib.suppress(OSError):
            os.utime(path)
        return path

    def release(self, adapter_id: AdapterId) -> None:
        """The counterpart of ``take`` and ``put``."""
        with self._lock:
            self._num_uses[adapter_id] -= 1
            assert self._num_uses[adapter_id] >= 0, "released more often than taken"
            if not self._num_uses[adapter_id]:
                del self._num_uses[adapter_id]
                self._num_late.pop(adapter_id, None)
        self._shrink(0)

    def put(self, source: str, tag: str, num_bytes: int, write: Callable[[Path], AdapterId]) -> tuple[AdapterId, Path]:
        """Keep what ``write`` fetches; taken already, see ``release``.

        Args:
            source: where it comes from.
            tag: the source's version.
            num_bytes: expected; older adapters make room before the first byte is written.
            write: writes the files into an empty folder and returns their digest.

        Raises:
            AdapterError: it is larger than the budget; nothing made room for it.
            AdapterUnavailableError: the disk is full, or fails; nothing is left behind.
        """
        if num_bytes > self._max_bytes:
            raise AdapterError(
                f"the adapter has {num_bytes} bytes, but adapter_cache_bytes is {self._max_bytes}: raise it"
            )
        partial = self._root / "partial" / uuid.uuid4().hex
        self._shrink(num_bytes)
        try:
            partial.mkdir()
            adapter_id = write(partial)
            for path in partial.iterdir():
                _sync(path)
            final = self._root / "adapters" / adapter_id
            with self._lock:
                if adapter_id not in self._sizes:
                    partial.rename(final)
                    self._sizes[adapter_id] = _num_bytes(final)
                self._num_uses[adapter_id] += 1
            self._note(source, CachedSource(tag, adapter_id))
        except OSError as error:
            raise AdapterUnavailableError(f"the adapter cache on disk cannot be written: {error.strerror}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return adapter_id, final

    def drop(self, adapter_id: AdapterId) -> None:
        """Remove an adapter whose files are not what they were; taken or not.

        What was fetched since another user of the same files dropped them stays.
        """
        with self._lock:
            if self._num_late[adapter_id]:
                self._num_late[adapter_id] -= 1
                return
            if self._num_uses[adapter_id] > 1:
                self._num_late[adapter_id] = self._num_uses[adapter_id] - 1
            self._sizes.pop(adapter_id, None)
            self._remove(adapter_id)

    def _note(self, source: str, known: CachedSource) -> None:
        file = self._source_file(source)
        partial = self._root / "partial" / uuid.uuid4().hex
        with contextlib.suppress(OSError):  # without it the source is read once more
            partial.write_text(json.dumps({"source": source, "tag": known.tag, "adapter_id": known.adapter_id}))
            partial.rename(file)

    def _source_file(self, source: str) -> Path:
        return self._root / "sources" / hashlib.sha256(source.encode()).hexdigest()

    def _shrink(self, num_more_bytes: int) -> None:
        with self._lock:
            excess = sum(self._sizes.values()) + num_more_bytes - self._max_bytes
            for adapter_id in list(self._sizes):
                if excess <= 0:
                    return
                if adapter_id not in self._num_uses:
                    excess -= self._sizes.pop(adapter_id)
                    self._remove(adapter_id)

    def _remove(self, adapter_id: AdapterId) -> None:
        """Take a folder away in one step, then delete it."""
        doomed = self._root / "partial" / uuid.uuid4().hex
        with contextlib.suppress(OSError):
            (self._root / "adapters" / adapter_id).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
