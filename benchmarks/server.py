"""What HTTP, text and processes add to the engine: many concurrent streams, seen by the client and by the engine.

    python -m benchmarks.server                  # 256 streams on the bundled model and on the 135M shape: 5 minutes
    python -m benchmarks.server --quick          # 8 streams of a tiny model, to see that it works

The engine's process notes when each token's step ended, the client when it read the token; both clocks are the same.
ITL is over tokens: those that come in one event have no gap between them. CPU time per token is that of the steady
part, in which every stream is under way; what is left of the whole is the requests' own. Linux.
"""

import argparse
import itertools
import json
import os
import signal
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import meter, results, stream_client
from benchmarks.served import BUNDLED, CpuMark, ServedFiles, Server, running_server
from benchmarks.shapes import SHAPES
from benchmarks.stream_client import LoadRecord, StreamRecord
from pomona.bench.percentiles import Percentiles
from pomona.workload.popularity import GROUP_COUNTS

WARM_UP_TOKENS = 8
STAMPS_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Run:
    """One load."""

    popularity: str
    load: LoadRecord[CpuMark]
    cpu: CpuMark
    """Of the whole run."""
    wall_s: float
    noise: meter.Disturbance


@dataclass(frozen=True, slots=True)
class EngineStamps:
    """What the engine's process noted."""

    tokens: dict[str, list[float]]
    """Request id -> when the step of each of its tokens ended."""
    steps: list[tuple[float, float]]
    """When each step ended, and CPU seconds of the loop's thread so far, model apart."""

    @classmethod
    def read(cls, path: Path) -> "EngineStamps":
        """Read what StampedEngine saved."""
        found = json.loads(path.read_text())
        return cls(found["tokens"], [(end_s, cpu_s) for end_s, cpu_s in found["steps"]])

    def of(self, stream: StreamRecord) -> list[float]:
        """Token times of one stream's only choice."""
        return self.tokens[f"cmpl-{stream.request_id}-0"]

    def host_cpu_s(self, first_s: float, last_s: float) -> float:
        """CPU seconds of the loop's thread, model apart, of the steps that ended in a span of time."""
        ends, cpu_s = zip(*self.steps, strict=True)
        num_before, num_until = bisect_right(ends, first_s), bisect_right(ends, last_s)
        assert num_before, "a stream that has begun has had a step"
        return float(cpu_s[num_until - 1] - cpu_s[num_before - 1])


def gaps(times_s: Sequence[float], num_tokens: int) -> Iterator[float]:
    """Gaps between a stream's tokens, which came at these times; none between those that came together."""
    yield from (later - earlier for earlier, later in itertools.pairwise(times_s))
    yield from itertools.repeat(0.0, num_tokens - len(times_s))


def _ms(samples_s: Iterable[float]) -> dict[str, float]:
    found = Percentiles.of(samples_s)
    assert found is not None
    values = asdict(found)
    return {"num_samples": values.pop("num_samples"), **{name: 1e3 * value for name, value in values.items()}}


def row_of(run: Run, stamps: EngineStamps) -> dict[str, Any]:
    """Client's and engine's view of one run."""
    streams, (begin, end), (begin_s, end_s) = run.load.streams, run.load.steady, run.load.steady_s
    num_tokens = sum(stream.num_output_tokens for stream in streams)
    num_events = sum(len(stream.token_times_s) for stream in streams)
    steady_events = sum(begin_s < time_s <= end_s for stream in streams for time_s in stream.token_times_s)
    steady_tokens = max(1.0, steady_events * num_tokens / num_events)
    server_us = 1e6 * (end.server_s - begin.server_s) / steady_tokens
    one_by_one = [stream for stream in streams if len(stream.token_times_s) == stream.num_output_tokens]
    delays_s = (
        seen_s - made_s
        for stream in one_by_one
        for made_s, seen_s in zip(stamps.of(stream), stream.token_times_s, strict=True)
    )
    client = _ms(gap for stream in streams for gap in gaps(stream.token_times_s, stream.num_output_tokens))
    engine = _ms(gap for stream in streams for gap in gaps(stamps.of(stream), stream.num_output_tokens))
    return {
        "kind": "server",
        "popularity": run.popularity,
        "num_streams": len(streams),
        "num_output_tokens": num_tokens,
        "output_tokens_per_s": num_tokens / run.wall_s,
        "events_per_token": num_events / num_tokens,
        "client_itl_ms": client,
        "engine_itl_ms": engine,
        "itl_p99_ratio": client["p99"] / engine["p99"],
        "delivery_ms": _ms(delays_s) if one_by_one else None,
        "server_cpu_us_per_token": server_us,
        "server_cpu_us_per_request": (1e6 * run.cpu.server_s - server_us * num_tokens) / len(streams),
        "engine_cpu_us_per_token": 1e6 * (end.engine_s - begin.engine_s) / steady_tokens,
        "engine_host_cpu_us_per_token": 1e6 * stamps.host_cpu_s(begin_s, end_s) / steady_tokens,
        "client_cpu_us_per_event": 1e6 * run.load.client_cpu_s / num_events,
    }


