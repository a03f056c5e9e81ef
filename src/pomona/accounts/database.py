"""The database: connections, transactions, migrations, and a few threads that wait for it instead of the event loop."""

import asyncio
import contextlib
import functools
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sqlalchemy
from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from pomona.accounts import clock
from pomona.accounts.tables import RevisionRow
from pomona.core.errors import ConfigError, DatabaseUnavailableError, InvalidRequestError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_NUM_THREADS = 4
_MAX_LONG = 2
"""Threads with work that may take long: the others stay for what requests wait for."""
_SQLITE_WAIT_S = 2.0
_POSTGRESQL_WAIT_S = 3
_ASK_LIMIT_S = 10.0
_MIGRATION_LOCK = 0x706F6D6F6E61
"""Any number that nobody else locks in this database."""
_MIGRATION_WAIT_MS = 60_000
_UNAVAILABLE = (
    sqlalchemy.exc.OperationalError,
    sqlalchemy.exc.InterfaceError,
    sqlalchemy.exc.TimeoutError,
    sqlalchemy.exc.InternalError,
    sqlalchemy.exc.ProgrammingError,  # such as tables that are missing while a backup is brought back
)


class Database:
    """One SQL database: SQLite or PostgreSQL. Methods may be called from any thread.

    Args:
        url: for SQLAlchemy, with the driver.

    Raises:
        ConfigError: the driver is not installed.
    """

    def __init__(self, url: str) -> None:
        self.is_sqlite = url.startswith("sqlite")
        if self.is_sqlite:
            options: dict[str, Any] = {"connect_args": {"timeout": _SQLITE_WAIT_S, "check_same_thread": False}}
        else:
            limits = f"-c statement_timeout={_POSTGRESQL_WAIT_S * 1000} -c lock_timeout={_POSTGRESQL_WAIT_S * 1000}"
            # The server's own limits do not help where nothing of it arrives any more: then the kernel gives up.
            connect = {
                "connect_timeout": _POSTGRESQL_WAIT_S,
                "tcp_user_timeout": _POSTGRESQL_WAIT_S * 1000,
                "keepalives_idle": _POSTGRESQL_WAIT_S,
                "keepalives_interval": 1,
                "options": limits,
            }
            options = {
                "connect_args": connect,
                "pool_size": _NUM_THREADS,
                "pool_pre_ping": True,
                "pool_timeout": _POSTGRESQL_WAIT_S,
            }
        try:
            self._engine = sqlalchemy.create_engine(url, **options)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"database_url: {error.name} is not installed: pip install 'pomona[postgresql]'"
            ) from error
        except sqlalchemy.exc.ArgumentError as error:
            raise ConfigError("database_url: not a database URL") from error
        if self.is_sqlite:
            _make_private(self._engine.url.database)
            event.listen(self._engine, "connect", _set_up_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="pomona-database")
        self._long = asyncio.Semaphore(_MAX_LONG)
        self.own_revisions: set[int] = set()
        """Revisions that this process has committed and not found in the database yet."""
        self.down_since_s: float | None = None
        """Monotonic time of the first failure since the last success; None while the database answers."""

    @property
    def down_s(self) -> float:
        """For how long the database has not answered; 0 while it does."""
        since_s = self.down_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def migrate(self) -> None:
        """Bring the tables to this version's form; processes that start together wait for each other.

        Raises:
            DatabaseUnavailableError: the database does not answer.
        """
        import alembic.command  # half a second, which servers without accounts need not wait
        import alembic.config

        config = alembic.config.Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self._connection(is_write=True) as connection:
            if self.is_sqlite:  # another process may be at it, for longer than other transactions take
                connection.connection.cursor().execute(f"PRAGMA busy_timeout = {_MIGRATION_WAIT_MS}")
            with connection.begin():
                if not self.is_sqlite:
                    _lock_migration(connection)
                config.attributes["connection"] = connection
                alembic.command.upgrade(config, "head")
            connection.invalidate()  # no other transaction waits so long

    @contextlib.contextmanager
    def read(self, *, is_report: bool = False) -> Iterator[Connection]:
        """Open a transaction that only reads.

        Args:
            is_report: it may read so much that it takes too long, which does not tell that the database is down.

        Raises:
            DatabaseUnavailableError: the database does not answer.
        """
        with self._connection(is_write=False, is_report=is_report) as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a transaction; it is committed at the end of the block, or rolled back if the block raises.

        Raises:
            DatabaseUnavailableError: the database does not answer; nothing was changed.
        """
        with self._connection(is_write=True) as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def session(self, *, is_write: bool = False, is_change: bool = False) -> Iterator[Session]:
        """Open a transaction on the models.

        Args:
            is_write: it may change something.
            is_change: it changes what processes keep in their caches: they will look again. Such transactions come
                one after the other, so that each finds what those before it have left.
        """
        revision: int | None = None
        with self.write() if is_write or is_change else self.read() as connection:
            if is_change:  # first: on PostgreSQL the next one waits here until this one has ended
                count = sqlalchemy.update(RevisionRow).values(value=RevisionRow.value + 1).returning(RevisionRow.value)
                revision = connection.execute(count).scalar_one()
            with Session(connection, join_transaction_mode="rollback_only", expire_on_commit=False) as session:
                yield session
                session.flush()
        if revision is not None:
            self.own_revisions.add(revision)

    async def run(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Run blocking work in a thread. A caller that is cancelled does not stop it."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(work, *args, **kwargs))

    async def run_long(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """``run`` for what may take long, such as reports and large files: it leaves threads for everything else."""
        async with self._long:
            return await self.run(work, *args, **kwargs)

    async def ask(
        self, work: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """``run`` for what requests wait for: not for long, and not at all while the database is known to be down.

        Raises:
            DatabaseUnavailableError: it does not answer.
        """
        if self.down_since_s is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ASK_LIMIT_S):
                    return await self.run(work, *args, **kwargs)
            self.down_since_s = time.monotonic()
        raise DatabaseUnavailableError("the accounts database does not answer")

    def now_s(self, connection: Connection | Session) -> float:
        """Return Unix time as all processes that share the database see it: their own clocks may differ."""
        if self.is_sqlite:  # they are on one machine
            return clock.now_s()
        return float(connection.execute(sqlalchemy.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def revision(self) -> int:
        """Return how often identities, limits, prices and shares have been changed."""
        with self.read() as connection:
            return int(connection.execute(sqlalchemy.select(RevisionRow.value)).scalar_one())

    def close(self) -> None:
        """Wait for what is under way and close all connections."""
        self._threads.shutdown()
        self._engine.dispose()

    @contextlib.contextmanager
    def _connection(self, *, is_write: bool, is_report: bool = False) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection.execution_options(pomona_write=is_write)
        except (sqlalchemy.exc.DataError, UnicodeEncodeError, OverflowError) as error:
            raise InvalidRequestError("request", "The request names something that no name can be.") from error
        except _UNAVAILABLE as error:
            if self.down_since_s is None and not is_report:
                self.down_since_s = time.monotonic()
            raise DatabaseUnavailableError(_reason(error)) from error
        self.down_since_s = None


def _make_private(path: str | None) -> None:
    """Make a new file of SQLite one that nobody else may read; its log takes the same mode. It has tenants' secrets."""
    if path and path != ":memory:" and not path.startswith("file:"):
        with contextlib.suppress(OSError):  # connecting says why
            Path(path).touch(mode=0o600)


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # transactions are begun by ``_begin_sqlite``, not by the driver
    _use_write_ahead_log(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    # While another connection makes the same change of a new file, SQLite refuses at once: its wait is for others.
    give_up_s = time.monotonic() + _SQLITE_WAIT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_s:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later could fail in between; one that says so at once only waits.
    is_write = connection.get_execution_options().get("pomona_write", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


def _reason(error: Exception) -> str:
    """Say what happened, without the statement, its parameters or the URL."""
    origin = getattr(error, "orig", None) or error
    first_line = str(origin).strip().partition("\n")[0]
    return f"the accounts database does not answer: {type(origin).__name__}: {first_line}"


def _lock_migration(connection: Connection) -> None:
    # Neither those who wait nor the one that moves a large ledger have the limits of other statements.
    for statement in ("SET LOCAL statement_timeout = 0", "SET LOCAL lock_timeout = 0"):
        connection.execute(sqlalchemy.text(statement))
    connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
    connection.execute(sqlalchemy.text("SET LOCAL lock_timeout TO DEFAULT"))
