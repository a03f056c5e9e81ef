"""KV and adapters in one memory: what KV borrows, who gives way to whom, and that nobody waits for ever."""

import itertools

import pytest

from pomona.core.plan import StepResult
from pomona.core.request import Priority, ServiceLevel
from pomona.sched.adapter_slots import AdapterSlots
from pomona.sched.block_pool import BlockPool
from pomona.sched.config import SchedulerConfig
from pomona.sched.memory import Memory
from pomona.sched.scheduler import Scheduler
from support.engine import EngineHarness, check_integrity, make_adapter, make_request


def make_memory(num_own: int = 2, num_pages: int = 2, blocks_per_page: int = 2) -> Memory:
    """One page per adapter, named by letters."""
    clock = itertools.count()
    memory = Memory(BlockPool(num_own, num_pages, blocks_per_page, clock), AdapterSlots(num_pages, clock))
    for name in "abc":
        memory.adapters.register(make_adapter(name))
    return memory


def load(memory: Memory, *names: str) -> None:
    for name in names:
        memory.load(name, is_awaited=True)


def cache(memory: Memory, *keys: bytes) -> None:
    """Leave cached blocks behind, each used later than the one before."""
    block_ids = memory.allocate(len(keys))
    for block_id, key in zip(block_ids, keys, strict=True):
        memory.pool.publish(block_id, key)
    for block_id in block_ids:
        memory.release([block_id])


def resident(memory: Memory) -> list[str]:
    return [str(status.adapter_id) for status in memory.adapters.statuses() if status.is_resident]


def cached(memory: Memory, keys: bytes) -> bytes:
    return bytes(key for key in keys if memory.pool.find(bytes([key])) is not None)


def books(memory: Memory) -> tuple[int, int, int]:
    return memory.num_free_blocks, memory.adapters.num_free_pages, memory.adapters.num_lent_pages


def test_all_that_nobody_uses_is_free_for_kv():
    memory = make_memory()
    load(memory, "a")
    assert books(memory) == (2 + 4, 1, 0)
    assert memory.allocate(6) == [0, 1, 4, 5, 2, 3]
    assert (books(memory), resident(memory)) == ((0, 0, 2), [])


def test_kv_borrows_a_free_page_before_it_evicts_anything():
    memory = make_memory()
    cache(memory, b"x", b"y")
    load(memory, "a")
    block_ids = memory.allocate(1)
    assert (cached(memory, b"xy"), resident(memory), memory.adapters.num_lent_pages) == (b"xy", ["a"], 1)
    more = memory.allocate(1)
    assert {memory.pool.page_of(one) for one in block_ids + more} == {1}, "what is lent is used up first"


def test_a_page_whose_blocks_are_all_blank_goes_back_at_once():
    memory = make_memory(num_own=1)
    block_ids = memory.allocate(3)
    assert memory.adapters.num_lent_pages == 1
    memory.release(block_ids[1:2])
    assert memory.adapters.num_lent_pages == 1
    memory.release(block_ids[2:])
    assert memory.adapters.num_lent_pages == 0
    assert books(memory) == (4, 2, 0)


def load_and_cache(memory: Memory, is_adapter_first: bool) -> None:
    """Adapter "a" and block b"x" in one order or the other."""
    if is_adapter_first:
        load(memory, "a")
    cache(memory, b"x")
    if not is_adapter_first:
        load(memory, "a")


@pytest.mark.parametrize("is_adapter_older", [True, False])
def test_of_a_cached_block_and_an_adapter_the_one_not_used_for_longest_goes_for_a_block(is_adapter_older: bool):
    memory = make_memory(num_own=1, num_pages=1)
    load_and_cache(memory, is_adapter_older)
    memory.allocate(1)
    assert (cached(memory, b"x"), resident(memory)) == ((b"x", []) if is_adapter_older else (b"", ["a"]))


def test_an_adapter_used_again_since_is_the_younger_one():
    memory = make_memory(num_own=1, num_pages=1)
    load(memory, "a")
    cache(memory, b"x")
    memory.adapters.use("a")
    memory.adapters.pin("a")
    memory.adapters.unpin("a")
    memory.allocate(1)
    assert (cached(memory, b"x"), resident(memory)) == (b"", ["a"])