def run_load(server: Server, bodies: list[bytes], popularity: str) -> Run:
    """Offer the streams, all at once."""
    with meter.Meter() as clock:
        before = server.cpu()
        load = stream_client.load(server.url, bodies, server.cpu)
        after = server.cpu()
    cpu = CpuMark(after.server_s - before.server_s, after.engine_s - before.engine_s)
    return Run(popularity, load, cpu, load.wall_s, clock.disturbance)


def measure(files: ServedFiles, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per popularity and repetition, once the server has ended and the engine's stamps are known."""
    settings: dict[str, Any] = {"max_num_seqs": max(256, arguments.streams), "max_model_len": 1024}
    if arguments.num_threads:
        settings["num_threads"] = arguments.num_threads
    runs: list[Run] = []

    def bodies(popularity: str, num_output_tokens: int, seed: str) -> list[bytes]:
        return files.bodies(popularity, arguments.streams, (arguments.prompt_tokens, num_output_tokens), seed)

    with running_server(files, settings) as server:
        for popularity in arguments.popularity:  # adapters become resident, code is warm
            run_load(server, bodies(popularity, WARM_UP_TOKENS, "warm-up"), popularity)
        for repetition, popularity in itertools.product(range(arguments.repeats), arguments.popularity):
            prepared = bodies(popularity, arguments.output_tokens, f"{arguments.seed}/{repetition}")
            if not arguments.accept_noise:
                meter.wait_until_quiet()
            runs.append(run_load(server, prepared, popularity))
        stamps = _final_stamps(server)
    for run in runs:
        noise = {**asdict(run.noise), "is_clean": run.noise.is_clean}
        yield {**row_of(run, stamps), **noise, "settings": settings}


def _final_stamps(server: Server) -> EngineStamps:
    """End the server, and read what its engine noted."""
    os.kill(server.pid, signal.SIGINT)
    give_up_s = time.monotonic() + STAMPS_LIMIT_S
    while not server.stamps.exists() and time.monotonic() < give_up_s:
        time.sleep(0.1)
    return EngineStamps.read(server.stamps)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=[BUNDLED, *SHAPES], action="append", help="repeatable; default: bundled and smollm2-135m"
    )
    parser.add_argument("--streams", type=results.positive, default=256)
    parser.add_argument("--prompt-tokens", type=results.positive, default=16)
    parser.add_argument("--output-tokens", type=results.positive, default=48)
    parser.add_argument(
        "--popularity", choices=("base", *GROUP_COUNTS), action="append", help="repeatable; default: base and zipf-1.5"
    )
    parser.add_argument("--num-threads", type=results.positive, default=None, help="of the engine; default: all cores")
    parser.add_argument("--seed", type=int, default=0)
    results.add_arguments(parser, "server", repeats=3)
    arguments = results.parse(parser, "server", words)
    arguments.popularity = arguments.popularity or ["base", "zipf-1.5"]
    if arguments.quick:
        arguments.streams, arguments.output_tokens = 8, 16
    for name in arguments.shape or [BUNDLED, "smollm2-135m"]:
        setup = results.setup(shape=name, prompt_tokens=arguments.prompt_tokens)
        for row in measure(ServedFiles.of(name), arguments):
            results.append(arguments.output, {**setup, **row})
            _show(name, row)


def _show(name: str, row: dict[str, Any]) -> None:
    Console(soft_wrap=True).print(
        f"{'ok ' if row['is_clean'] else 'BAD'} {name} {row['num_streams']} streams {row['popularity']:9} "
        f"{row['output_tokens_per_s']:7.1f} tok/s, {row['events_per_token']:.2f} events per token, ITL p99 client "
        f"{row['client_itl_ms']['p99']:.1f} ms, engine {row['engine_itl_ms']['p99']:.1f} ms; CPU per token: server "
        f"{row['server_cpu_us_per_token']:.1f} us, engine's host part {row['engine_host_cpu_us_per_token']:.1f} us",
        highlight=False,
    )


if __name__ == "__main__":
    main()
