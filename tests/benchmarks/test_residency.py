"""benchmarks.residency: memory of a server's processes is watched, also while there is no engine yet."""

import subprocess
import sys
import time

from benchmarks.residency import Watch


def test_a_process_without_children_is_watched_until_it_has_some():
    script = "import subprocess, sys; input(); subprocess.run([sys.executable, '-c', 'import sys; sys.stdin.read()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True) as process:
        watch = Watch(process.pid)
        try:
            wait_until(lambda: watch.server_bytes)
            assert watch.engine_bytes == 0
            process.stdin.write("\n")
            process.stdin.flush()
            wait_until(lambda: watch.engine_bytes)
        finally:
            watch.close()


def wait_until(is_so) -> None:
    deadline_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
