"""``pomona bench serve``: the load generator of ``pomona.bench`` with a progress bar, on a server that runs or on one
started for the purpose.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import httpx
from rich.console import Console

from pomona.bench.config import ServeBenchConfig
from pomona.bench.report import to_json_lines
from pomona.bench.serve import serve_bench
from pomona.bench.table import ProgressBar, render_table
from pomona.core.errors import ConfigError
from pomona.workload.lengths import FixedLength, Lengths, UniformLength

_START_LIMIT_S = 600.0
_OPTIONS = {
    "adapters": "--adapter",
    "base_url": "--url",
    "output_file": "--output",
    "popularities": "--popularity",
    "request_rate_per_s": "--rate",
    "tpot_s": "--slo-tpot-ms, in seconds,",
    "ttft_s": "--slo-ttft-ms, in seconds,",
}
"""Of the command, where they have other names than what they set."""


@contextlib.contextmanager
def options_named() -> Iterator[None]:
    """Errors in the block name the command's options: what they set is named otherwise within."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        name = text.split(maxsplit=1)[0].rstrip(":")
        if name not in _OPTIONS:
            raise
        raise ConfigError(_OPTIONS[name] + text.removeprefix(name)) from error


def run_bench(config: ServeBenchConfig) -> None:
    """Load the server, print the table to stderr and one JSON line per popularity to stdout."""
    with ProgressBar() as bar:
        report = serve_bench(config, bar)
    Console(stderr=True).print(render_table(report))
    for line in to_json_lines(report):
        sys.stdout.write(line + "\n")


def read_lengths(flag: str, text: str) -> Lengths:
    """``128`` is a fixed length, ``64-256`` a uniform one.

    Raises:
        ConfigError: neither, or out of range.
    """
    low, separator, high = text.partition("-")
    if not low.isdigit() or (separator and not high.isdigit()):
        raise ConfigError(f"{flag} {text!r}: must be a number of tokens such as 128, or a range such as 64-256")
    try:
        return UniformLength(int(low), int(high)) if separator else FixedLength(int(low))
    except ConfigError as error:
        raise ConfigError(f"{flag} {text!r}: {error}") from error


@contextlib.contextmanager
def spawned_server(arguments: Sequence[str], api_key: str | None = None) -> Iterator[str]:
    """Run ``pomona serve`` in a process of its own; yield its address once it is ready. SIGTERM is as Ctrl-C meanwhile:
    it would leave the server behind.

    Args:
        arguments: of the command.
        api_key: what it shall ask for.

    Raises:
        ConfigError: it ended, or was not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "pomona", "serve", *arguments, "--port", str(port)]
    # By environment: other users of the machine can read command lines.
    environment = os.environ | ({} if api_key is None else {"POMONA_API_KEY": api_key})
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = subprocess.Popen(command, env=environment)
    try:
        _wait_until_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        signal.signal(signal.SIGTERM, before)


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    give_up_s = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < give_up_s:
        if process.poll() is not None:
            raise ConfigError(f"the server that --spawn started ended with exit code {process.returncode}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=5.0, trust_env=False).status_code == 200:
                return
        time.sleep(0.1)
    raise ConfigError(f"the server that --spawn started was not ready within {_START_LIMIT_S:g} s")
