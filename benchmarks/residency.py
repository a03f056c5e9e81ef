"""Ten thousand adapters behind one server: start-up, memory against budgets, hits, waits, failures.

    python -m benchmarks.residency             # a minute or two
    python -m benchmarks.residency --quick     # 300 adapters, to see that it works

Adapters of the bundled model are made up, ranks 4 to 128: one weights file per rank, hard-linked, and a config of its
own each, so that every digest differs. Popularity is Zipf(0.92), as in Alibaba's GenAI trace of LoRA requests. The
server runs as users run it, in processes of its own; memory is what the kernel says is resident.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np

from benchmarks import results, tables
from benchmarks.results import Row, of_kind
from pomona.bench.percentiles import percentile

RANKS = (4, 8, 16, 32, 64, 128)
EXPONENT = 0.92
_MIB = 2**20
DEVICE_BYTES, KV_BYTES = 16 * _MIB, 32 * _MIB
_START_LIMIT_S = 120.0


def make_adapters(folder: Path, num_adapters: int) -> None:
    """Fill ``folder`` with adapters of the bundled model; adapter i has rank RANKS[i % 6]."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from pomona.cli.hub import bundled_dir

    for model in sorted((bundled_dir() / "adapters").iterdir()):
        with safe_open(model / "adapter_model.safetensors", "np") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in shapes):
            break
    config = json.loads((model / "adapter_config.json").read_text())
    generator = np.random.default_rng(1)
    for rank in RANKS:
        tensors = {}
        for name, (rows, columns) in shapes.items():
            shape = (rank, columns) if "lora_A" in name else (rows, rank)
            tensors[name] = (0.02 * generator.standard_normal(shape)).astype(np.float32)
        save_file(tensors, folder / f".rank-{rank}")
    for index in range(num_adapters):
        rank = RANKS[index % len(RANKS)]
        adapter = folder / f"adapter-{index:05}"
        adapter.mkdir()
        own = {
            **config,
            "r": rank,
            "lora_alpha": 2 * rank,
            "rank_pattern": {},
            "alpha_pattern": {},
            "revision": str(index),
        }
        (adapter / "adapter_config.json").write_text(json.dumps(own))
        (adapter / "adapter_model.safetensors").hardlink_to(folder / f".rank-{rank}")


def popular(num_adapters: int, num_requests: int) -> list[int]:
    """Which adapter each request names: Zipf(EXPONENT) over a shuffled order, seeded."""
    generator = np.random.default_rng(2)
    weights = np.arange(1, num_adapters + 1) ** -EXPONENT
    order = generator.permutation(num_adapters)
    return [int(order[index]) for index in generator.choice(num_adapters, num_requests, p=weights / weights.sum())]


class Watch:
    """Largest resident memory of a process and its children, looked at every 20 ms."""

    def __init__(self, pid: int) -> None:
        self.server_bytes = self.engine_bytes = 0
        self._pid = pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.wait(0.02):
            with contextlib.suppress(OSError, ValueError):
                children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
                self.server_bytes = max(self.server_bytes, resident_bytes(self._pid))
                self.engine_bytes = max((self.engine_bytes, *(resident_bytes(int(child)) for child in children)))

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()


def resident_bytes(pid: int) -> int:
    """Resident memory of one process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def server(arguments: Sequence[str], log: Path) -> Iterator[tuple[str, int, float]]:
    """Run ``pomona serve``; yields its URL, its process id, and the seconds until it was ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "pomona", "serve", *arguments, "--port", url.rpartition(":")[2]]
    began_s = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - began_s < _START_LIMIT_S, log.read_text()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                    break
            time.sleep(0.02)
        yield url, process.pid, time.monotonic() - began_s
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        finally:
            process.kill()


async def ask_all(url: str, asked: Sequence[int], concurrency: int) -> list[tuple[float, int]]:
    """Seconds to the answer of one token, and status, of every request."""
    waiting = iter(asked)
    answers: list[tuple[float, int]] = []

    async def work(client: httpx.AsyncClient) -> None:
        for index in waiting:
            began_s = time.monotonic()
            body = {"model": f"adapter-{index:05}", "prompt": "word", "max_tokens": 1, "temperature": 0}
            answer = await client.post(f"{url}/v1/completions", json=body)
            answers.append((time.monotonic() - began_s, answer.status_code))
            if answer.status_code != 200:
                print(answer.status_code, answer.text)

    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.gather(*(work(client) for _ in range(concurrency)))
    return answers


