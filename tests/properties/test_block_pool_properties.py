"""BlockPool against a model that keeps owners, keys and the order of last use as plain lists."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pomona.sched.block_pool import BlockPool

KEYS = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])


class BlockPoolMachine(RuleBasedStateMachine):
    """Tables of blocks come, share, publish and go."""

    @initialize(num_blocks=st.integers(1, 8))
    def build(self, num_blocks: int):
        self.pool = BlockPool(num_blocks)
        self.tables: list[list[int]] = []
        self.block_of: dict[bytes, int] = {}
        self.idle: list[int] = []

    def num_owners(self, block_id: int) -> int:
        return sum(table.count(block_id) for table in self.tables)

    @property
    def blank(self) -> set[int]:
        used = {block_id for table in self.tables for block_id in table}
        return set(range(self.pool.num_blocks)) - used - set(self.idle)

    @rule(data=st.data())
    def allocate(self, data: st.DataObject):
        count = data.draw(st.integers(0, self.pool.num_free))
        blank = self.blank
        evicted = self.idle[: max(0, count - len(blank))]
        got = self.pool.allocate(count)
        assert len(set(got)) == count
        assert set(got) >= set(evicted), "the least recently used are evicted"
        assert set(got) - set(evicted) <= blank, "and only when no blank block is left"
        self.idle = self.idle[len(evicted) :]
        self.block_of = {key: block_id for key, block_id in self.block_of.items() if block_id not in evicted}
        self.tables.append(got)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        cached = set(self.block_of.values())
        self.idle += [block_id for block_id in reversed(table) if block_id in cached and not self.num_owners(block_id)]

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
        self.pool.share(found)
        self.idle = [block_id for block_id in self.idle if block_id not in found]
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject):
        table = data.draw(st.sampled_from(self.tables))
        self.pool.withdraw(table)
        self.block_of = {key: block_id for key, block_id in self.block_of.items() if block_id not in table}

    @precondition(lambda self: not any(self.tables))
    @rule()
    def forget_all(self):
        self.pool.forget_all()
        self.block_of.clear()
        self.idle.clear()

    @invariant()
    def books_balance(self):
        pool = self.pool
        assert pool.num_free + pool.num_used == pool.num_blocks
        assert [pool.num_refs(index) for index in range(pool.num_blocks)] == [
            self.num_owners(index) for index in range(pool.num_blocks)
        ]
        assert pool.num_free == len(self.blank) + len(self.idle)
        assert {key: pool.find(key) for key in (b"a", b"b", b"c", b"d", b"e")} == {
            key: self.block_of.get(key) for key in (b"a", b"b", b"c", b"d", b"e")
        }
        assert pool.num_cached == len(self.block_of)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
