"""What goes, and what does not, while the engine is still freeing something."""

import asyncio

from pomona.core.adapter import AdapterInfo
from pomona.core.ids import AdapterId
from pomona.server.host_tier import HostTier


class SlowToFree:
    """An EngineClient that has freed when it is told so. A path is the name of its adapter and its host bytes."""

    num_restarts = 0

    def __init__(self) -> None:
        self.staged: dict[AdapterId, int] = {}
        self.may_free = asyncio.Event()

    async def load_adapter(self, path: str) -> AdapterInfo:
        name, num_bytes = path.split(":")
        self.staged[AdapterId(name)] = int(num_bytes)
        await asyncio.sleep(0)
        return AdapterInfo(AdapterId(name), lora_rank=4, num_pages=1, num_host_bytes=int(num_bytes))

    async def unload_adapter(self, adapter_id: AdapterId) -> None:
        del self.staged[adapter_id]
        await self.may_free.wait()


async def _stage(tier: HostTier, path: str, num_weights_bytes: int) -> AdapterId:
    info = await tier.stage(path, num_weights_bytes)
    tier.release(info.adapter_id)
    return info.adapter_id


async def test_what_is_being_freed_sends_nothing_else_away():
    engine, evicted = SlowToFree(), []
    tier = HostTier(engine, 500, evicted.append)  # type: ignore[arg-type]
    await _stage(tier, "a:300", 100)
    await _stage(tier, "b:400", 1)  # more than its file let expect: a has to go, after the fact
    assert evicted == ["a"]
    assert tier.is_staged(AdapterId("b"))
    engine.may_free.set()
    async with asyncio.timeout(10):
        while tier.cache.num_reserved_bytes:
            await asyncio.sleep(0)
    assert engine.staged == {"b": 400}


async def test_a_load_waits_for_what_is_being_freed_and_sends_nothing_else_away():
    engine, evicted = SlowToFree(), []
    tier = HostTier(engine, 500, evicted.append)  # type: ignore[arg-type]
    await _stage(tier, "a:200", 10)
    await _stage(tier, "b:200", 20)
    unwanted = asyncio.create_task(tier.free(AdapterId("a")))
    load = asyncio.create_task(_stage(tier, "c:100", 60))
    for _ in range(20):
        await asyncio.sleep(0)
    assert "c" not in engine.staged  # b, what a still takes, and 180 for the load are more than there is
    engine.may_free.set()
    await asyncio.gather(unwanted, load)
    assert not evicted
    assert engine.staged == {"b": 200, "c": 100}


async def test_an_adapter_that_is_loaded_again_just_before_its_unload_is_sent_is_staged():
    engine = SlowToFree()
    engine.may_free.set()
    tier = HostTier(engine, 500, lambda _: None)  # type: ignore[arg-type]
    await _stage(tier, "a:200", 10)
    unwanted = asyncio.create_task(tier.free(AdapterId("a")))
    again = asyncio.create_task(_stage(tier, "a:200", 20))
    await asyncio.gather(unwanted, again)
    assert tier.is_staged(AdapterId("a"))
    assert "a" in engine.staged


async def test_what_an_adapter_became_refuses_no_other_of_that_size_and_is_forgotten_with_the_next():
    engine, evicted = SlowToFree(), []
    engine.may_free.set()
    tier = HostTier(engine, 500, evicted.append)  # type: ignore[arg-type]
    await _stage(tier, "odd:400", 20)  # a large rank of one projection: its pages have room for all of them
    await _stage(tier, "a:30", 30)  # as odd, it would need more than there is
    await _stage(tier, "b:30", 30)
    await _stage(tier, "c:30", 30)
    assert [name for name in ("a", "b", "c") if tier.is_staged(AdapterId(name))] == ["a", "b", "c"]
    tier.pin(frozenset({AdapterId("a")}))
    await _stage(tier, "odd:150", 20)  # as odd, d would need more than pinned adapters leave
    await _stage(tier, "d:30", 30)
    assert tier.is_staged(AdapterId("d"))
