"""Where ``pomona`` and ``python -m pomona`` begin. The command line is in cli/main.py; what is here is ready before it
is imported: Ctrl-C and SIGTERM end a command from its first moment on, without a traceback.
"""

import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line. SIGTERM unwinds like Ctrl-C, so that nothing is left behind; without a handler it would not
    end the first process of a container at all."""
    signal.signal(signal.SIGTERM, _exit)
    try:
        from pomona.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _exit(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