@pytest.mark.parametrize("is_adapter_older", [True, False])
def test_of_an_adapter_and_a_lent_page_the_one_not_used_for_longest_goes_for_a_page(is_adapter_older: bool):
    memory = make_memory(num_own=1, num_pages=2, blocks_per_page=1)
    held = memory.allocate(1)
    load_and_cache(memory, is_adapter_older)
    assert books(memory) == (2, 0, 1)
    load(memory, "b")
    assert (cached(memory, b"x"), resident(memory)) == ((b"x", ["b"]) if is_adapter_older else (b"", ["a", "b"]))
    memory.release(held)


def test_a_page_with_a_block_in_use_stays_lent():
    memory = make_memory(num_own=1, num_pages=2)
    held = memory.allocate(2)
    assert memory.num_loadable_pages == 1
    load(memory, "a")
    load(memory, "b")
    assert resident(memory) == ["b"]
    memory.release(held)
    assert memory.num_loadable_pages == 2


def test_a_pinned_adapter_s_pages_are_not_for_kv():
    memory = make_memory(num_own=1, num_pages=2)
    load(memory, "a", "b")
    memory.adapters.use("a")
    memory.adapters.pin("a")
    assert books(memory) == (3, 0, 0)
    memory.allocate(3)
    assert resident(memory) == ["a"]


def test_without_blocks_per_page_kv_has_its_own_alone():
    memory = make_memory(blocks_per_page=0)
    assert memory.num_free_blocks == 2
    memory.allocate(2)
    assert memory.num_free_blocks == 0


def test_confined_kv_neither_borrows_nor_finds_nor_uses_what_it_has_borrowed():
    memory = make_memory(num_own=2, num_pages=2)
    cache(memory, b"u", b"v", b"x", b"y")
    held = memory.allocate(1)
    assert memory.num_free_blocks == 5
    memory.pool.is_confined = True
    assert cached(memory, b"uvxy") == b"uv"
    assert memory.num_free_blocks == 2
    assert set(memory.allocate(2)) == {0, 1}
    memory.release(held)
    assert memory.num_free_blocks == 0
    memory.pool.is_confined = False
    assert cached(memory, b"uvxy") == b"xy"


# Requests of four tokens a block; adapters of one page, pages of two blocks.


def make_harness(**changes: object) -> EngineHarness:
    values = {"num_kv_blocks": 4, "max_model_len": 16, "num_adapter_pages": 2, "blocks_per_page": 2, "max_num_seqs": 8}
    harness = EngineHarness(**(values | {"max_num_batched_tokens": 64} | changes))
    for name in "xyz":
        harness.register(name)
    return harness


def add(
    harness: EngineHarness, name: str, adapter: str | None = None, blocks: int = 1, max_tokens: int = 2, **fields
) -> None:
    """A request that fills so many blocks, unlike any other."""
    first = 1000 * len(harness.requests)
    num_prompt = 4 * blocks - max_tokens + 1
    harness.add(make_request(name, range(first, first + num_prompt), max_tokens, adapter=adapter, **fields))


def stats(harness: EngineHarness):
    return harness.engine.stats()


def test_more_runs_at_once_than_kv_s_own_blocks_hold():
    for blocks_per_page, num_running in ((0, 2), (2, 4)):
        harness = make_harness(blocks_per_page=blocks_per_page)
        for index in range(4):
            add(harness, f"r{index}", blocks=2)
        harness.step()
        assert stats(harness).num_running == num_running
        assert stats(harness).num_kv_blocks_used <= stats(harness).num_kv_blocks
        harness.run()
        assert stats(harness).num_preemptions == 0


