"""Accounting of KV blocks: who holds how many references, which are free, which are cached and next to evict.

Knows block numbers and opaque keys only; what a key means is the prefix cache's business, and the KV itself lives in
the executor. Every operation is O(1) per block.
"""

from collections import OrderedDict
from collections.abc import Iterable

from pomona.core.ids import BlockId


class BlockPool:
    """Blocks ``0 .. num_blocks - 1``, each in exactly one state.

    *Blank*: no references, no key. *Used*: at least one reference, with or without a key. *Idle*: no references, but
    found by its key until it is evicted, least recently used first. Blank and idle blocks are free.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_refs = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._blank = [BlockId(index) for index in reversed(range(num_blocks))]
        self._idle: OrderedDict[BlockId, None] = OrderedDict()
        self._block_of: dict[bytes, BlockId] = {}

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out."""
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._blank) - len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by a key, used or idle."""
        return len(self._block_of)

    def num_refs(self, block_id: BlockId) -> int:
        """Number of sequences that hold the block."""
        return self._num_refs[block_id]

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """Hand out blocks with one reference each and unknown contents: blank ones first, then the idle ones that were
        not used for longest, which are forgotten by the cache. The caller has checked ``num_free``."""
        assert 0 <= num_blocks <= self.num_free, f"{num_blocks} blocks asked, {self.num_free} free"
        block_ids = []
        for _ in range(num_blocks):
            block_id = self._blank.pop() if self._blank else self._evict()
            assert self._num_refs[block_id] == 0
            self._num_refs[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def share(self, block_ids: Iterable[BlockId]) -> None:
        """Add one reference to each of these cached blocks."""
        for block_id in block_ids:
            assert self._keys[block_id] is not None, f"block {block_id} is not cached"
            if self._num_refs[block_id] == 0:
                del self._idle[block_id]
            self._num_refs[block_id] += 1

    def release(self, block_ids: list[BlockId]) -> None:
        """Drop one reference of each block of a table. The table's end becomes least recently used first, so that a
        chain is evicted from its tail and what is left of it can still be found."""
        for block_id in reversed(block_ids):
            self._num_refs[block_id] -= 1
            num_refs = self._num_refs[block_id]
            assert num_refs >= 0, f"block {block_id} released more often than held"
            if num_refs == 0:
                if self._keys[block_id] is None:
                    self._blank.append(block_id)
                else:
                    self._idle[block_id] = None

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
        return self._block_of.get(key)

    def num_idle(self, block_ids: Iterable[BlockId]) -> int:
        """How many of these cached blocks nobody holds: sharing them makes that many fewer free."""
        return sum(self._num_refs[block_id] == 0 for block_id in block_ids)

    def withdraw(self, block_ids: Iterable[BlockId]) -> None:
        """Make these used blocks unfindable, because their contents are not to be trusted."""
        for block_id in block_ids:
            assert self._num_refs[block_id] > 0, "only used blocks are withdrawn"
            key = self._keys[block_id]
            if key is not None:
                del self._block_of[key]
                self._keys[block_id] = None

    def forget_all(self) -> None:
        """Make every block unfindable, because the contents of all were lost. Nothing may be used."""
        assert self.num_used == 0, "used blocks cannot be forgotten"
        while self._idle:
            self._blank.append(self._evict())

    def _evict(self) -> BlockId:
        block_id, _ = self._idle.popitem(last=False)
        key = self._keys[block_id]
        assert key is not None, "idle blocks have keys"
        del self._block_of[key]
        self._keys[block_id] = None
        return block_id
