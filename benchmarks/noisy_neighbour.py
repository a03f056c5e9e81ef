"""A noisy neighbour: one tenant keeps 200 long requests over 32 adapters going while another sends one short request a
second. What happens to the second one's time to first token?

    python -m benchmarks.noisy_neighbour                # alone, then beside the flood under each setting: 4 minutes
    python -m benchmarks.noisy_neighbour --case alone --case seats --duration 25

Live: the bundled model in its engine process, requests through the client that the server uses, times as it sees them.
The 32 adapters are copies of the bundled ones with other scalings, so they share no memory.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import fairness_report, results
from pomona.bench.percentiles import percentile
from pomona.cli.build import engine_builder
from pomona.cli.config import load_config
from pomona.cli.hub import bundled_dir
from pomona.core.ids import AdapterId, RequestId, TenantId
from pomona.core.request import Request, SamplingParams
from pomona.driver.client import ProcessClient

NUM_ADAPTERS, NUM_FLOOD = 32, 200
LONG, SHORT = (512, 512), (256, 16)
"""Prompt and output tokens."""
CASES: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "fcfs": {"fairness": "fcfs"},
    "seats": {"fairness": "wvtc"},
    "seats, short steps": {"fairness": "wvtc", "max_step_s": 0.002},
}
"""Settings of the server; None sends no flood (under those of the last case)."""


@dataclass(slots=True)
class Tally:
    """What was seen."""

    ttfts_s: list[float] = field(default_factory=list)
    num_flood_tokens: int = 0
    flood_s: float = 0.0
    """In which these came."""


def make_adapters(folder: Path) -> list[Path]:
    """NUM_ADAPTERS folders whose digests differ."""
    originals = sorted((bundled_dir() / "adapters").iterdir())
    paths = []
    for index in range(NUM_ADAPTERS):
        path = folder / f"copy{index:02d}"
        shutil.copytree(originals[index % len(originals)], path)
        config = json.loads((path / "adapter_config.json").read_text())
        config["lora_alpha"] *= 1.0 + index / 1000
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


class Load:
    """Both tenants' requests to one engine.

    Args:
        client: the engine.
        adapters: the flood's.
    """

    def __init__(self, client: ProcessClient, adapters: list[AdapterId]) -> None:
        self._client = client
        self._adapters = adapters
        self._rng = random.Random(0)
        self._num_requests = 0
        # Made in advance: two hundred prompts made at once would hold up the client, and with it what it measures.
        self._prompts = {
            lengths: [[self._rng.randrange(3, 300) for _ in range(lengths[0])] for _ in range(64)]
            for lengths in (LONG, SHORT)
        }
        self.tally = Tally()

    def _request(self, tenant: str, lengths: tuple[int, int], adapter_id: AdapterId | None) -> Request:
        self._num_requests += 1
        tail = self._prompts[lengths][self._num_requests % 64][2:]
        first = divmod(self._num_requests, 256)  # no prompt begins like another
        return Request(
            request_id=RequestId(f"{tenant}-{self._num_requests}"),
            prompt_token_ids=(3 + first[0], 3 + first[1], *tail),
            sampling=SamplingParams(max_tokens=lengths[1], temperature=0.0),
            arrival_s=time.monotonic(),
            tenant_id=TenantId(tenant),
            adapter_id=adapter_id,
        )

    async def flood(self, index: int) -> None:
        """One of the long requests after the other, for ever."""
        while True:
            request = self._request("flood", LONG, self._adapters[index % len(self._adapters)])
            async for output in self._client.submit(request):
                self.tally.num_flood_tokens += len(output.new_token_ids)

    async def short(self) -> None:
        """One short request; keeps its time to first token."""
        request = self._request("short", SHORT, None)
        is_first = True
        async for _ in self._client.submit(request):
            if is_first:
                self.tally.ttfts_s.append(time.monotonic() - request.arrival_s)
                is_first = False

    async def run(self, duration_s: float, *, has_flood: bool) -> Tally:
        """One short request a second for so long, after the flood has risen."""
        floods = [asyncio.create_task(self.flood(index)) for index in range(NUM_FLOOD if has_flood else 0)]
        await asyncio.sleep(6.0 if has_flood else 1.0)
        for _ in range(3):
            await self.short()
        self.tally = Tally()
        start_s = time.monotonic()
        shorts = []
        for _ in range(int(duration_s)):
            shorts.append(asyncio.create_task(self.short()))
            await asyncio.sleep(0.95 + 0.1 * self._rng.random())
        tally = replace(
            self.tally, flood_s=time.monotonic() - start_s
        )  # the flood's tokens so far; times of short requests that wait still come in
        await asyncio.gather(*shorts)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        return tally


async def measure(case: str, duration_s: float, adapters: list[Path]) -> dict[str, Any]:
    """A case in an engine of its own."""
    settings = CASES[case]
    used = next(one for one in reversed(CASES.values()) if one is not None) if settings is None else settings
    builder = engine_builder(load_config(dict(used)))
    async with ProcessClient(builder) as client:
        infos = [await client.load_adapter(str(path)) for path in adapters]
        gc.collect()
        gc.freeze()  # as `pomona serve` does
        load = Load(client, [info.adapter_id for info in infos])
        tally = await load.run(duration_s, has_flood=settings is not None)
        stats = client.stats()
    ordered = sorted(tally.ttfts_s)
    return {
        "kind": "noisy",
        "level": "engine client",
        "case": case,
        "settings": used,
        "num_short": len(ordered),
        "ttft_s": {f"p{round(100 * share)}": percentile(ordered, share) for share in (0.5, 0.9, 0.99)},
        "flood_tokens_per_s": tally.num_flood_tokens / tally.flood_s,
        "num_preemptions": stats.num_preemptions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=50.0, help="seconds of each case")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; repeatable")
    parser.add_argument("--output", type=Path, default=results.RESULTS / f"{results.today()}-fairness.jsonl")
    options = parser.parse_args()
    if not options.duration >= 1.0:
        parser.error(f"--duration {options.duration:g}: must be at least 1, for one short request")
    setup = results.setup(mode="live")
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        adapters = make_adapters(Path(folder))
        for case in options.case or CASES:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                row = runner.run(measure(case, options.duration, adapters))
            results.append(options.output, {**setup, **row})
            print(case, {name: f"{1e3 * value:.2f} ms" for name, value in row["ttft_s"].items()}, row)
    fairness_report.write()


if __name__ == "__main__":
    main()
