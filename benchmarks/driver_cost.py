"""CPU time per streamed token of the transport between server and engine process, on both sides (Linux).

    PYTHONPATH=src:tests python benchmarks/driver_cost.py [--step-ms 4] [--uvloop]

The executor only sleeps, so each step is one message. The engine's side is the engine process's CPU time less that of
the same engine stepped here without any transport. The last line of output is JSON.
"""

import argparse
import asyncio
import json
import os
import time
from pathlib import Path

import uvloop

from pomona.core.request import Request
from pomona.driver.client import ProcessClient
from pomona.driver.session import RequestStream
from support.driver import TinyBuilder, make_request

_NUM_TOKENS = {1: 600, 32: 300, 256: 150}
_NUM_REPEATS = 3


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def make_requests(num_requests: int, tag: str) -> list[Request]:
    num_tokens = _NUM_TOKENS[num_requests]
    return [
        make_request(f"cmpl-{tag}-{index:024x}", (index + 1, 2, 3), max_tokens=num_tokens)
        for index in range(num_requests)
    ]


async def drain(stream: RequestStream) -> int:
    return len([output async for output in stream])


async def stream_all(client: ProcessClient, num_requests: int, tag: str) -> tuple[float, float, float]:
    """Microseconds per token on the server's side and in the engine process; outputs per token."""
    own, child = cpu_s(os.getpid()), cpu_s(client.pid)
    streams = [client.submit(request) for request in make_requests(num_requests, tag)]
    num_outputs = sum(await asyncio.gather(*(drain(stream) for stream in streams)))
    num_tokens = num_requests * _NUM_TOKENS[num_requests]
    return (
        (cpu_s(os.getpid()) - own) / num_tokens * 1e6,
        (cpu_s(client.pid) - child) / num_tokens * 1e6,
        num_outputs / num_tokens,
    )


def step_alone(step_s: float, num_requests: int) -> float:
    """Microseconds per token of the engine and its executor without transport."""
    engine = TinyBuilder(step_s=step_s).build().engine
    for request in make_requests(num_requests, "alone"):
        engine.add(request)
    own = cpu_s(os.getpid())
    while engine.has_work:
        engine.step(time.monotonic())
    return (cpu_s(os.getpid()) - own) / (num_requests * _NUM_TOKENS[num_requests]) * 1e6


async def main(step_s: float) -> list[dict[str, float]]:
    rows = []
    async with ProcessClient(TinyBuilder(step_s=step_s)) as client:
        await stream_all(client, 1, "warm")
        for num_requests in _NUM_TOKENS:
            runs = [await stream_all(client, num_requests, str(repeat)) for repeat in range(_NUM_REPEATS)]
            alone = min(step_alone(step_s, num_requests) for _ in range(_NUM_REPEATS))
            server, engine = min(run[0] for run in runs), min(run[1] for run in runs) - alone
            rows.append(
                {
                    "num_requests": num_requests,
                    "server_us_per_token": round(server, 2),
                    "server_us_per_step": round(server * num_requests),
                    "engine_transport_us_per_token": round(engine, 2),
                    "engine_transport_us_per_step": round(engine * num_requests),
                    "engine_step_us_per_token": round(alone, 2),
                    "outputs_per_token": round(sum(run[2] for run in runs) / len(runs), 3),
                }
            )
            print(rows[-1])
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, default=4.0)
    parser.add_argument("--uvloop", action="store_true")
    arguments = parser.parse_args()
    factory = uvloop.new_event_loop if arguments.uvloop else None
    with asyncio.Runner(loop_factory=factory) as runner:
        print(json.dumps(runner.run(main(arguments.step_ms / 1000.0))))
