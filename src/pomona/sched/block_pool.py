"""Accounting of KV blocks: who holds how many references, which are free, which are cached and next to evict.

Knows block numbers and opaque keys only; what a key means is the prefix cache's business, and the KV itself lives in
the executor. Every operation is O(1) per block.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from pomona.core.ids import BlockId, PageId


class _Free:
    """Blocks that nobody holds: blank ones, and idle ones with when they became so, least recently used first."""

    __slots__ = ("blank", "idle")

    def __init__(self, block_ids: Iterable[BlockId] = ()) -> None:
        self.blank: dict[BlockId, None] = dict.fromkeys(block_ids)
        self.idle: OrderedDict[BlockId, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.blank) + len(self.idle)


class _LentPage:
    """Blocks of an adapter page that KV has."""

    __slots__ = ("num_blank", "num_used")

    def __init__(self, num_blocks: int) -> None:
        self.num_blank = num_blocks
        self.num_used = 0


class BlockPool:
    """Blocks ``0 .. num_own_blocks - 1``, and those of the adapter pages lent to KV, each in exactly one state.

    *Blank*: no references, no key. *Used*: at least one reference, with or without a key. *Idle*: no references, but
    found by its key until it is evicted, least recently used first. Blank and idle blocks are free.

    Page ``j`` is the ``blocks_per_page`` blocks from ``num_own_blocks + j * blocks_per_page`` on. A lent page of which
    no block is used is *reclaimable*; one whose blocks are all blank goes back at once.

    Args:
        num_own_blocks: blocks that are KV's for ever.
        num_pages: adapter pages that could be lent.
        blocks_per_page: of each.
        clock: orders uses, here and elsewhere.
    """

    def __init__(
        self, num_own_blocks: int, num_pages: int = 0, blocks_per_page: int = 0, clock: Iterator[int] | None = None
    ) -> None:
        self.num_own_blocks = num_own_blocks
        self.blocks_per_page = blocks_per_page
        self.is_confined = False
        """While True, KV keeps to its own blocks: those of lent pages are neither found nor handed out."""
        num_blocks = num_own_blocks + num_pages * blocks_per_page
        self._clock = itertools.count() if clock is None else clock
        self._num_refs = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._own = _Free(BlockId(index) for index in reversed(range(num_own_blocks)))
        self._lent = _Free()
        self._pages: dict[PageId, _LentPage] = {}
        # Lent pages of which no block is used, with when that came to be, longest ago first.
        self._reclaimable: OrderedDict[PageId, int] = OrderedDict()
        self._block_of: dict[bytes, BlockId] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks that KV has now."""
        return self.num_own_blocks + len(self._pages) * self.blocks_per_page

    @property
    def lent_page_ids(self) -> tuple[PageId, ...]:
        """Pages that KV has now."""
        return tuple(self._pages)

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out."""
        return len(self._own) if self.is_confined else len(self._own) + len(self._lent)

    @property
    def num_blank(self) -> int:
        """Those of them for which nothing is evicted."""
        return len(self._own.blank) if self.is_confined else len(self._own.blank) + len(self._lent.blank)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._own) - len(self._lent)

    @property
    def num_cached(self) -> int:
        """Blocks that have a key, used or idle."""
        return len(self._block_of)

    @property
    def num_reclaimable_pages(self) -> int:
        """Lent pages that ``reclaim`` could give."""
        return len(self._reclaimable)

    @property
    def oldest_idle(self) -> int | None:
        """When the idle block that is evicted next was last used; None if there is none."""
        return self._next(self._own if self.is_confined else self._oldest())

    @property
    def oldest_reclaimable(self) -> int | None:
        """When the page that is reclaimed next was last used; None if there is none."""
        return next(iter(self._reclaimable.values()), None)

    def num_refs(self, block_id: BlockId) -> int:
        """Number of sequences that hold the block."""
        return self._num_refs[block_id]

    def page_of(self, block_id: BlockId) -> PageId | None:
        """The lent page that the block is part of; None if it is KV's own."""
        if block_id < self.num_own_blocks:
            return None
        return PageId((block_id - self.num_own_blocks) // self.blocks_per_page)

    def num_refs_in(self, page_id: PageId) -> int:
        """References of all blocks of a page together."""
        return sum(self._num_refs[block_id] for block_id in self._blocks_of(page_id))

    def borrow(self, page_id: PageId) -> None:
        """Take over an adapter page, as blank blocks."""
        assert page_id not in self._pages, "a page is lent once"
        self._pages[page_id] = _LentPage(self.blocks_per_page)
        self._reclaimable[page_id] = next(self._clock)
        self._lent.blank.update((BlockId(index), None) for index in reversed(self._blocks_of(page_id)))

    def reclaim(self) -> PageId:
        """Give back the page of which no block has been used for longest; what it cached is forgotten."""
        page_id = next(iter(self._reclaimable))
        self._give_back(page_id)
        return page_id

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """Hand out blocks with one reference each and unknown contents: blank ones first, own before lent, then the
        idle ones that were not used for longest, which are forgotten by the cache. The caller has checked
        ``num_free``."""
        assert 0 <= num_blocks <= self.num_free, f"{num_blocks} blocks asked, {self.num_free} free"
        block_ids = []
        for _ in range(num_blocks):
            if self._own.blank:
                block_id, _ = self._own.blank.popitem()
            elif self._lent.blank and not self.is_confined:
                block_id, _ = self._lent.blank.popitem()
                self._pages[self._page_of(block_id)].num_blank -= 1
            else:
                block_id = self._evict()
            assert self._num_refs[block_id] == 0
            self._num_refs[block_id] = 1
            if block_id >= self.num_own_blocks:
                self._begin_use(block_id)
            block_ids.append(block_id)
        return block_ids

    def share(self, block_ids: Iterable[BlockId]) -> None:
        """Add one reference to each of these cached blocks."""
        for block_id in block_ids:
            assert self._keys[block_id] is not None, f"block {block_id} is not cached"
            if self._num_refs[block_id] == 0:
                if block_id < self.num_own_blocks:
                    del self._own.idle[block_id]
                else:
                    del self._lent.idle[block_id]
                    self._begin_use(block_id)
            self._num_refs[block_id] += 1

    def release(self, block_ids: list[BlockId]) -> list[PageId]:
        """Drop one reference of each block of a table. The table's end becomes least recently used first, so that a
        chain is evicted from its tail and what is left of it can still be found.

        Returns:
            Lent pages that went back, because nothing is in them any more.
        """
        blank_pages: list[PageId] = []
        for block_id in reversed(block_ids):
            self._num_refs[block_id] -= 1
            num_refs = self._num_refs[block_id]
            assert num_refs >= 0, f"block {block_id} released more often than held"
            if num_refs == 0:
                is_own = block_id < self.num_own_blocks
                free = self._own if is_own else self._lent
                if self._keys[block_id] is None:
                    free.blank[block_id] = None
                else:
                    free.idle[block_id] = next(self._clock)
                if not is_own and self._end_use(block_id):
                    blank_pages.append(self._page_of(block_id))
        return blank_pages

    def publish(self, block_id: BlockId, key: bytes) -> None:
        """Make a used block findable. Its contents must have been computed, and must not change while it has the key.
        A key that another block has already stays with that block."""
        assert self._num_refs[block_id] > 0, "only used blocks are published"
        assert self._keys[block_id] is None, "published twice"
        if key not in self._block_of:
            self._block_of[key] = block_id
            self._keys[block_id] = key

    def find(self, key: bytes) -> BlockId | None:
        """The block published under the key, if it is still cached."""
        block_id = self._block_of.get(key)
        if self.is_confined and block_id is not None and block_id >= self.num_own_blocks:
            return None
        return block_id

    def own_part(self, block_ids: list[BlockId]) -> list[BlockId]:
        """Those before the first that is in a lent page."""
        return list(itertools.takewhile(lambda block_id: block_id < self.num_own_blocks, block_ids))

    def num_idle(self, block_ids: Iterable[BlockId]) -> int:
        """How many of these cached blocks nobody holds: sharing them makes that many fewer free."""
        return sum(self._num_refs[block_id] == 0 for block_id in block_ids)

    def num_reclaimable_in(self, block_ids: Iterable[BlockId]) -> int:
        """How many pages fewer are reclaimable once these blocks are used."""
        return len({page_id for one in block_ids if (page_id := self.page_of(one)) in self._reclaimable})

    def withdraw(self, block_ids: Iterable[BlockId]) -> None:
        """Make these used blocks unfindable, because their contents are not to be trusted."""
        for block_id in block_ids:
            assert self._num_refs[block_id] > 0, "only used blocks are withdrawn"
            key = self._keys[block_id]
            if key is not None:
                del self._block_of[key]
                self._keys[block_id] = None

    def forget_all(self) -> list[PageId]:
        """Make every block unfindable, because the contents of all were lost. Nothing may be used.

        Returns:
            The pages that were lent: all went back.
        """
        assert self.num_used == 0, "used blocks cannot be forgotten"
        page_ids = [self.reclaim() for _ in range(len(self._reclaimable))]
        while self._own.idle:
            self._own.blank[self._evict()] = None
        return page_ids

    def _page_of(self, block_id: BlockId) -> PageId:
        page_id = self.page_of(block_id)
        assert page_id is not None
        return page_id

    def _blocks_of(self, page_id: PageId) -> range:
        """Blocks of a page."""
        first = self.num_own_blocks + page_id * self.blocks_per_page
        return range(first, first + self.blocks_per_page)

    def _begin_use(self, block_id: BlockId) -> None:
        """Note that a lent block has its first reference."""
        page_id = self._page_of(block_id)
        page = self._pages[page_id]
        if page.num_used == 0:
            del self._reclaimable[page_id]
        page.num_used += 1

    def _end_use(self, block_id: BlockId) -> bool:
        """Note that a lent block has no reference any more; True if its page went back."""
        page_id = self._page_of(block_id)
        page = self._pages[page_id]
        page.num_used -= 1
        page.num_blank += self._keys[block_id] is None
        if page.num_used > 0:
            return False
        self._reclaimable[page_id] = next(self._clock)
        if page.num_blank < self.blocks_per_page:
            return False
        self._give_back(page_id)
        return True

    def _give_back(self, page_id: PageId) -> None:
        del self._reclaimable[page_id], self._pages[page_id]
        for block_id in map(BlockId, self._blocks_of(page_id)):
            if self._keys[block_id] is None:
                del self._lent.blank[block_id]
            else:
                del self._lent.idle[block_id]
                self._forget_key(block_id)

    def _evict(self) -> BlockId:
        free = self._own if self.is_confined else self._oldest()
        block_id, _ = free.idle.popitem(last=False)
        self._forget_key(block_id)
        return block_id

    def _forget_key(self, block_id: BlockId) -> None:
        key = self._keys[block_id]
        assert key is not None, "idle blocks have keys"
        del self._block_of[key]
        self._keys[block_id] = None

    def _oldest(self) -> _Free:
        """Where the idle block is that was not used for longest."""
        own, lent = self._next(self._own), self._next(self._lent)
        return self._own if lent is None or (own is not None and own < lent) else self._lent

    @staticmethod
    def _next(free: _Free) -> int | None:
        return next(iter(free.idle.values()), None)
