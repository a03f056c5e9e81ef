"""KV blocks and the memory they take."""

import os
import threading
from pathlib import Path

import pytest
import torch

from pomona.kernels.host_memory import mapped_zeros, take_memory
from pomona.model.spec import ModelSpec, RopeSpec
from pomona.runner.kv_cache import KVCache

PAGE = os.sysconf("SC_PAGE_SIZE")
NUM_BLOCKS, BLOCK_SIZE = 4096, 16


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.fixture
def spec() -> ModelSpec:
    if not take_memory(mapped_zeros((PAGE,), torch.uint8)):
        pytest.skip("this system gives memory only when it is written")
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=8,
        hidden_size=64,
        intermediate_size=64,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope=RopeSpec(10_000.0),
        is_tied=True,
    )


def test_memory_is_taken_for_the_blocks_that_come_next_and_keeps_what_is_there(spec: ModelSpec):
    cache = KVCache(spec, NUM_BLOCKS, BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))
    keys, values = cache.layers[-1]
    keys[0] = 3.0
    before = resident_bytes()
    assert cache._thread is None
    cache.use(0)
    cache._thread.join()
    assert resident_bytes() - before >= 0.5 * min(2 * 32 * 2**20, cache._blocks.nbytes)
    assert (keys[0] == 3.0).all()
    assert not keys[1:].any()
    assert not values.any()


def test_an_adapter_page_is_the_blocks_that_stand_in_its_place(spec: ModelSpec):
    cache = KVCache(spec, 16, BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))
    pages = cache.pages(first_block=4, num_pages=3, blocks_per_page=2, page_elems=cache._blocks.shape[1] + 5)
    pages[1] = 7.0
    is_written = [any(bool(part[index].any()) for layer in cache.layers for part in layer) for index in range(16)]
    assert [index for index in range(16) if is_written[index]] == [6, 7]
    assert int((cache._blocks == 7.0).sum()) == pages.shape[1], "what a page's last block has left over stays"


def test_all_blocks_have_memory_in_the_end(spec: ModelSpec):
    cache = KVCache(spec, NUM_BLOCKS, BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))
    for block_id in range(0, NUM_BLOCKS, 64):
        cache.use(block_id)
        cache._thread.join()
    assert cache._num_taken == NUM_BLOCKS
    last = cache._thread
    cache.use(NUM_BLOCKS - 1)
    assert cache._thread is last


def test_where_no_thread_can_be_started_blocks_are_used_all_the_same(spec: ModelSpec, monkeypatch):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    cache = KVCache(spec, NUM_BLOCKS, BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))
    cache.use(0)
    cache.use(1)
    cache.layers[0][0][0] = 3.0
    assert (cache.layers[0][0][0] == 3.0).all()
