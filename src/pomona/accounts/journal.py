"""Write-ahead journal of one server process: what its requests used, safe before the answer begins.

A folder per process holds numbered segments of records (start, finish) and one table of progress: a memory-mapped slot
per request in flight, so that counting a token costs no system call. Both are in the kernel's hands the moment they are
written: they survive the death of the process. ``sync`` moves them to the disk, in groups, from a thread: a power cut
takes at most what was written since the last one. Whoever reads a dead process's folder gets a row for every start.

Record: length (4 bytes), CRC-32 (4 bytes), MessagePack. A torn last record fails the check and ends the segment.
"""

import contextlib
import fcntl
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from pomona.accounts import clock
from pomona.core.errors import DatabaseUnavailableError

_HEADER: Final = struct.Struct("<II")
_SLOT: Final = struct.Struct("<QQIId")
"""Number of the start record it belongs to; output, cached and input tokens counted; time of the last change."""
_NUM_SLOTS: Final = 65_536
_MAX_RECORD_BYTES: Final = 2**20
_LEFT_OVER_S: Final = 3600.0
"""A hidden folder in which nothing has changed for so long is nobody's."""
_LOCK_FILE: Final = "lock"
_PROGRESS_FILE: Final = "progress"


class Counted(NamedTuple):
    """Tokens of one request, as far as the engine has reported them."""

    output_tokens: int = 0
    cached_tokens: int = 0
    input_tokens: int = 0
    """Of the prompts that the engine has begun with."""


class Start(msgspec.Struct, frozen=True, tag="start"):
    """A request was accepted."""

    number: int
    """Counts the starts of the process."""
    slot: int
    """Its place in the table of progress."""
    request_id: str
    tenant_id: str
    key_id: str
    root_id: str
    adapter: str
    adapter_id: str
    prompt_tokens: tuple[int, ...]
    """Of each prompt."""
    started_s: float
    """Unix time."""
    is_batch: bool = False
    """A batch's line: it is run again if this run is cut off."""


class Usage(msgspec.Struct, frozen=True, tag="finish"):
    """A request has ended: everything that the ledger wants to know. Written as the finish record."""

    number: int
    """Of its start."""
    request_id: str
    tenant_id: str
    key_id: str
    root_id: str
    adapter: str
    adapter_id: str
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    engine_s: float
    outcome: str
    started_s: float
    ended_s: float
    is_batch: bool = False

    @property
    def is_void(self) -> bool:
        """True if it is no row of the ledger: a batch's line has one, of the run that has answered it."""
        return self.is_batch and self.outcome != "finish"


_DECODER: Final = msgspec.msgpack.Decoder(Start | Usage)


