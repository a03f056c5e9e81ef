"""BlockPool against a model that keeps owners, keys, lent pages and the order of last use as plain lists."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pomona.sched.block_pool import BlockPool

KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])


class BlockPoolMachine(RuleBasedStateMachine):
    """Tables of blocks come, share, publish and go; pages are borrowed and given back."""

    @initialize(num_own=st.integers(1, 8), num_pages=st.integers(0, 3), blocks_per_page=st.integers(1, 3))
    def build(self, num_own: int, num_pages: int, blocks_per_page: int):
        self.pool = BlockPool(num_own, num_pages, blocks_per_page)
        self.num_own = num_own
        self.blocks_of = {
            page_id: set(range(num_own + page_id * blocks_per_page, num_own + (page_id + 1) * blocks_per_page))
            for page_id in range(num_pages)
        }
        self.lent: list[int] = []
        self.unused: list[int] = []  # lent pages of which no block is used, longest first
        self.tables: list[list[int]] = []
        self.block_of: dict[bytes, int] = {}
        self.idle: list[int] = []

    def num_owners(self, block_id: int) -> int:
        return sum(table.count(block_id) for table in self.tables)

    @property
    def own(self) -> set[int]:
        return set(range(self.num_own))

    @property
    def blocks(self) -> set[int]:
        return self.own.union(*(self.blocks_of[page_id] for page_id in self.lent))

    @property
    def used(self) -> set[int]:
        return {block_id for table in self.tables for block_id in table}

    @property
    def blank(self) -> set[int]:
        return self.blocks - self.used - set(self.idle)

    def forget(self, block_ids: set[int]):
        self.idle = [block_id for block_id in self.idle if block_id not in block_ids]
        self.block_of = {key: block_id for key, block_id in self.block_of.items() if block_id not in block_ids}

    def note_unused_pages(self):
        """Pages just left come last; those that hold nothing are gone."""
        unused = [page_id for page_id in self.lent if not self.blocks_of[page_id] & self.used]
        known = [page_id for page_id in self.unused if page_id in unused]
        self.unused = known + [page_id for page_id in unused if page_id not in known]

    @precondition(lambda self: len(self.lent) < len(self.blocks_of))
    @rule(data=st.data())
    def borrow(self, data: st.DataObject):
        page_id = data.draw(st.sampled_from(sorted(set(self.blocks_of) - set(self.lent))))
        self.pool.borrow(page_id)
        self.lent.append(page_id)
        self.note_unused_pages()

    @precondition(lambda self: self.unused)
    @rule()
    def reclaim(self):
        page_id = self.unused[0]
        assert self.pool.reclaim() == page_id, "the page not used for longest"
        self.forget(self.blocks_of[page_id])
        self.lent.remove(page_id)
        self.note_unused_pages()

    @rule()
    def confine(self):
        self.pool.is_confined = not self.pool.is_confined

    @rule(data=st.data())
    def allocate(self, data: st.DataObject):
        count = data.draw(st.integers(0, self.pool.num_free))
        allowed = self.own if self.pool.is_confined else self.blocks
        blank = self.blank & allowed
        evicted = [block_id for block_id in self.idle if block_id in allowed][: max(0, count - len(blank))]
        got = self.pool.allocate(count)
        assert len(set(got)) == count
        assert set(got) >= set(evicted), "the least recently used are evicted"
        assert set(got) - set(evicted) <= blank, "and only when no blank block is left"
        assert not set(got) - self.own or not (blank & self.own) - set(got), "own ones come first"
        self.forget(set(evicted))
        self.tables.append(got)
        self.note_unused_pages()

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        back = self.pool.release(table)
        cached = set(self.block_of.values())
        self.idle += [block_id for block_id in reversed(table) if block_id in cached and not self.num_owners(block_id)]
        touched = {page_id for page_id in self.lent if self.blocks_of[page_id] & set(table)}
        assert set(back) == {page_id for page_id in touched if self.blocks_of[page_id] <= self.blank}
        assert len(back) == len(set(back))
        self.lent = [page_id for page_id in self.lent if page_id not in back]
        # From the table's end: a page is unused from when its first block in the table went.
        left = [page_id for block_id in reversed(table) if (page_id := self.pool.page_of(block_id)) is not None]
        order = [page_id for index, page_id in enumerate(left) if page_id not in left[index + 1 :]]
        unused = [page_id for page_id in order if page_id in self.lent and not self.blocks_of[page_id] & self.used]
        self.unused = [page_id for page_id in self.unused if page_id in self.lent] + unused

    @rule(key=KEYS, data=st.data())
    def publish(self, key: bytes, data: st.DataObject):
        cached = set(self.block_of.values())
        candidates = sorted({block_id for table in self.tables for block_id in table} - cached)
        if candidates:
            block_id = data.draw(st.sampled_from(candidates))
            self.pool.publish(block_id, key)
            self.block_of.setdefault(key, block_id)

    @rule(keys=st.lists(KEYS, unique=True))
    def share(self, keys: list[bytes]):
        found = [block_id for key in keys if (block_id := self.pool.find(key)) is not None]
        assert self.pool.num_idle(found) == len(set(found) & set(self.idle))
        num_unused = sum(bool(self.blocks_of[page_id] & set(found)) for page_id in self.unused)
        assert self.pool.num_reclaimable_in(found) == num_unused
        assert (
            self.pool.own_part(found) == found[: next((i for i, one in enumerate(found) if one >= self.num_own), None)]
        )
        self.pool.share(found)
        self.idle = [block_id for block_id in self.idle if block_id not in found]
        self.tables.append(found)
        self.note_unused_pages()

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject):
        table = data.draw(st.sampled_from(self.tables))
        self.pool.withdraw(table)
        self.block_of = {key: block_id for key, block_id in self.block_of.items() if block_id not in table}

    @precondition(lambda self: not any(self.tables))
    @rule()
    def forget_all(self):
        assert sorted(self.pool.forget_all()) == sorted(self.lent)
        self.block_of.clear()
        self.idle.clear()
        self.lent.clear()
        self.unused.clear()

    @invariant()
    def books_balance(self):
        pool = self.pool
        assert sorted(pool.lent_page_ids) == sorted(self.lent)
        assert pool.num_blocks == len(self.blocks)
        assert pool.num_used == len(self.used)
        num_in_all = self.num_own + sum(map(len, self.blocks_of.values()))
        assert [pool.num_refs(index) for index in range(num_in_all)] == [
            self.num_owners(index) for index in range(num_in_all)
        ]
        assert all(
            pool.num_refs_in(page_id) == sum(map(self.num_owners, self.blocks_of[page_id])) for page_id in self.lent
        )
        assert pool.num_reclaimable_pages == len(self.unused)
        allowed = self.own if pool.is_confined else self.blocks
        assert (pool.num_blank, pool.num_free) == (
            len(self.blank & allowed),
            len((self.blank | set(self.idle)) & allowed),
        )
        assert {key: pool.find(key) for key in (b"a", b"b", b"c", b"d", b"e")} == {
            key: block_id if (block_id := self.block_of.get(key)) in allowed else None
            for key in (b"a", b"b", b"c", b"d", b"e")
        }
        assert pool.num_cached == len(self.block_of)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
