"""AdapterSlots against a model of users, pins and what the executor has been told."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pomona.core.plan import AdapterLoad
from pomona.sched.adapter_slots import AdapterSlots
from support.engine import make_adapter

NAMES = ("a", "b", "c", "d")
NUM_PAGES_OF = {"a": 0, "b": 1, "c": 2, "d": 3}


class AdapterSlotsMachine(RuleBasedStateMachine):
    """Adapters are registered, used, loaded, pinned and retired in any order that the scheduler could choose."""

    @initialize(num_pages=st.integers(3, 5))
    def build(self, num_pages: int):
        self.slots = AdapterSlots(num_pages)
        self.registered: set[str] = set()
        self.draining: set[str] = set()
        self.users: dict[str, int] = dict.fromkeys(NAMES, 0)
        self.pins: dict[str, int] = dict.fromkeys(NAMES, 0)
        self.lru: list[str] = []  # resident adapters, least recently used first
        self.untold: list[str] = []  # evicted, not taken
        self.unloaded: dict[str, bool] = {}  # loaded, not taken: name -> is the step to wait
        self.copying: dict[str, int] = {}  # told of, not heard of: name -> load
        self.told: list[AdapterLoad] = []  # of the latest plan
        self.owed: list[str] = []  # drained, not reported
        self.lent: set[int] = set()

    def evict(self, name: str):
        self.lru.remove(name)
        self.copying.pop(name, None)
        if self.unloaded.pop(name, None) is None:
            self.untold.append(name)

    def drop_if_drained(self, name: str):
        if name in self.draining and self.users[name] == 0:
            if name in self.lru:
                self.evict(name)
            self.draining.discard(name)
            self.registered.discard(name)
            self.owed.append(name)

    @rule(name=st.sampled_from(NAMES))
    def register(self, name: str):
        self.slots.register(make_adapter(name, NUM_PAGES_OF[name]))
        self.registered.add(name)
        self.draining.discard(name)
        if name in self.owed:
            self.owed.remove(name)

    @rule(name=st.sampled_from(NAMES))
    def retire(self, name: str):
        self.slots.retire(name)
        if name in self.registered:
            self.draining.add(name)
            self.drop_if_drained(name)
        elif name not in self.owed:
            self.owed.append(name)

    @rule(name=st.sampled_from(NAMES))
    def use(self, name: str):
        can_use = name in self.registered and name not in self.draining
        assert self.slots.can_use(name) == can_use
        if can_use:
            self.slots.use(name)
            self.users[name] += 1

    @rule(name=st.sampled_from(NAMES))
    def end_use(self, name: str):
        if self.users[name] > self.pins[name]:
            self.slots.end_use(name)
            self.users[name] -= 1
            self.drop_if_drained(name)

    @rule(name=st.sampled_from(NAMES), is_awaited=st.booleans())
    def load_and_pin(self, name: str, is_awaited: bool):
        """What the scheduler does when it starts a sequence."""
        if self.users[name] == self.pins[name]:
            return
        assert self.slots.is_resident(name) == (name in self.lru)
        if name not in self.lru:
            idle = [other for other in self.lru if not self.pins[other]]
            num_free = self.slots.num_free_pages
            can_load = NUM_PAGES_OF[name] <= num_free + sum(NUM_PAGES_OF[other] for other in idle)
            assert self.slots.can_load(name) == can_load
            if not can_load:
                return
            while num_free < NUM_PAGES_OF[name]:
                victim = idle.pop(0)
                num_free += NUM_PAGES_OF[victim]
                self.evict(victim)
            assert len(self.slots.load(name, is_awaited=is_awaited).page_ids) == NUM_PAGES_OF[name]
            self.lru.append(name)
            self.unloaded[name] = is_awaited
        self.slots.pin(name)
        self.pins[name] += 1

    @precondition(lambda self: self.slots.num_free_pages)
    @rule()
    def lend(self):
        page_id = self.slots.lend()
        assert page_id not in self.lent
        self.lent.add(page_id)

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject):
        page_id = data.draw(st.sampled_from(sorted(self.lent)))
        self.slots.take_back(page_id)
        self.lent.remove(page_id)

    @rule(name=st.sampled_from(NAMES))
    def unpin(self, name: str):
        if self.pins[name]:
            self.slots.unpin(name)
            self.pins[name] -= 1
            if not self.pins[name]:
                self.lru.remove(name)
                self.lru.append(name)

    @rule()
    def tell_executor_of_loads(self):
        self.told += self.slots.take_loads()
        for load in self.told:
            if self.unloaded.get(load.adapter_id) is False:
                self.copying[str(load.adapter_id)] = load.load_id
        assert {load.adapter_id: load.is_awaited for load in self.told}.items() >= self.unloaded.items()
        self.unloaded.clear()

    @rule(data=st.data())
    def hear_of_copies(self, data: st.DataObject):
        loading = data.draw(st.frozensets(st.sampled_from([0, *self.copying.values()])))
        self.slots.settle_loads(self.told, loading)
        self.told = []
        self.copying = {name: load_id for name, load_id in self.copying.items() if load_id in loading}

    @rule()
    def tell_executor(self):
        assert self.slots.has_evictions == bool(self.untold)
        assert list(self.slots.take_evictions()) == self.untold
        self.untold.clear()

    @rule()
    def take_drained(self):
        drained = self.slots.take_drained()
        assert drained == [name for name in self.owed if name not in self.untold]
        self.owed = [name for name in self.owed if name in self.untold]

    @precondition(lambda self: not any(self.pins.values()))
    @rule()
    def forget_all(self):
        self.slots.forget_all()
        for name in list(self.lru):
            self.evict(name)
        self.told = []

    @invariant()
    def books_balance(self):
        slots = self.slots
        statuses = {status.adapter_id: status for status in slots.statuses()}
        assert set(statuses) == self.registered
        assert {name for name, status in statuses.items() if status.is_draining} == self.draining
        assert {name for name, status in statuses.items() if status.is_resident} == set(self.lru)
        for name, status in statuses.items():
            assert (status.num_users, status.num_pins) == (self.users[name], self.pins[name])
            assert status.is_resident or status.num_pins == 0, "a pinned adapter is never evicted"
        loading = {name for name, is_awaited in self.unloaded.items() if not is_awaited} | set(self.copying)
        assert {name for name, status in statuses.items() if status.is_loading} == loading
        assert slots.num_loading == len(loading)
        pages = [page_id for status in statuses.values() for page_id in status.page_ids or ()]
        pages.extend(self.lent)
        assert len(set(pages)) == len(pages), "a page is one adapter's, or KV's"
        assert slots.num_free_pages + len(pages) == slots.num_pages
        assert (slots.num_lent_pages, slots.num_used_pages) == (len(self.lent), len(pages) - len(self.lent))
        assert slots.num_resident == len(self.lru)
        assert slots.num_pinned == sum(count > 0 for count in self.pins.values())


TestAdapterSlots = AdapterSlotsMachine.TestCase
TestAdapterSlots.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
