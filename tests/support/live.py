"""``pomona serve`` as a stranger runs it: a process of its own, reached over HTTP."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

_START_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A running server."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert values, f"no metric {name}"
        return sum(values)

    def wait_until(self, name: str, value: float, limit_s: float = 60.0) -> None:
        """Wait for a metric to take a value."""
        give_up_s = time.monotonic() + limit_s
        while self.metric(name) != value:
            assert time.monotonic() < give_up_s, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.05)

    def engine_pid(self) -> int:
        """Process id of the engine: the server's only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        assert len(children) == 1, children
        return int(children[0])


@contextlib.contextmanager
def live_server(arguments: Sequence[str], log: Path) -> Iterator[LiveServer]:
    """Run ``pomona serve`` with these arguments until the block ends; it must then stop by itself and cleanly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pomona", "serve", *arguments, "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    server = LiveServer(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_ready(server)
        yield server
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(server: LiveServer) -> None:
    give_up_s = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < give_up_s:
        assert server.process.poll() is None, server.log.read_text()
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"not ready within {_START_LIMIT_S} s:\n{server.log.read_text()}")
