"""Blocks are handed out, shared, cached and evicted in a fixed order."""

import pytest

from pomona.sched.block_pool import BlockPool


def make_cached(pool: BlockPool, *keys: bytes) -> list[int]:
    """Blocks published under the keys, in that order, that nobody holds any more."""
    block_ids = pool.allocate(len(keys))
    for block_id, key in zip(block_ids, keys, strict=True):
        pool.publish(block_id, key)
    pool.release(block_ids)
    return block_ids


def test_a_new_pool_is_free():
    pool = BlockPool(3)
    assert (pool.num_free, pool.num_used, pool.num_cached) == (3, 0, 0)
    assert pool.allocate(3) == [0, 1, 2]
    assert (pool.num_free, pool.num_used) == (0, 3)


def test_a_released_block_without_key_is_free_and_not_found():
    pool = BlockPool(1)
    pool.release(pool.allocate(1))
    assert (pool.num_free, pool.num_cached) == (1, 0)


def test_a_published_block_is_found_while_used_and_afterwards():
    pool = BlockPool(2)
    (block_id,) = pool.allocate(1)
    assert pool.find(b"k") is None
    pool.publish(block_id, b"k")
    assert pool.find(b"k") == block_id
    pool.release([block_id])
    assert pool.find(b"k") == block_id
    assert pool.num_free == 2


def test_sharing_takes_a_cached_block_out_of_the_free_ones():
    pool = BlockPool(2)
    (block_id,) = make_cached(pool, b"k")
    assert pool.num_idle([block_id]) == 1
    pool.share([block_id])
    pool.share([block_id])
    assert (pool.num_refs(block_id), pool.num_free, pool.num_idle([block_id])) == (2, 1, 0)
    pool.release([block_id])
    assert pool.num_free == 1
    pool.release([block_id])
    assert pool.num_free == 2


def test_blank_blocks_are_handed_out_before_cached_ones():
    pool = BlockPool(3)
    make_cached(pool, b"k")
    assert set(pool.allocate(2)) == {1, 2}
    assert pool.find(b"k") == 0


def test_the_least_recently_used_cached_block_is_evicted_first():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"1")
    pool.publish(second, b"2")
    pool.release([first])
    pool.release([second])
    pool.share([first])
    pool.release([first])
    assert pool.allocate(1) == [second]
    assert (pool.find(b"1"), pool.find(b"2")) == (first, None)


def test_a_chain_is_evicted_from_its_tail():
    pool = BlockPool(3)
    make_cached(pool, b"1", b"2", b"3")
    pool.allocate(1)
    assert [pool.find(key) for key in (b"1", b"2", b"3")] == [0, 1, None]


def test_a_key_stays_with_the_block_that_had_it_first():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"k")
    pool.publish(second, b"k")
    assert pool.find(b"k") == first
    pool.release([second])
    assert pool.allocate(1) == [second]
    assert pool.find(b"k") == first


def test_a_withdrawn_block_is_not_found_and_becomes_blank():
    pool = BlockPool(1)
    block_ids = pool.allocate(1)
    pool.publish(block_ids[0], b"k")
    pool.withdraw(block_ids)
    pool.withdraw(block_ids)
    assert pool.find(b"k") is None
    pool.release(block_ids)
    assert (pool.num_free, pool.num_cached) == (1, 0)


def test_forgetting_empties_the_cache():
    pool = BlockPool(2)
    make_cached(pool, b"1", b"2")
    pool.forget_all()
    assert (pool.find(b"1"), pool.num_cached, pool.num_free) == (None, 0, 2)


def test_misuse_is_noticed():
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 blocks asked"):
        pool.allocate(3)
    block_ids = pool.allocate(1)
    with pytest.raises(AssertionError, match="not cached"):
        pool.share(block_ids)
    with pytest.raises(AssertionError, match="used blocks"):
        pool.forget_all()
    pool.publish(block_ids[0], b"k")
    with pytest.raises(AssertionError, match="twice"):
        pool.publish(block_ids[0], b"l")
    pool.release(block_ids)
    with pytest.raises(AssertionError, match="more often than held"):
        pool.release(block_ids)
    with pytest.raises(AssertionError, match="only used"):
        pool.publish(block_ids[0], b"m")
    with pytest.raises(AssertionError, match="only used"):
        pool.withdraw(block_ids)