def test_idle_adapters_make_way_for_kv_and_come_back():
    harness = make_harness(enable_prefix_cache=False)
    for name in "xy":
        add(harness, name, name)
    harness.run()
    assert stats(harness).num_adapter_pages_used == 2
    for index in range(4):
        add(harness, f"r{index}", blocks=2)
    harness.step()
    seen = stats(harness)
    assert (seen.num_running, seen.num_adapter_pages_used, seen.num_adapter_pages_lent) == (4, 0, 2)
    harness.run()
    assert stats(harness).num_adapter_pages_lent == 0
    for name in "xy":
        add(harness, f"{name} again", name)
    harness.run()
    assert (stats(harness).num_adapter_pages_used, stats(harness).num_adapter_loads) == (2, 4)


def test_a_sequence_s_own_adapter_is_not_given_up_for_its_blocks():
    harness = make_harness(num_kv_blocks=4, num_adapter_pages=1)
    add(harness, "first", "x")
    harness.run()
    add(harness, "second", "x", blocks=4)
    harness.step()
    assert (list(harness.scheduled()), harness.plan().adapter_evictions) == (["second"], ())
    harness.run()


@pytest.mark.parametrize("is_pinned", [True, False])
def test_cached_blocks_in_a_page_that_the_adapter_itself_needs_are_not_shared(is_pinned: bool):
    memory = make_memory(num_own=1, num_pages=2, blocks_per_page=1)
    cache(memory, b"w", b"x")
    load(memory, "a")
    if is_pinned:
        memory.adapters.use("a")
        memory.adapters.pin("a")
    found = [memory.pool.find(key) for key in (b"w", b"x")]
    kept = memory.keep_loadable("b", found)
    assert kept == (found[:1] if is_pinned else found)
    memory.pool.share(kept)
    load(memory, "b")
    assert (cached(memory, b"wx"), resident(memory)) == ((b"w", ["a", "b"]) if is_pinned else (b"wx", ["b"]))


def test_a_prefix_in_the_page_that_its_adapter_needs_is_computed_again():
    harness = make_harness()
    add(harness, "fill", blocks=3)
    add(harness, "first", "y", blocks=2)
    add(harness, "late", blocks=1, max_tokens=4)
    harness.step()
    assert [held.block_ids[-1] for held in harness.executor._held.values()] == [2, 7, 6], "two blocks of page 1"
    harness.run()
    add(harness, "other", "x", blocks=2, max_tokens=8)
    harness.step()
    assert harness.plan().adapter_evictions == ("y",), "used before the page's last block"
    prompt = [*harness.requests["first"].prompt_token_ids, *harness.tokens("first")]
    harness.add(make_request("again", prompt, 2, adapter="y"))
    harness.step()
    assert (harness.scheduled()["again"], harness.scheduled()["other"]) == (len(prompt) - 4, 1)
    harness.run()


def test_a_request_that_waits_for_a_page_gets_it_when_those_who_hold_it_are_done():
    """Without the rule, requests that share a prefix in a lent page would hold it for ever."""
    harness = make_harness(num_adapter_pages=1, adapter_wait_limit_s=3.0, max_num_seqs=4, num_kv_blocks=8)
    prefix = list(range(12))

    def add_sharing(index: int) -> None:
        harness.add(make_request(f"base{index}", [*prefix, 100 + index], 3))

    for index in range(3):
        add(harness, f"fill{index}", blocks=3)
    harness.step()
    add_sharing(0)
    harness.step()
    assert stats(harness).num_adapter_pages_lent == 1
    add(harness, "cold", "x")
    waited = 0
    for index in range(1, 60):
        add_sharing(index)
        harness.step(1.0)
        check_integrity(harness.engine._scheduler)
        waited += 1
        if harness.tokens("cold"):
            break
    assert 3 <= waited <= 12, "the limit, and what the running ones have left"
    assert stats(harness).num_running > 0
    harness.run()
    assert stats(harness).num_preemptions == 0