def metrics(url: str) -> dict[str, float]:
    """The server's metrics without labels."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return {
        name: float(value)
        for name, _, value in (line.partition(" ") for line in lines)
        if name.startswith("pomona_") and "{" not in name
    }


def measure(num_adapters: int, num_requests: int, budget_bytes: int, concurrency: int) -> Row:
    """One row."""
    with tempfile.TemporaryDirectory(prefix="pomona-residency-") as name:
        folder = Path(name)
        (folder / "few").mkdir()
        (folder / "many").mkdir()
        make_adapters(folder / "few", len(RANKS))
        make_adapters(folder / "many", num_adapters)
        common = [
            "--host-adapter-bytes",
            str(budget_bytes),
            "--adapter-bytes",
            str(DEVICE_BYTES),
            "--kv-cache-bytes",
            str(KV_BYTES),
        ]
        with server([*common, "--adapters-dir", str(folder / "few")], folder / "log") as (_, _, few_s):
            pass
        with server([*common, "--adapters-dir", str(folder / "many")], folder / "log") as (url, pid, many_s):
            warm = asyncio.run(ask_all(url, [0, 1], 1))
            watch = Watch(pid)
            time.sleep(0.2)
            before = (watch.server_bytes, watch.engine_bytes)
            began_s = time.monotonic()
            answers = asyncio.run(ask_all(url, popular(num_adapters, num_requests), concurrency))
            run_s = time.monotonic() - began_s
            watch.close()
            found = metrics(url)
    times_ms = sorted(1000 * seconds for seconds, _ in answers)
    return {
        "kind": "residency",
        "num_adapters": num_adapters,
        "num_requests": num_requests,
        "num_named": len(set(popular(num_adapters, num_requests))),
        "concurrency": concurrency,
        "num_failed": sum(status != 200 for _, status in (*answers, *warm)),
        "few_start_s": few_s,
        "start_s": many_s,
        "run_s": run_s,
        "budget_bytes": budget_bytes,
        "all_budgets_bytes": budget_bytes + DEVICE_BYTES + KV_BYTES,
        "host_bytes": found["pomona_adapter_host_bytes"],
        "server_before_bytes": before[0],
        "server_peak_bytes": watch.server_bytes,
        "engine_before_bytes": before[1],
        "engine_peak_bytes": watch.engine_bytes,
        "hits": found["pomona_adapter_hits_total"],
        "misses": found["pomona_adapter_misses_total"],
        "loads": found["pomona_adapter_stagings_total"],
        "evictions": found["pomona_adapter_host_evictions_total"],
        "load_ms": 1000 * found["pomona_adapter_staging_seconds_total"] / found["pomona_adapter_stagings_total"],
        "answer_ms": {
            "p50": statistics.median(times_ms),
            "p99": percentile(times_ms, 0.99),
            "max": times_ms[-1],
        },
    }


def sections(rows: Sequence[Row]) -> Iterator[str]:
    """The page's tables."""
    found = list(of_kind(rows, "residency"))
    if not found:
        return
    header = ["adapters", "requests", "named", "failed", "start, 6 adapters", "start, all", "requests/s"]
    yield "\n## Start-up and failures\n\n" + tables.table(
        header,
        [
            [
                f"{row['num_adapters']:,}",
                f"{row['num_requests']:,}",
                f"{row['num_named']:,}",
                str(row["num_failed"]),
                f"{row['few_start_s']:.2f} s",
                f"{row['start_s']:.2f} s",
                f"{row['num_requests'] / row['run_s']:.0f}",
            ]
            for row in found
        ],
    )
    header = [
        "host budget",
        "staged in the end",
        "engine before",
        "engine's peak",
        "growth",
        "host + device + KV budgets",
        "server's peak",
    ]
    yield "\n## Memory\n\nBefore: ready, two adapters used. MiB resident, as the kernel says.\n\n" + tables.table(
        header,
        [
            [
                f"{row['budget_bytes'] / _MIB:.0f}",
                f"{row['host_bytes'] / _MIB:.0f}",
                f"{row['engine_before_bytes'] / _MIB:.0f}",
                f"{row['engine_peak_bytes'] / _MIB:.0f}",
                f"{(row['engine_peak_bytes'] - row['engine_before_bytes']) / _MIB:.0f}",
                f"{row['all_budgets_bytes'] / _MIB:.0f}",
                f"{row['server_peak_bytes'] / _MIB:.0f}",
            ]
            for row in found
        ],
    )
    header = ["hits", "misses", "loads", "evictions", "one load", "answer p50", "p99", "longest"]
    yield "\n## Hits and waits\n\nOne load includes the wait for room. Answers have one token.\n\n"
    yield tables.table(
        header,
        [
            [
                f"{row['hits']:.0f}",
                f"{row['misses']:.0f}",
                f"{row['loads']:.0f}",
                f"{row['evictions']:.0f}",
                f"{row['load_ms']:.1f} ms",
                *(f"{row['answer_ms'][key]:.1f} ms" for key in ("p50", "p99", "max")),
            ]
            for row in found
        ],
    )


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser, "residency", repeats=None)
    parser.add_argument("--adapters", type=results.positive, default=10_000)
    parser.add_argument("--requests", type=results.positive, default=2_000)
    parser.add_argument("--budget-mib", type=results.positive, default=128)
    arguments = results.parse(parser, "residency", words)
    if arguments.quick:
        arguments.adapters, arguments.requests, arguments.budget_mib = 300, 60, 16
    setup = results.setup()
    row = measure(arguments.adapters, arguments.requests, arguments.budget_mib * _MIB, 16)
    print(json.dumps(row))
    results.append(arguments.output, {**setup, **row})


if __name__ == "__main__":
    main()
