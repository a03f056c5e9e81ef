"""The engine's process: say hello, build, loop, end. Started by driver/process.py; never imported by the client.

The process belongs to its parent: it ignores the terminal's signals, and it dies with the parent, however that dies.
"""

import ctypes
import faulthandler
import gc
import logging
import os
import pickle
import signal
import socket
import sys
import threading
from pathlib import Path

from pomona.core.errors import EngineUnavailableError, PomonaError
from pomona.driver.channel import EngineChannel
from pomona.driver.config import LOG_FORMAT
from pomona.driver.loop import EngineBuilder, EngineLoop, EngineParts
from pomona.driver.messages import Begin, Ended, Hello, Ready, Starting, pack_error
from pomona.driver.process import ChildConfig

_LOGGER = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_BEGIN_LIMIT_S = 60.0
"""A parent that has not answered Hello for this long never will."""


def main(directory: str, parent_pid: int, life_fd: int, channel_fd: int) -> int:
    """Run one engine's life and return the exit status.

    Args:
        directory: private folder of the pickled config and builder; the parent removes it after Hello.
        parent_pid: process that started this one.
        life_fd: read end of a pipe whose write end only the parent holds.
        channel_fd: the engine's end of the channel.
    """
    _die_with_parent(parent_pid, life_fd)
    faulthandler.enable()
    with Path(directory, "config").open("rb") as file:
        config: ChildConfig = pickle.load(file)
    logging.basicConfig(level=config.log_level, format=LOG_FORMAT)
    builder_pickle = Path(directory, "builder").read_bytes()
    channel = EngineChannel(socket.socket(fileno=channel_fd))
    try:
        return _live(channel, builder_pickle, config.num_staging_threads)
    finally:
        channel.close()


def _live(channel: EngineChannel, builder_pickle: bytes, num_staging_threads: int) -> int:
    channel.tell(Hello())
    begin = channel.receive(_BEGIN_LIMIT_S)
    if not begin or not isinstance(begin[0], Begin):
        return 1
    parts = _build(channel, builder_pickle)
    if parts is None:
        return 1
    # The model's objects live as long as the process: no collection need ever look at them again.
    gc.collect()
    gc.freeze()
    loop = EngineLoop(parts, channel, num_staging_threads)
    channel.tell(Ready(parts.info))
    error = loop.run()
    channel.tell(Ended(None if error is None else pack_error(error)))
    parts.close()
    loop.close()
    return 0 if error is None else 1


def _build(channel: EngineChannel, builder_pickle: bytes) -> EngineParts | None:
    """Build the engine, or tell the client why not."""
    try:
        build: EngineBuilder = pickle.loads(builder_pickle)
        return build(lambda progress: channel.tell(Starting(progress)))
    except PomonaError as error:
        channel.tell(Ended(pack_error(error)))
    except Exception as error:
        _LOGGER.exception("The engine could not be built")
        text = f"the engine could not be built: {type(error).__name__}: {error}"
        channel.tell(Ended(pack_error(EngineUnavailableError(text))))
    return None


def _die_with_parent(parent_pid: int, life_fd: int) -> None:
    """Two nets: the kernel's death signal (Linux; works while Python is stuck in a C call), and the pipe's end."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_NAME, b"pomona-engine")
    if os.getppid() != parent_pid:
        os._exit(1)
    threading.Thread(target=_wait_for_end_of, args=(life_fd,), name="pomona-parent-watch", daemon=True).start()


def _wait_for_end_of(life_fd: int) -> None:
    os.read(life_fd, 1)
    os._exit(1)