def test_while_somebody_waits_for_pages_base_requests_go_on_in_kv_s_own_blocks():
    harness = make_harness(num_adapter_pages=1, adapter_wait_limit_s=0.0, enable_prefix_cache=False)
    for index in range(2):
        add(harness, f"own{index}", blocks=2)
    harness.add(make_request("lent", [7], 12))
    add(harness, "cold", "x")
    harness.step()
    assert (list(harness.scheduled()), stats(harness).num_adapter_pages_lent) == (["own0", "own1", "lent"], 1)
    assert harness.engine._scheduler._pool.is_confined
    for index in range(5):
        add(harness, f"base{index}", blocks=1)
    while not all(len(harness.tokens(f"base{index}")) == 2 for index in range(5)):
        harness.step(1.0)
        check_integrity(harness.engine._scheduler)
        assert harness.executor._held["lent"].block_ids[0] >= 4
        assert all(max(held.block_ids) < 4 for name, held in harness.executor._held.items() if name != "lent")
    assert (harness.tokens("cold"), stats(harness).num_preemptions) == ([], 0)
    harness.run()
    assert [load.adapter_id for plan in harness.executor.plans for load in plan.adapter_loads] == ["x"]


def test_a_more_urgent_request_takes_the_pages_that_kv_of_less_urgent_ones_holds():
    harness = make_harness(num_kv_blocks=5, num_adapter_pages=1, adapter_wait_limit_s=1e9, enable_prefix_cache=False)
    batch = ServiceLevel(priority=Priority.BATCH)
    for index in range(3):
        add(harness, f"batch{index}", blocks=2, max_tokens=4, level=batch, tenant="p")
    harness.step()
    harness.abort("batch0")
    add(harness, "batch3", blocks=2, level=batch, tenant="p")
    harness.step()
    assert (stats(harness).num_running, stats(harness).num_adapter_pages_lent) == (3, 1)
    add(harness, "urgent", "x", level=ServiceLevel(priority=Priority.INTERACTIVE), tenant="q")
    harness.step()
    assert "urgent" in harness.scheduled()
    assert harness.plan().released == ("batch2",), "who holds the page, though it is not the latest"
    harness.run()


def test_a_more_urgent_request_takes_the_room_of_less_urgent_ones_adapters():
    harness = make_harness(num_kv_blocks=6, max_model_len=24, enable_prefix_cache=False)
    batch, urgent = (ServiceLevel(priority=one) for one in (Priority.BATCH, Priority.INTERACTIVE))
    add(harness, "goes on", blocks=3, max_tokens=4, level=urgent, tenant="q")
    for name in ("x", "y"):
        add(harness, f"batch {name}", name, level=batch, tenant="p")
    harness.step()
    add(harness, "urgent", blocks=4, level=urgent, tenant="q")
    harness.step()
    assert set(harness.scheduled()) == {"goes on", "batch x", "urgent"}, "in a block free, batch y's and a page"
    harness.run()


def test_nobody_is_preempted_for_a_page_that_somebody_else_goes_on_using():
    harness = make_harness(num_adapter_pages=1, adapter_wait_limit_s=1e9, enable_prefix_cache=False)
    batch, interactive = (ServiceLevel(priority=one) for one in (Priority.BATCH, Priority.INTERACTIVE))
    for index in range(2):
        add(harness, f"batch{index}", blocks=2, max_tokens=4, level=batch, tenant="p")
    harness.step()
    add(harness, "goes on", max_tokens=4, level=interactive, tenant="q")
    harness.step()
    add(harness, "batch2", max_tokens=4, level=batch, tenant="p")
    harness.step()
    assert [harness.executor._held[name].block_ids[0] for name in ("goes on", "batch2")] in ([4, 5], [5, 4])
    add(harness, "urgent", "x", level=interactive, tenant="q")
    harness.step()
    assert ("urgent" in harness.scheduled(), stats(harness).num_preemptions) == (False, 0)
    harness.run()


def test_nobody_is_preempted_for_pages_while_there_are_no_blocks_for_who_needs_them():
    harness = make_harness(num_kv_blocks=6, num_adapter_pages=1, blocks_per_page=0, enable_prefix_cache=False)
    batch, urgent = (ServiceLevel(priority=one) for one in (Priority.BATCH, Priority.INTERACTIVE))
    add(harness, "goes on", blocks=4, max_tokens=4, level=urgent, tenant="q")
    add(harness, "batch", "y", max_tokens=4, level=batch, tenant="p")
    harness.step()
    add(harness, "urgent", "x", blocks=3, level=urgent, tenant="q")
    harness.step()
    assert ("batch" in harness.scheduled(), stats(harness).num_preemptions) == (True, 0)
    harness.run()


