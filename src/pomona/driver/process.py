"""The engine's process as its parent holds it: start, look whether it lives, kill, reap.

A plain subprocess rather than multiprocessing: the caller's main module is not run again in the child, and no resource
tracker process stays behind. Shared are files in a private directory, a pipe and a socket; no memory.
"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pomona.core.errors import ConfigError, EngineUnavailableError
from pomona.driver.loop import EngineBuilder

# Signals first: the terminal sends Ctrl-C to every process of the foreground group, but the parent decides when the
# engine ends; they are blocked until they are ignored. The parent's module search path next, so that whatever the
# builder refers to is found.
_BOOT = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
import pickle, sys
directory, *numbers = sys.argv[1:]
with open(directory + "/path", "rb") as file:
    sys.path[:] = pickle.load(file)
from pomona.driver.child import main
sys.exit(main(directory, *map(int, numbers)))
"""


@dataclass(frozen=True, slots=True)
class ChildConfig:
    """What the engine's process needs of DriverConfig, and of its parent."""

    num_staging_threads: int
    log_level: int
    """Least severe log to print."""


class EngineProcess:
    """One child process with its private directory."""

    def __init__(self) -> None:
        """Nothing is started yet."""
        self._directory: str | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._life_fd = -1

    @property
    def pid(self) -> int:
        """Of the child; 0 before ``start``."""
        return 0 if self._popen is None else self._popen.pid

    def start(self, build: EngineBuilder, config: ChildConfig, channel_fd: int) -> None:
        """Start the child. Call it on a thread that lives as long as the engine shall: the kernel's death signal fires
        when the *thread* that started a process ends.

        Args:
            build: made into the engine there.
            config: of the child.
            channel_fd: the engine's end of the channel; the caller closes its own copy.

        Raises:
            ConfigError: the builder cannot be pickled.
            EngineUnavailableError: the system refuses another process, or what that needs.
        """
        try:
            builder_pickle = pickle.dumps(build)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(f"build: cannot be sent to the engine's process: {error}") from error
        try:
            self._start(builder_pickle, config, channel_fd)
        except OSError as error:
            raise EngineUnavailableError(f"the engine's process could not be started: {error}") from error

    def _start(self, builder_pickle: bytes, config: ChildConfig, channel_fd: int) -> None:
        # Mode 0700, so that no other user of the machine can change what the child unpickles.
        self._directory = tempfile.mkdtemp(prefix="pomona-")
        for name, content in (
            ("path", pickle.dumps([entry or os.getcwd() for entry in sys.path])),
            ("config", pickle.dumps(config)),
            ("builder", builder_pickle),
        ):
            Path(self._directory, name).write_bytes(content)
        read_fd, self._life_fd = os.pipe()
        arguments = [sys.executable, "-P", "-c", _BOOT, self._directory, *map(str, (os.getpid(), read_fd, channel_fd))]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # a child inherits it
        try:
            self._popen = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, pass_fds=(read_fd, channel_fd))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(read_fd)

    def remove_directory(self) -> None:
        """Remove the directory. The child has read it by its Hello, so that nothing is left behind after that."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def is_running(self) -> bool:
        """True between ``start`` and the child's end."""
        return self._popen is not None and self._popen.poll() is None

    def end_text(self) -> str | None:
        """How the child ended, for people; None while it lives. Reaps it."""
        status = None if self._popen is None else self._popen.poll()
        if status is None:
            return None
        if status >= 0:
            return f"ended with exit status {status}"
        # Real-time signals have numbers, and only two of them names.
        name = next((one.name for one in signal.Signals if one == -status), f"signal {-status}")
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"

    def kill(self) -> None:
        """Make the child end at once; ``end_text`` tells when it has. May be called twice."""
        if self._popen is not None:
            self._popen.kill()

    def release(self) -> None:
        """Free what the child needed of this process: the pipe (whose end would kill it too) and the directory."""
        if self._life_fd >= 0:
            os.close(self._life_fd)
            self._life_fd = -1
        self.remove_directory()
