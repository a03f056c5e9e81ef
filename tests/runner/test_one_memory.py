"""KV in the place of idle adapters, and adapters in the place of KV: answers are those of a fixed split."""

import random
import threading

import numpy as np
import pytest
import torch

from pomona.core.errors import ConfigError
from pomona.core.ids import PageId
from pomona.core.plan import AdapterLoad
from pomona.core.request import SamplingParams
from pomona.model.lora import PageLayout
from pomona.runner import adapter_copies, memory
from pomona.runner.adapter_pool import AdapterPool
from pomona.runner.config import RunnerConfig
from pomona.runner.kv_cache import KVCache, block_bytes
from pomona.runner.memory import plan_capacity
from support.adapters import ALL_TARGETS, make_adapter
from support.models import make_checkpoint
from support.runner import TinyEngine

MAX_MODEL_LEN, BLOCK_SIZE = 64, 4
NUM_OWN = MAX_MODEL_LEN // BLOCK_SIZE
NUM_PAGES = 6
RANKS = (4, 8, 12)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("memory") / "base")


@pytest.fixture(scope="module")
def adapter_paths(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(folder / f"{lora_rank}", base_path, seed=lora_rank, r=lora_rank, target_modules=ALL_TARGETS)
        for lora_rank in RANKS
    ]


def make_engine(base_path, adapter_paths, **settings):
    """An engine whose KV has blocks for one sequence of full length, and its adapters' ids."""
    sizes = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 12, "max_num_batched_tokens": 48}
    trial = TinyEngine(base_path, **sizes)
    per_block = block_bytes(trial.loaded.spec, BLOCK_SIZE, torch.float32)
    page_bytes = trial.loaded.capacity.blocks_per_page * per_block
    assert page_bytes, "a page of this model is made of KV blocks"
    memory = {"kv_cache_bytes": NUM_OWN * per_block, "adapter_bytes": NUM_PAGES * page_bytes}
    engine = TinyEngine(base_path, **(sizes | memory | settings))
    capacity = engine.loaded.capacity
    assert (capacity.num_kv_blocks, capacity.num_adapter_pages) == (NUM_OWN, NUM_PAGES)
    return engine, [engine.load_adapter(path) for path in adapter_paths]


def serve(engine: TinyEngine, ids) -> tuple[list[list[int]], list[int]]:
    """Adapters, then prompts for more than KV's own blocks, then adapters again, one wave running into the next; all
    answers, and the pages lent at each step."""
    rng = random.Random(5)
    requests, lent = [], []

    def wave(adapters, num_tokens: int) -> None:
        for adapter_id in adapters:
            prompt = [rng.randrange(3, 90) for _ in range(rng.randrange(1, num_tokens))]
            sampling = SamplingParams(max_tokens=rng.randrange(2, 14), temperature=0.0)
            requests.append(engine.add(prompt, sampling, adapter_id))
        for _ in range(rng.randrange(4, 20)):
            engine.step()
            lent.append(engine.engine.stats().num_adapter_pages_lent)

    for _ in range(4):
        wave(ids, 12)
        wave([None] * 8, 40)
        wave([None, *ids, None], 20)
    engine.run()
    stats = engine.engine.stats()
    assert (stats.num_pinned_adapters, stats.num_kv_blocks_used) == (0, 0)
    return [engine.tokens(request_id) for request_id in requests], lent


@pytest.fixture(scope="module")
def expected(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths, blocks_per_page=0)
    answers, lent = serve(engine, ids)
    assert not any(lent)
    return answers


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"overlap_steps": True},
        {"decode_graphs": True, "graph_batch_sizes": (2, 12)},
        {"adapter_loading": "assist", "adapter_link_bytes_per_s": 3e6},
        {"adapter_loading": "join", "adapter_link_bytes_per_s": 3e6, "overlap_steps": True},
        {"adapter_wait_limit_s": 0.0},
        {"enable_prefix_cache": False},
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_answers_are_those_of_a_fixed_split_while_pages_go_to_kv_and_come_back(
    base_path, adapter_paths, expected, settings
):
    engine, ids = make_engine(base_path, adapter_paths, **settings)
    answers, lent = serve(engine, ids)
    assert answers == expected
    assert max(lent) >= NUM_PAGES // 2
    assert engine.engine.stats().num_adapter_loads > 2 * len(RANKS), "adapters came back"


def test_kv_that_an_adapter_left_behind_cannot_be_seen(base_path, adapter_paths, expected):
    engine, ids = make_engine(base_path, adapter_paths)
    engine.loaded.runner._kv_cache._blocks.fill_(torch.nan)
    answers, lent = serve(engine, ids)
    assert max(lent) > 0
    assert answers == expected


