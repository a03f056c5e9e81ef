"""Files and batches of tenants: what there is, in the database; contents, in the data folder. Blocking."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import delete, func, or_, select, tuple_, update
from sqlalchemy.orm import Session

from pomona.accounts.clock import now_s
from pomona.accounts.database import Database
from pomona.accounts.tables import BatchRow, FileRow, TenantRow
from pomona.core.errors import AccountConflictError, AccountNotFoundError, InvalidRequestError

LEASE_S: Final = 30.0
ACTIVE: Final = ("validating", "in_progress", "finalizing", "cancelling")
_MAX_UNENDED: Final = 1000
"""Batches of a tenant."""
_FILE_OVERHEAD_BYTES: Final = 4096
"""What a file takes beside its content: empty ones would be without number."""
_FILE_ID: Final = re.compile(r"file-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_s: float


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch as it is now."""

    id: str
    tenant_id: str
    key_id: str
    endpoint: str
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    status: str
    errors: list[dict[str, Any]]
    metadata: Mapping[str, str] | None
    num_total: int
    num_completed: int
    num_failed: int
    created_s: float
    in_progress_s: float | None
    ended_s: float | None
    expires_s: float


class BatchStore:
    """Files and batches.

    Args:
        database: migrated.
        folder: for the contents; several server processes that share the database share it too.
    """

    def __init__(self, database: Database, folder: Path) -> None:
        self._database = database
        self._folder = folder

    def path_of(self, file_id: str) -> Path:
        """Return where a file's content lies.

        Raises:
            AccountNotFoundError: it is not the id of a file.
        """
        if not _FILE_ID.fullmatch(file_id):
            raise _no_file(file_id)
        return self._folder / file_id

    def new_file_id(self) -> str:
        """Draw an id; the folder is there on return."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return f"file-{secrets.token_hex(16)}"

    def check_room(self, tenant_id: str, max_bytes: int) -> None:
        """Ask whether a tenant may store another file.

        Raises:
            AccountConflictError: its files fill what it has.
        """
        with self._database.session() as session:
            _check_room(session, tenant_id, max_bytes)

    def add_file(
        self, file_id: str, tenant_id: str, filename: str, purpose: str, max_bytes: int | None = None
    ) -> StoredFile:
        """Write down a file whose content is in its place.

        Raises:
            AccountConflictError: the tenant's files fill ``max_bytes`` without it.
        """
        num_bytes = self.path_of(file_id).stat().st_size
        with self._database.session(is_write=True) as session:
            if max_bytes is not None:
                session.get(TenantRow, tenant_id, with_for_update=True)  # one of its files after the other
                _check_room(session, tenant_id, max_bytes)
            row = FileRow(
                id=file_id,
                tenant_id=tenant_id,
                filename=filename,
                purpose=purpose,
                num_bytes=num_bytes,
                created_s=now_s(),
            )
            session.merge(row)
        return StoredFile(file_id, filename, purpose, num_bytes, row.created_s)

    def file(self, file_id: str, tenant_id: str) -> StoredFile:
        """Look up a tenant's file.

        Raises:
            AccountNotFoundError: the tenant has none of that id.
        """
        with self._database.session() as session:
            row = session.get(FileRow, file_id)
            if row is None or row.tenant_id != tenant_id:
                raise _no_file(file_id)
            return _file(row)

    def files(
        self, tenant_id: str, purpose: str | None, after: str | None, limit: int, *, is_oldest_first: bool = False
    ) -> list[StoredFile]:
        """A tenant's files, the newest or the oldest first; those after the one with id ``after``, at most ``limit``.

        Raises:
            AccountNotFoundError: the tenant has none of that id: who pages would begin anew.
        """
        query = select(FileRow).where(FileRow.tenant_id == tenant_id)
        if purpose is not None:
            query = query.where(FileRow.purpose == purpose)
        place = tuple_(FileRow.created_s, FileRow.id)
        if after is not None:
            last = self.file(after, tenant_id)
            seen = tuple_(last.created_s, last.id)
            query = query.where(place > seen if is_oldest_first else place < seen)
        with self._database.session() as session:
            columns = (FileRow.created_s, FileRow.id)
            query = query.order_by(*(column if is_oldest_first else column.desc() for column in columns))
            return [_file(row) for row in session.scalars(query.limit(limit))]

    def delete_file(self, file_id: str, tenant_id: str) -> None:
        """Remove a file.

        Raises:
            AccountNotFoundError: the tenant has none of that id.
            AccountConflictError: a batch works on it.
        """
        self.file(file_id, tenant_id)
        with self._database.session(is_write=True) as session:
            # What it has written too: whoever takes it over would do everything again.
            is_used = (BatchRow.input_file_id, BatchRow.output_file_id, BatchRow.error_file_id)
            users = select(BatchRow.id).where(
                or_(*(column == file_id for column in is_used)), BatchRow.status.in_(ACTIVE)
            )
            if session.scalars(users.limit(1)).first() is not None:
                raise AccountConflictError(f"A batch still works on the file {file_id}.")
            session.execute(delete(FileRow).where(FileRow.id == file_id))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path_of(file_id))

    def create_batch(
        self, tenant_id: str, key_id: str, endpoint: str, input_file_id: str, metadata: Mapping[str, str] | None
    ) -> Batch:
        """Add a batch.

        Raises:
            AccountNotFoundError: the tenant has no such file.
            InvalidRequestError: the file is not for this.
            AccountConflictError: too many batches of the tenant have not ended.
        """
        purpose = self.file(input_file_id, tenant_id).purpose
        if purpose != "batch":
            raise InvalidRequestError("input_file_id", f"input_file_id: its purpose is {purpose!r}: must be 'batch'")
        now = now_s()
        row = BatchRow(
            id=f"batch_{secrets.token_hex(16)}",
            tenant_id=tenant_id,
            key_id=key_id,
            endpoint=endpoint,
            input_file_id=input_file_id,
            output_file_id=None,
            error_file_id=None,
            status="validating",
            errors=None,
            user_metadata=None if metadata is None else json.dumps(metadata),
            num_total=0,
            num_completed=0,
            num_failed=0,
            created_s=now,
            in_progress_s=None,
            ended_s=None,
            expires_s=now + 86_400.0,
            process_id=None,
            leased_until_s=0.0,
        )
        with self._database.session(is_write=True) as session:
            session.get(TenantRow, tenant_id, with_for_update=True)  # one of its batches after the other
            unended = select(func.count()).where(BatchRow.tenant_id == tenant_id, BatchRow.status.in_(ACTIVE))
            if session.scalars(unended).one() >= _MAX_UNENDED:
                raise AccountConflictError(f"You have {_MAX_UNENDED} batches that have not ended, the limit.")
            session.add(row)
        return _batch(row)

    def batch(self, batch_id: str, tenant_id: str | None = None) -> Batch:
        """Look up a batch, of a tenant or of any.

        Raises:
            AccountNotFoundError: there is none.
        """
        with self._database.session() as session:
            row = session.get(BatchRow, batch_id)
            if row is None or tenant_id not in (None, row.tenant_id):
                raise AccountNotFoundError(f"There is no batch {batch_id[:100]!r}.")
            return _batch(row)

    def batches(self, tenant_id: str, after: str | None, limit: int) -> list[Batch]:
        """A tenant's batches, the newest first; those after the one with id ``after``, at most ``limit``.

        Raises:
            AccountNotFoundError: the tenant has none of that id: who pages would begin anew.
        """
        query = select(BatchRow).where(BatchRow.tenant_id == tenant_id)
        if after is not None:
            last = self.batch(after, tenant_id)
            query = query.where(tuple_(BatchRow.created_s, BatchRow.id) < tuple_(last.created_s, last.id))
        with self._database.session() as session:
            rows = session.scalars(query.order_by(BatchRow.created_s.desc(), BatchRow.id.desc()).limit(limit))
            return [_batch(row) for row in rows]

    def claim(self, process_id: str, busy_tenants: Collection[str] = ()) -> Batch | None:
        """Take the oldest batch that nobody works on; its lease must be renewed by ``update``. The files that it will
        write have their ids by then: whoever takes it over finds them.

        Args:
            process_id: this process.
            busy_tenants: whose batches are left alone.
        """
        with self._database.session(is_write=True) as session:
            now = self._database.now_s(session)
            free = select(BatchRow.id).where(
                BatchRow.status.in_(ACTIVE), BatchRow.leased_until_s < now, BatchRow.tenant_id.not_in(busy_tenants)
            )
            batch_id = session.scalars(free.order_by(BatchRow.created_s).limit(1)).first()
            if batch_id is None:
                return None
            take = update(BatchRow).where(
                BatchRow.id == batch_id, BatchRow.leased_until_s < now, BatchRow.status.in_(ACTIVE)
            )
            # Another process may have taken it since it was found, or its owner cancelled it: then no row fits.
            files = {
                column.key: func.coalesce(column, self.new_file_id())
                for column in (BatchRow.output_file_id, BatchRow.error_file_id)
            }
            mine = take.values(process_id=process_id, leased_until_s=now + LEASE_S, **files)
            taken = session.execute(mine.returning(BatchRow.id)).first()
            row = None if taken is None else session.get(BatchRow, batch_id)
            return None if row is None else _batch(row)

    def update(self, batch_id: str, process_id: str, **values: Any) -> Batch | None:
        """Change a batch that this process works on and renew its lease.

        Args:
            batch_id: which.
            process_id: this process.
            **values: columns; ``is_released`` gives up the lease.

        Returns:
            How it is now; None, and nothing has changed, if it has ended, or is no longer this process's, or if it was
            to begin or to be complete and has been cancelled meanwhile.
        """
        is_released = values.pop("is_released", False)
        with self._database.session(is_write=True) as session:
            values["leased_until_s"] = 0.0 if is_released else self._database.now_s(session) + LEASE_S
            mine = update(BatchRow).where(
                BatchRow.id == batch_id, BatchRow.process_id == process_id, BatchRow.status.in_(ACTIVE)
            )
            if values.get("status") in ("in_progress", "completed"):
                mine = mine.where(BatchRow.status != "cancelling")
            if session.execute(mine.values(**values).returning(BatchRow.id)).first() is None:
                return None
            row = session.get(BatchRow, batch_id)
            assert row is not None, "just changed"
            return _batch(row)

    def cancel(self, batch_id: str, tenant_id: str) -> Batch:
        """End a batch that nobody has begun with, ask for the end of one that is under way; others stay as they are.

        Raises:
            AccountNotFoundError: there is none.
        """
        self.batch(batch_id, tenant_id)
        with self._database.session(is_write=True) as session:
            cancel, now = update(BatchRow).where(BatchRow.id == batch_id), now_s()
            # It may be a day before anybody looks at it: after the tenant's other batches.
            is_waiting = (BatchRow.status == "validating") & BatchRow.output_file_id.is_(None)  # see ``claim``
            session.execute(cancel.where(is_waiting).values(status="cancelled", ended_s=now))
            is_running = or_(BatchRow.status == "validating", BatchRow.status == "in_progress")
            session.execute(cancel.where(is_running).values(status="cancelling"))
        return self.batch(batch_id)


def _check_room(session: Session, tenant_id: str, max_bytes: int) -> None:
    query = select(func.sum(FileRow.num_bytes + _FILE_OVERHEAD_BYTES)).where(FileRow.tenant_id == tenant_id)
    if int(session.scalar(query) or 0) >= max_bytes:
        raise AccountConflictError(f"Your files have reached the limit of {max_bytes} bytes: delete some first.")


def _no_file(file_id: str) -> AccountNotFoundError:
    return AccountNotFoundError(f"There is no file {file_id[:100]!r}.")


def _file(row: FileRow) -> StoredFile:
    return StoredFile(row.id, row.filename, row.purpose, row.num_bytes, row.created_s)


def _batch(row: BatchRow) -> Batch:
    return Batch(
        id=row.id,
        tenant_id=row.tenant_id,
        key_id=row.key_id,
        endpoint=row.endpoint,
        input_file_id=row.input_file_id,
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        status=row.status,
        errors=json.loads(row.errors or "[]"),
        metadata=None if row.user_metadata is None else json.loads(row.user_metadata),
        num_total=row.num_total,
        num_completed=row.num_completed,
        num_failed=row.num_failed,
        created_s=row.created_s,
        in_progress_s=row.in_progress_s,
        ended_s=row.ended_s,
        expires_s=row.expires_s,
    )