class _Segment:
    """One file of records, and which of its starts are still open."""

    __slots__ = ("file", "is_torn", "num_bytes", "num_open", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("wb", buffering=0)
        self.num_bytes = 0
        self.num_open = 0
        self.is_torn = False
        """A record was not written whole: nothing may follow it."""


class Journal:
    """The journal that this process writes. Belongs to one thread, but for ``sync`` and ``read_from``.

    Args:
        folder: of all processes' journals; created if need be.
        process_id: names this process's folder.
        segment_bytes: after so many a new segment is begun; old ones are removed when nothing in them is wanted.
    """

    def __init__(self, folder: Path, process_id: str, segment_bytes: int = 16 * 2**20) -> None:
        # Under its own name only once it is locked: before, it would look like a dead process's.
        hidden, self.folder = folder / f".{process_id}", folder / process_id
        hidden.mkdir(parents=True, mode=0o700)
        self._lock = _lock(hidden)
        assert self._lock is not None, "nobody else knows of this folder"
        self._segment_bytes = segment_bytes
        with (hidden / _PROGRESS_FILE).open("w+b") as file:
            # With all its blocks: on a disk that has become full, writing into a hole would kill the process.
            os.posix_fallocate(file.fileno(), 0, _NUM_SLOTS * _SLOT.size)
            self._progress = mmap.mmap(file.fileno(), 0)
        hidden.rename(self.folder)
        self._free_slots = list(range(_NUM_SLOTS - 1, -1, -1))
        self._num_starts = 0
        self._segments: dict[int, _Segment] = {}
        self._last_segment = -1
        self._segment_of: dict[int, int] = {}
        """Number of an open start -> segment that holds it."""
        self._begin_segment()

    @property
    def num_bytes(self) -> int:
        """Bytes on disk that are still wanted."""
        return sum(segment.num_bytes for segment in self._segments.values())

    @property
    def num_open(self) -> int:
        """Requests that have started and not finished."""
        return len(self._segment_of)

    def start(self, start: Start) -> Start:
        """Write down that a request begins. Returns the record with its number and slot.

        Raises:
            DatabaseUnavailableError: it cannot be written; the request must not begin.
        """
        if not self._free_slots:
            raise DatabaseUnavailableError(f"the journal holds {_NUM_SLOTS} requests in flight, its limit")
        self._num_starts += 1
        start = msgspec.structs.replace(start, number=self._num_starts, slot=self._free_slots.pop())
        _SLOT.pack_into(self._progress, start.slot * _SLOT.size, start.number, 0, 0, 0, start.started_s)
        try:
            self._append(start)
        except DatabaseUnavailableError:
            self._free_slots.append(start.slot)
            raise
        self._segment_of[start.number] = self._last_segment
        self._segments[self._last_segment].num_open += 1
        return start

    def advance(self, start: Start, counted: Counted, now_s: float) -> None:
        """Note how many tokens have been counted for a request, before the client sees them."""
        _SLOT.pack_into(self._progress, start.slot * _SLOT.size, start.number, *counted, now_s)

    def finish(self, start: Start, usage: Usage) -> None:
        """Write down a request's end.

        Raises:
            DatabaseUnavailableError: it cannot be written. The request stays open, and its progress is kept: a later
                recovery takes it from there.
        """
        self._append(usage)
        self._segments[self._segment_of.pop(start.number)].num_open -= 1
        self._free_slots.append(start.slot)

    def sync(self) -> None:
        """Move everything written so far to the disk. From any thread; one at a time."""
        self._progress.flush()
        os.fdatasync(self._segments[self._last_segment].file.fileno())

    def read_from(self, position: tuple[int, int], max_records: int) -> tuple[list[Usage], tuple[int, int]]:
        """Read finish records in the order they were written.

        Args:
            position: segment and byte to begin at; (0, 0) is the beginning.
            max_records: stop after so many.

        Returns:
            The records, and the position after them.
        """
        found: list[Usage] = []
        number, offset = position
        # What is written from now on is read next time; no more is written into the segments before that one.
        last = self._last_segment
        while number <= last and len(found) < max_records:
            segment = self._segments[number]
            end = segment.num_bytes
            for record, offset_after in _records(segment.path, offset, end):
                offset = offset_after
                if isinstance(record, Usage):
                    found.append(record)
                    if len(found) == max_records:
                        break
            if len(found) == max_records or number == last:
                break  # else what is left of the segment, if anything, is a torn record
            number, offset = number + 1, 0
        return found, (number, offset)

    def forget_before(self, position: tuple[int, int]) -> None:
        """Remove the segments before a position whose every start has finished: the ledger has them.

        A start that stays behind without its finish becomes a row that the ledger has already, if the process dies.
        """
        for number in [number for number in self._segments if number < position[0]]:
            segment = self._segments[number]
            if segment.num_open:
                continue
            segment.file.close()
            segment.path.unlink()
            del self._segments[number]

    def close(self) -> None:
        """Close the files; the folder stays for ``read_dead``, unless everything in it is in the ledger."""
        for segment in self._segments.values():
            segment.file.close()
        self._progress.close()
        assert self._lock is not None
        os.close(self._lock)

    def remove(self) -> None:
        """Close, and remove the folder: the ledger has everything."""
        remove_folder(self.folder)
        self.close()

    def _append(self, record: Start | Usage) -> None:
        content = msgspec.msgpack.encode(record)
        framed = _HEADER.pack(len(content), zlib.crc32(content)) + content
        segment = self._segments[self._last_segment]
        try:
            if segment.num_bytes >= self._segment_bytes or segment.is_torn:
                segment = self._begin_segment()
            num_written = segment.file.write(framed)
            if num_written != len(framed):
                raise OSError("short write")
        except OSError as error:
            segment.is_torn = True
            raise DatabaseUnavailableError(f"usage cannot be written down: {error.strerror or error}") from error
        segment.num_bytes += len(framed)

    def _begin_segment(self) -> _Segment:
        number = self._last_segment + 1
        if number:
            os.fdatasync(self._segments[self._last_segment].file.fileno())
        self._segments[number] = segment = _Segment(self.folder / f"{number:08d}")
        self._last_segment = number
        return segment


def _lock(folder: Path) -> int | None:
    """Take the folder's lock, which the kernel lets go of when its process ends; None while that lives."""
    try:
        descriptor = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if not folder.exists():  # whoever held the lock has removed it
        os.close(descriptor)
        return None
    return descriptor


def clear_left_overs(folder: Path) -> None:
    """Remove what kills have left of journals that were being made or removed. What is younger may still be at it."""
    for path in folder.glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            if clock.now_s() - path.stat().st_mtime > _LEFT_OVER_S:
                shutil.rmtree(path, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove the folder of a journal whose lock is held: at once for others, and if we are killed meanwhile."""
    hidden = folder.with_name(f".{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _records(path: Path, offset: int, end: int) -> Iterator[tuple[Start | Usage, int]]:
    """Yield whole records and the offset after each; stops at the first torn one."""
    with path.open("rb") as file:
        file.seek(offset)
        while offset + _HEADER.size <= end:
            num_bytes, checksum = _HEADER.unpack(file.read(_HEADER.size))
            if num_bytes > _MAX_RECORD_BYTES or offset + _HEADER.size + num_bytes > end:
                return
            content = file.read(num_bytes)
            if zlib.crc32(content) != checksum:
                return
            offset += _HEADER.size + num_bytes
            yield _DECODER.decode(content), offset


@contextlib.contextmanager
def dead_journals(folder: Path) -> Iterator[list[tuple[Path, list[Usage]]]]:
    """Lock the folders of processes that have died and read a row for each of their starts.

    Requests that were open get the outcome "lost" and the tokens that had been counted for them. While the block runs,
    nobody else reads the same folders; the caller removes those whose rows are in the ledger.
    """
    locks: list[int] = []
    found: list[tuple[Path, list[Usage]]] = []
    try:
        for path in sorted(folder.glob("[!.]*")):
            lock = _lock(path)
            if lock is not None:
                locks.append(lock)
                found.append((path, _rows_of(path)))
        yield found
    finally:
        for lock in locks:
            os.close(lock)


def _rows_of(path: Path) -> list[Usage]:
    starts: dict[int, Start] = {}
    rows: list[Usage] = []
    for segment in sorted(path.glob("[0-9]*")):
        for record, _ in _records(segment, 0, segment.stat().st_size):
            if isinstance(record, Start):
                starts[record.number] = record
            else:
                starts.pop(record.number, None)
                rows.append(record)
    progress = (path / _PROGRESS_FILE).read_bytes() if starts else b""
    return rows + [_lost(start, progress) for start in starts.values()]


def _lost(start: Start, progress: bytes) -> Usage:
    number, *numbers, at_s = _SLOT.unpack_from(progress, start.slot * _SLOT.size)
    counted = Counted(*numbers)
    if number != start.number:  # only if the disk lost the table in a power cut
        counted, at_s = Counted(), start.started_s
    return Usage(
        number=start.number,
        request_id=start.request_id,
        tenant_id=start.tenant_id,
        key_id=start.key_id,
        root_id=start.root_id,
        adapter=start.adapter,
        adapter_id=start.adapter_id,
        **counted._asdict(),
        engine_s=max(0.0, at_s - start.started_s),
        outcome="lost",
        started_s=start.started_s,
        ended_s=at_s,
        is_batch=start.is_batch,
    )