def test_where_nothing_is_left_for_adapters_there_are_no_pages_rather_than_fewer(base_path, adapter_paths, monkeypatch):
    engine, _ = make_engine(base_path, adapter_paths)
    spec = engine.loaded.spec
    layout, cpu = PageLayout(spec, 4), torch.device("cpu")
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 2**30)
    config = RunnerConfig(model_path="", dtype="float32", kv_cache_bytes=2**24)
    capacity = plan_capacity(config, spec, layout, max_model_len=64, device=cpu, reserved_bytes=2**30)
    assert capacity.num_adapter_pages == 0
    config = RunnerConfig(model_path="", dtype="float32", adapter_bytes=2**24)
    with pytest.raises(ConfigError, match="holds 0 tokens but max_model_len is 64"):
        plan_capacity(config, spec, layout, max_model_len=64, device=cpu, reserved_bytes=2**30)


@pytest.mark.parametrize("percent", [50, 90, 120])
def test_adapters_take_no_more_of_a_gpu_than_a_kv_cache_of_fixed_size_leaves(base_path, percent, monkeypatch):
    engine = TinyEngine(base_path)
    spec, layout, budget = engine.loaded.spec, PageLayout(engine.loaded.spec, 4), 2**26
    monkeypatch.setattr(memory, "_free_bytes", lambda *_: budget)
    config = RunnerConfig(model_path="", dtype="float32", kv_cache_bytes=budget * percent // 100)
    capacity = plan_capacity(config, spec, layout, max_model_len=64, device=torch.device("cuda"))
    per_block = block_bytes(spec, config.block_size, torch.float32)
    page_bytes = capacity.blocks_per_page * per_block or layout.page_elems * 4
    taken = capacity.num_kv_blocks * per_block + capacity.num_adapter_pages * page_bytes
    assert taken <= max(budget, config.kv_cache_bytes)
    assert (capacity.num_adapter_pages > 0) == (percent < 100)


def test_pages_much_smaller_than_blocks_have_memory_of_their_own(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths)
    spec, layout = engine.loaded.spec, PageLayout(engine.loaded.spec, 4)
    page_bytes = layout.page_elems * 4
    for block_size in (1, 4, 64, 512):
        config = RunnerConfig(
            model_path="", dtype="float32", block_size=block_size, adapter_bytes=2**24, kv_cache_bytes=2**26
        )
        capacity = plan_capacity(config, spec, layout, max_model_len=64, device=torch.device("cpu"))
        per_block = block_bytes(spec, block_size, torch.float32)
        if capacity.blocks_per_page:
            assert page_bytes <= capacity.blocks_per_page * per_block <= 1.25 * page_bytes
            assert capacity.num_adapter_pages == 2**24 // (capacity.blocks_per_page * per_block)
        else:
            assert per_block > 0.25 * page_bytes
            assert capacity.num_adapter_pages == 2**24 // page_bytes
    assert capacity.blocks_per_page == 0
    large_blocks = TinyEngine(base_path, block_size=512, max_model_len=64, max_num_seqs=2, kv_cache_bytes=2**26)
    assert large_blocks.loaded.capacity.blocks_per_page == 0
    large_blocks.load_adapter(adapter_paths[1])
    assert large_blocks.generate([5, 6, 7, 8], None, ids[1]) == engine.generate([5, 6, 7, 8], None, ids[1])


def test_a_copy_given_up_has_stopped_writing_before_kv_is_written_there(base_path, adapter_paths, monkeypatch):
    engine, ids = make_engine(base_path, adapter_paths)
    spec, capacity = engine.loaded.spec, engine.loaded.capacity
    layout = PageLayout(spec, 4)
    cache = KVCache(spec, capacity.num_blocks_in_all, BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))
    pages = cache.pages(NUM_OWN, NUM_PAGES, capacity.blocks_per_page, layout.page_elems)
    pool = AdapterPool(layout, pages)
    has_begun, may_end = threading.Event(), threading.Event()
    copy_at_once = np.copyto

    def copy_slowly(target, source):
        half = len(target) // 2
        copy_at_once(target[:half], source[:half])
        has_begun.set()
        may_end.wait(0.2)
        copy_at_once(target[half:], source[half:])

    monkeypatch.setattr(adapter_copies.np, "copyto", copy_slowly)
    staged = engine.loaded.adapters.staged
    page_ids = tuple(PageId(index) for index in range(3))
    pool.apply((), [AdapterLoad(ids[2], page_ids, 1, is_awaited=False)], staged)
    assert has_begun.wait(10)
    thread = pool._copies._thread
    pool.apply([ids[2]], (), staged)
    cache._blocks.fill_(7.0)
    may_end.set()
    if thread is not None:
        thread.join()
    assert (cache._blocks == 7.0).all()
