"""A server for benchmarks: ``pomona serve`` in a process of its own, on a model with adapters, and requests for it."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks import assets, meter, workload
from benchmarks.results import ROOT
from benchmarks.shapes import SHAPES
from pomona.bench.prompts import WORDS, completion_body
from pomona.cli.config import BUNDLED_MODEL
from pomona.cli.hub import bundled_dir
from pomona.text.tokenizer import Tokenizer
from pomona.workload.popularity import GROUP_COUNTS

START_LIMIT_S = 300.0
BUNDLED = "bundled"


@dataclass(frozen=True, slots=True)
class ServedFiles:
    """A model and its adapters on disk."""

    name: str
    model: Path
    adapters: tuple[Path, ...]

    @classmethod
    def of(cls, name: str) -> "ServedFiles":
        """The bundled model with its adapters, or a shape with random weights and its rank-16 adapters."""
        if name == BUNDLED:
            return cls(name, bundled_dir() / BUNDLED_MODEL, tuple(sorted((bundled_dir() / "adapters").iterdir())))
        assets.make(SHAPES[name])
        root = workload.cache_dir() / name
        return cls(
            name,
            root / "model",
            tuple(root / "adapters" / workload.adapter_name(index) for index in range(workload.NUM_ADAPTERS)),
        )

    def bodies(self, popularity: str, num_streams: int, num_tokens: tuple[int, int], seed: str) -> list[bytes]:
        """Requests of a run: ``num_tokens`` are (prompt, output); the same seed gives the same."""
        counts = (num_streams,) if popularity == "base" else GROUP_COUNTS[popularity](num_streams)  # type: ignore[index]
        names = [self.name] if popularity == "base" else [path.name for path in self.adapters]
        wanted = [names[index % len(names)] for index, count in enumerate(counts) for _ in range(count)]
        rng = random.Random(seed)
        rng.shuffle(wanted)
        token_ids = sorted(set(Tokenizer.load(self.model).encode(WORDS)[1:]))
        # Control tokens stay in the text, so that each token is an event.
        options: dict[str, object] = {"temperature": 0, "ignore_eos": True, "skip_special_tokens": False}
        return [
            completion_body(name, rng.choices(token_ids, k=num_tokens[0]), num_tokens[1], **options) for name in wanted
        ]


@dataclass(frozen=True, slots=True)
class CpuMark:
    """CPU seconds so far."""

    server_s: float
    engine_s: float


@dataclass
class Server:
    """A running server."""

    url: str
    pid: int
    stamps: Path
    """Filled when it ends."""

    def cpu(self) -> CpuMark:
        """CPU time so far of the server's process, and of everything below it."""
        return CpuMark(meter.process_cpu_s(self.pid), meter.tree_cpu_s(self.pid) - meter.process_cpu_s(self.pid))


@contextlib.contextmanager
def running_server(files: ServedFiles, settings: dict[str, Any]) -> Iterator[Server]:
    """Serve a model with its adapters; ended, with its stamps written, on the way out.

    Raises:
        RuntimeError: it ended, or was not ready in time.
    """
    adapters = [f"{path.name}={path}" for path in files.adapters]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        stamps = Path(folder) / "stamps.json"
        own = {"port": port, "adapter": adapters, "served_model_name": files.name, "log_level": "warning"}
        text = json.dumps({**own, **settings})
        command = [sys.executable, "-m", "benchmarks.stamped_server", str(stamps), str(files.model), text]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        log = Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
        try:
            server = Server(f"http://127.0.0.1:{port}", process.pid, stamps)
            _wait_until_ready(server.url, process, log)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    give_up_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < give_up_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}: {log.read_text()[-2000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=5.0).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("the server was not ready in time")