def test_no_adapter_is_closed_while_the_pages_that_kv_gives_back_will_do():
    harness = make_harness(num_kv_blocks=6, blocks_per_page=1, adapter_wait_limit_s=0.0, enable_prefix_cache=False)
    add(harness, "fill", blocks=4, max_tokens=4)
    add(harness, "y0", "y", max_tokens=4)
    add(harness, "short", max_tokens=2)
    add(harness, "lent", max_tokens=4)
    add(harness, "cold", "x")
    harness.step()
    harness.step()
    assert harness.executor._held["lent"].block_ids == [7]
    add(harness, "y1", "y")
    harness.step()
    assert harness.engine._scheduler._turn.has_claimant
    assert "y1" in harness.scheduled()
    harness.run()


def test_when_everything_failed_all_pages_are_back():
    harness = make_harness()
    for index in range(4):
        add(harness, f"r{index}", blocks=2)
    harness.step()
    assert stats(harness).num_adapter_pages_lent == 2
    harness.executor.reset()
    harness.note(harness.engine.fail_all("restarted"))
    check_integrity(harness.engine._scheduler)
    assert (stats(harness).num_adapter_pages_lent, stats(harness).num_kv_blocks) == (0, 4)
    harness.run()


def test_adapters_are_sent_for_ahead_only_into_pages_that_are_free():
    harness = make_harness(adapter_loading="join", max_num_seqs=1, num_adapter_pages=2, num_kv_blocks=4)
    for index in range(3):
        add(harness, f"cache{index}", blocks=4)
        harness.run()
    assert stats(harness).num_adapter_pages_lent == 2
    add(harness, "runs", blocks=1)
    harness.step()
    lent = stats(harness).num_adapter_pages_lent
    add(harness, "waits", "x")
    harness.step()
    assert (stats(harness).num_adapter_loads, stats(harness).num_adapter_pages_lent) == (0, lent)
    harness.run()


# What it brings while all adapters are idle (docs/design/0017): the 135M shape with 512 blocks of KV and 256 MiB for
# adapters. Tokens are made up, so nothing is computed.

SIZES = {"num_kv_blocks": 512, "max_model_len": 1024, "num_adapter_pages": 104}


def run_to_end(scheduler: Scheduler) -> tuple[int, int]:
    """Steps, and most sequences at once."""
    num_steps = most = 0
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        sampled = {entry.request_id: 7 for entry in plan.seqs if entry.is_sampled}
        scheduler.update(plan, StepResult(plan.step_id, sampled), 0.0)
        num_steps += 1
        most = max(most, scheduler.stats().num_running)
    return num_steps, most


@pytest.mark.parametrize(("blocks_per_page", "num_found"), [(0, 0), (7, 12800)])
def test_it_brings_back_the_prefixes_of_more_conversations(blocks_per_page: int, num_found: int):
    scheduler = Scheduler(SchedulerConfig(**SIZES, blocks_per_page=blocks_per_page))
    prompts = [list(range(1000 * index, 1000 * index + 800)) for index in range(16)]
    for turn in range(2):
        for index, prompt in enumerate(prompts):
            scheduler.add(make_request(f"{turn} {index}", prompt, 4))
            run_to_end(scheduler)
            prompt += [7] * 4
    seen = scheduler.stats()
    assert (seen.num_prefix_hits, seen.num_prefix_queries) == (num_found, 12800 + 12864)


@pytest.mark.parametrize(("blocks_per_page", "expected"), [(0, (258, 29, 8)), (7, (133, 32, 0))])
def test_it_brings_more_requests_into_a_step(blocks_per_page: int, expected: tuple[int, int, int]):
    scheduler = Scheduler(SchedulerConfig(**SIZES, blocks_per_page=blocks_per_page))
    for index in range(32):
        scheduler.add(make_request(f"r{index}", range(1000 * index, 1000 * index + 256), 128))
    num_steps, most = run_to_end(scheduler)
    assert (num_steps, most, scheduler.stats().num_preemptions) == expected
