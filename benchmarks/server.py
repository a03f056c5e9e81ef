"""What HTTP, text and processes add to the engine: many concurrent streams, seen by the client and by the engine.

    python -m benchmarks.server                             # 256 streams of 64 tokens on the 135M shape
    python -m benchmarks.server --quick                     # 8 streams of a tiny model, to see that it works

The engine notes when each step ended, the client when each token arrived; both clocks are the same. CPU time per token
is that of the server's process, the engine's own apart. Linux.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from benchmarks import assets, meter, results, workload
from benchmarks.results import ROOT
from benchmarks.shapes import SHAPES, ModelShape
from pomona.bench.config import ServeBenchConfig
from pomona.bench.percentiles import Percentiles
from pomona.bench.report import RunReport
from pomona.bench.serve import serve_bench
from pomona.workload.lengths import FixedLength

START_LIMIT_S = 300.0


@dataclass
class Server:
    """A running server."""

    url: str
    pid: int
    stamps: Path
    """Filled when it ends."""

    def cpu_ticks(self) -> tuple[int, int]:
        """CPU time so far of (the server's process, everything below it)."""
        own = meter.process_ticks(self.pid)
        return own, meter.tree_ticks(self.pid) - own


@contextlib.contextmanager
def running_server(shape: ModelShape, settings: dict[str, Any]) -> Iterator[Server]:
    """Serve a shape with its rank-16 adapters; ended, with its stamps written, on the way out.

    Raises:
        RuntimeError: it ended, or was not ready in time.
    """
    root = workload.cache_dir() / shape.name
    names = [workload.adapter_name(index) for index in range(workload.NUM_ADAPTERS)]
    adapters = [f"{name}={root / 'adapters' / name}" for name in names]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        stamps = Path(folder) / "stamps.json"
        text = json.dumps({"port": port, "adapter": adapters, "log_level": "warning", **settings})
        command = [sys.executable, "-m", "benchmarks.stamped_server", str(stamps), str(root / "model"), text]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
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


def gaps(token_times_s: Iterable[Sequence[float]]) -> Percentiles:
    """ITL, pooled over all tokens of all requests."""
    found = Percentiles.of(later - earlier for times in token_times_s for earlier, later in itertools.pairwise(times))
    assert found is not None
    return found


def load(server: Server, popularity: str, arguments: argparse.Namespace) -> RunReport:
    """Offer the streams, all at once."""
    config = ServeBenchConfig(
        base_url=server.url,
        popularities=(popularity,),
        num_requests=arguments.streams,
        group_size=32,
        prompt_lengths=FixedLength(arguments.prompt_tokens),
        output_lengths=FixedLength(arguments.output_tokens),
        num_warmup_requests=0,
        seed=arguments.seed,
    )
    return serve_bench(config).runs[0]


def row_of(run: RunReport, engine_times_s: list[list[float]], ticks: tuple[int, int]) -> dict[str, Any]:
    """Client's and engine's view of one run."""
    summary = run.summary
    client = gaps([record.token_times_s for record in run.records])
    engine = gaps(engine_times_s)
    tokens = summary.num_output_tokens
    tick_us = 1e6 / os.sysconf("SC_CLK_TCK")
    return {
        "kind": "server",
        "popularity": summary.popularity,
        "num_streams": summary.num_requests,
        "num_errors": sum(count for _, count, _ in summary.errors),
        "num_output_tokens": tokens,
        "output_tokens_per_s": summary.output_tokens_per_s,
        "client_itl_ms": {name: 1e3 * value for name, value in asdict(client).items()},
        "engine_itl_ms": {name: 1e3 * value for name, value in asdict(engine).items()},
        "itl_p99_ratio": client.p99 / engine.p99,
        "server_cpu_us_per_token": ticks[0] * tick_us / tokens,
        "engine_cpu_us_per_token": ticks[1] * tick_us / tokens,
        "client_cpu_us_per_event": summary.client_cpu_us_per_event,
    }


def measure(shape: ModelShape, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per popularity and repetition, once the server has ended and the engine's stamps are known."""
    settings = {"max_num_seqs": max(256, arguments.streams), "max_model_len": 1024}
    if arguments.num_threads:
        settings["num_threads"] = arguments.num_threads
    runs: list[tuple[RunReport, tuple[float, float], tuple[int, int], meter.Disturbance]] = []
    with running_server(shape, settings) as server:
        for popularity in arguments.popularity:
            load(server, popularity, arguments)  # adapters become resident, code is warm
        for _ in range(arguments.repeats):
            for popularity in arguments.popularity:
                if not arguments.accept_noise:
                    meter.wait_until_quiet()
                before, start_s = server.cpu_ticks(), time.monotonic()
                with meter.Meter() as clock:
                    run = load(server, popularity, arguments)
                after = server.cpu_ticks()
                ticks = (after[0] - before[0], after[1] - before[1])
                runs.append((run, (start_s, time.monotonic()), ticks, clock.disturbance))
        url_stamps = server.stamps
        os.kill(server.pid, signal.SIGINT)
        give_up_s = time.monotonic() + 60.0
        while not url_stamps.exists() and time.monotonic() < give_up_s:
            time.sleep(0.1)
        time.sleep(0.5)
        stamps: list[list[float]] = json.loads(url_stamps.read_text())
    for run, (start_s, end_s), ticks, noise in runs:
        times_s = [times for times in stamps if start_s <= times[0] and times[-1] <= end_s]
        yield {**row_of(run, times_s, ticks), **asdict(noise), "is_clean": noise.is_clean, "settings": settings}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="repeatable; default: smollm2-135m")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--popularity", action="append", help="repeatable; default: base and zipf-1.5")
    parser.add_argument("--num-threads", type=int, default=None, help="of the engine; default: all cores")
    parser.add_argument("--seed", type=int, default=0)
    results.add_arguments(parser, "server", repeats=3)
    arguments = results.parse(parser, "server", words)
    arguments.popularity = arguments.popularity or ["base", "zipf-1.5"]
    if arguments.quick:
        arguments.streams, arguments.output_tokens = 8, 16
    console = Console(soft_wrap=True)
    for name in arguments.shape or ("smollm2-135m",):
        run_shape(SHAPES[name], arguments, console)


def run_shape(shape: ModelShape, arguments: argparse.Namespace, console: Console) -> None:
    """Serve a shape and write a row per run."""
    assets.make(shape)
    setup = results.setup(shape=shape.name, prompt_tokens=arguments.prompt_tokens)
    for row in measure(shape, arguments):
        results.append(arguments.output, {**setup, **row})
        console.print(
            f"{'ok ' if row['is_clean'] else 'BAD'} {shape.name} {row['num_streams']} streams {row['popularity']:9} "
            f"{row['output_tokens_per_s']:7.1f} tok/s, ITL p99 client {row['client_itl_ms']['p99']:.1f} ms, engine "
            f"{row['engine_itl_ms']['p99']:.1f} ms, server {row['server_cpu_us_per_token']:.0f} us per token",
            highlight=False,
        )


if __name__ == "__main__":
    main()
