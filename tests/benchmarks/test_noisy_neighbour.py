"""The noisy neighbour's load on an engine that answers a short request only after much of the flood."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

from benchmarks import noisy_neighbour
from pomona.core.ids import AdapterId
from pomona.core.request import Request


class SlowClient:
    """Serves one token of the flood a millisecond; a short request waits for 50 of them."""

    def __init__(self) -> None:
        self.num_flood_tokens = 0

    async def submit(self, request: Request) -> AsyncIterator[SimpleNamespace]:
        if request.tenant_id == "flood":
            while True:
                await real_sleep(0.001)
                self.num_flood_tokens += 1
                yield SimpleNamespace(new_token_ids=(1,))
        until = self.num_flood_tokens + 50
        while self.num_flood_tokens < until:
            await real_sleep(0.001)
        yield SimpleNamespace(new_token_ids=(1,))


real_sleep = asyncio.sleep


async def test_short_requests_that_wait_at_the_end_are_served_beside_the_flood_and_count(monkeypatch):
    monkeypatch.setattr(noisy_neighbour, "NUM_FLOOD", 1)
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: real_sleep(seconds / 100))
    client = SlowClient()
    load = noisy_neighbour.Load(client, [AdapterId("a")])  # type: ignore[arg-type]
    tally = await asyncio.wait_for(load.run(3.0, has_flood=True), 20.0)
    assert len(tally.ttfts_s) == 3
    assert 0 < tally.num_flood_tokens < client.num_flood_tokens - 50


async def test_the_floods_rate_is_over_the_time_in_which_its_tokens_came(monkeypatch):
    monkeypatch.setattr(noisy_neighbour, "NUM_FLOOD", 1)
    load = noisy_neighbour.Load(SlowClient(), [AdapterId("a")])  # type: ignore[arg-type]
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: real_sleep(seconds / 20))
    tally = await asyncio.wait_for(load.run(2.9, has_flood=True), 20.0)
    assert tally.flood_s >= 2 * 0.95 / 20  # of two short requests, not of 2.9
    assert 0 < tally.num_flood_tokens / tally.flood_s <= 1000
