"""Where ``pomona`` and ``python -m pomona`` begin. The command line is in cli/main.py; what is here is ready before it
is imported: Ctrl-C and SIGTERM end a command from its first moment on, without a traceback.
"""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line. SIGTERM unwinds like Ctrl-C, so that nothing is left behind; without a handler it would not
    end the first process of a container at all."""
    signal.signal(signal.SIGTERM, _exit)
    _open_standard_files()
    try:
        from pomona.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _open_standard_files() -> None:
    """Where whoever started this has closed them, sockets would get their numbers, and libuv aborts over those."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            file = open(os.devnull, mode)  # noqa: SIM115
            os.set_inheritable(file.fileno(), True)  # so that the engine's process has it, too
            setattr(sys, name, file)


def _exit(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
