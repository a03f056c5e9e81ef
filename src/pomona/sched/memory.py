"""Memory: KV blocks and adapter pages share one, and this decides who gives way to whom (S-LoRA's unified paging, arXiv
2311.03285 section 5).

KV has blocks of its own and borrows whole pages that no adapter needs. Only what nobody uses is given up, and of two
such things the one not used for longest: a cached block or an adapter when KV needs a block, an adapter or a page of
cached blocks when an adapter needs a page. How long an adapter waits for what is in use is bounded by ``AdapterTurn``,
which confines KV to its own blocks meanwhile.
"""

import itertools
from collections import Counter
from collections.abc import Iterable

from pomona.core.ids import AdapterId, BlockId
from pomona.core.plan import AdapterLoad
from pomona.sched.adapter_slots import AdapterSlots
from pomona.sched.block_pool import BlockPool


class Memory:
    """Blocks and pages together.

    Args:
        pool: KV blocks; knows how many make a page, 0 if pages cannot be lent.
        adapters: adapter pages. Both order uses by one clock.
    """

    def __init__(self, pool: BlockPool, adapters: AdapterSlots) -> None:
        self.pool = pool
        self.adapters = adapters

    @property
    def num_free_blocks(self) -> int:
        """Blocks that ``allocate`` can hand out."""
        return self.num_free_blocks_beside(0)

    def num_free_blocks_beside(self, num_pages: int) -> int:
        """Blocks that ``allocate`` could hand out after so many pages that nobody uses had become an adapter's."""
        pool = self.pool
        if pool.is_confined:
            return pool.num_free
        return pool.num_free + pool.blocks_per_page * (self.adapters.num_loadable_pages - num_pages)

    @property
    def num_loadable_pages(self) -> int:
        """Pages that ``load`` could give: free ones, and those of adapters and of cached blocks that nobody uses."""
        return self.adapters.num_loadable_pages + self.pool.num_reclaimable_pages

    def can_load(self, adapter_id: AdapterId) -> bool:
        """True when there are pages for the adapter."""
        return self.adapters.num_pages_of(adapter_id) <= self.num_loadable_pages

    def num_pages_to_pin(self, adapter_id: AdapterId | None) -> int:
        """Pages that nobody uses now, and that a sequence of the adapter takes when it starts."""
        if adapter_id is None or self.adapters.num_pins_of(adapter_id):
            return 0
        return self.adapters.num_pages_of(adapter_id)

    def num_blocks_held(self, tables: Iterable[list[BlockId]], apart_from: Iterable[BlockId]) -> int:
        """Blocks that would count as free once these tables were released, apart from some: those nobody else holds."""
        pool, num_held = self.pool, Counter(itertools.chain.from_iterable(tables))
        for block_id in apart_from:
            del num_held[block_id]
        return sum(
            count == pool.num_refs(block_id) and not (pool.is_confined and pool.page_of(block_id) is not None)
            for block_id, count in num_held.items()
        )

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """Hand out blocks, see ``BlockPool``. When no blank one is left, KV borrows a free page; if there is none, the
        least recently used of cached blocks and adapters goes. The caller has checked ``num_free_blocks``."""
        pool = self.pool
        if pool.blocks_per_page == 0 or pool.num_blank >= num_blocks:
            return pool.allocate(num_blocks)
        block_ids: list[BlockId] = []
        for _ in range(num_blocks):
            if pool.num_blank == 0 and not pool.is_confined:
                self._borrow()
            block_ids += pool.allocate(1)
        return block_ids

    def release(self, block_ids: list[BlockId]) -> None:
        """Drop one reference of each block of a table."""
        for page_id in self.pool.release(block_ids):
            self.adapters.take_back(page_id)

    def keep_loadable(self, adapter_id: AdapterId, block_ids: list[BlockId]) -> list[BlockId]:
        """As many of these cached blocks as can be shared before the adapter, which is not resident, is loaded: those
        in lent pages cannot if the adapter needs the pages."""
        num_left = self.num_loadable_pages - self.pool.num_reclaimable_in(block_ids)
        return block_ids if num_left >= self.adapters.num_pages_of(adapter_id) else self.pool.own_part(block_ids)

    def load(self, adapter_id: AdapterId, *, is_awaited: bool) -> AdapterLoad:
        """Give the adapter its pages, see ``AdapterSlots``; ``can_load`` said yes. When no free one is left, the least
        recently used of adapters and of lent pages goes."""
        pool, adapters = self.pool, self.adapters
        while adapters.num_free_pages < adapters.num_pages_of(adapter_id):
            if _is_before(pool.oldest_reclaimable, adapters.oldest_idle):
                adapters.take_back(pool.reclaim())
            else:
                adapters.evict_oldest()
        return adapters.load(adapter_id, is_awaited=is_awaited)

    def forget_all(self) -> None:
        """Nothing is cached or resident any more, because the executor lost its state. Nothing may be in use."""
        for page_id in self.pool.forget_all():
            self.adapters.take_back(page_id)
        self.adapters.forget_all()

    def _borrow(self) -> None:
        """Let KV have a page, unless one of its own cached blocks is to go before anything of an adapter's."""
        pool, adapters = self.pool, self.adapters
        while adapters.num_free_pages == 0:
            if not _is_before(adapters.oldest_idle, pool.oldest_idle):
                return
            adapters.evict_oldest()
        pool.borrow(adapters.lend())


def _is_before(use: int | None, other: int | None) -> bool:
    """True if there is a use, and it was before the other one, if there is that."""
    return use is not None and (other is None or use < other)
