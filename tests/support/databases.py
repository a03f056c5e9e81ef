"""Databases for tests: a SQLite file, and a PostgreSQL server of our own, both real.

PostgreSQL comes from the Debian package: installed if we may, started in a temporary folder on a free port, under a
system user, because it refuses to run as root.
"""

import contextlib
import functools
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg
import pytest

_START_LIMIT_S = 60.0


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return None if on_path is None else Path(on_path).resolve().parent


@functools.cache
def postgresql_binaries() -> Path:
    """The folder of PostgreSQL's programs, installed if need be; skips the test if there is no way."""
    found = _binaries()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "install", "-y", "--no-install-recommends", "postgresql"]
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(command, check=True, capture_output=True, timeout=240, env=environment)
        found = _binaries()
    if found is None:
        pytest.skip("PostgreSQL is not installed and cannot be: install the package 'postgresql'")
    return found


class PostgresServer:
    """A PostgreSQL server in a temporary folder."""

    def __init__(self) -> None:
        self._bin = postgresql_binaries()
        self._folder = Path(tempfile.mkdtemp(prefix="pomona-postgresql-"))
        self._user = None if os.geteuid() else ("postgres" if _has_user("postgres") else "nobody")
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._run("initdb", "--auth=trust", "--username=postgres", "--no-sync", "-D", str(self._data))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _command(self, program: str, *arguments: str) -> Sequence[str]:
        prefix = [] if self._user is None else ["setpriv", f"--reuid={self._user}", "--clear-groups"]
        return [*prefix, str(self._bin / program), *arguments]

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            self._command(program, *arguments), capture_output=True, text=True, timeout=_START_LIMIT_S, cwd="/"
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        """Start, also after ``stop``; returns when it answers."""
        settings = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder} -c fsync=off"
        )
        log = str(self._folder / "log")
        self._run("pg_ctl", "start", "-w", "-D", str(self._data), "-l", log, "-o", settings)

    def stop(self) -> None:
        """Stop at once, as a crash would."""
        self._run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", str(self._data))

    def create_database(self, template: str = "template1") -> str:
        """Make a database that is empty, or has what another one has to which nobody is connected; returns its URL."""
        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')  # type: ignore[arg-type,unused-ignore]
        return self.url(name)

    def url(self, name: str) -> str:
        """The URL of one of its databases."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def close(self) -> None:
        """Stop and remove everything."""
        with contextlib.suppress(AssertionError):
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


def _has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


@contextlib.contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Run a PostgreSQL server until the block ends."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


def wait_for(condition: "object", what: str, limit_s: float = 30.0) -> None:
    """Wait until a callable returns something true."""
    give_up_s = time.monotonic() + limit_s
    assert callable(condition)
    while not condition():
        assert time.monotonic() < give_up_s, f"{what}: not within {limit_s} s"
        time.sleep(0.02)
