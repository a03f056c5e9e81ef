"""Adapter pages: who gets them, who keeps them, who loses them."""

import pytest

from pomona.core.errors import AdapterError
from pomona.sched.adapter_slots import AdapterSlots
from support.engine import make_adapter


def make_slots(num_pages: int = 4, **num_pages_of: int) -> AdapterSlots:
    """Slots with registered adapters, by name and number of pages."""
    slots = AdapterSlots(num_pages)
    for name, count in num_pages_of.items():
        slots.register(make_adapter(name, count))
    return slots


def load(slots: AdapterSlots, *names: str) -> None:
    """Make the adapters resident, one after the other, and tell the executor of the evictions."""
    for name in names:
        slots.load(name)
    slots.take_evictions()
    slots.take_loads()


def resident(slots: AdapterSlots) -> list[str]:
    return [status.adapter_id for status in slots.statuses() if status.is_resident]


def test_an_adapter_gets_the_pages_it_needs():
    slots = make_slots(4, a=3)
    assert not slots.is_resident("a")
    assert slots.can_load("a")
    assert len(set(slots.load("a").page_ids)) == 3
    assert (slots.num_free_pages, slots.num_resident, slots.num_pinned, slots.num_loads) == (1, 1, 0, 1)


def test_an_adapter_that_never_fits_is_refused():
    slots = make_slots(2)
    with pytest.raises(AdapterError, match=r"needs 3 adapter pages \(rank 24\), but num_adapter_pages is 2"):
        slots.register(make_adapter("a", 3))
    assert not slots.can_use("a")


def test_an_adapter_without_pages_is_resident_too():
    slots = make_slots(0, a=0)
    assert slots.load("a").page_ids == ()
    assert resident(slots) == ["a"]


def test_the_least_recently_used_adapter_is_evicted_first():
    slots = make_slots(3, a=1, b=1, c=1, d=1)
    load(slots, "a", "b", "c")
    slots.use("a")
    slots.pin("a")
    slots.unpin("a")
    slots.load("d")
    assert slots.take_evictions() == ("b",)
    assert slots.take_evictions() == ()
    assert resident(slots) == ["a", "c", "d"]


def test_as_many_are_evicted_as_the_newcomer_needs():
    slots = make_slots(4, a=1, b=2, c=1, d=3)
    load(slots, "a", "b", "c")
    slots.load("d")
    assert slots.take_evictions() == ("a", "b")
    assert slots.num_free_pages == 0
    assert slots.num_evictions == 2


def test_a_pinned_adapter_is_never_evicted():
    slots = make_slots(2, a=1, b=1, c=2)
    load(slots, "a", "b")
    slots.use("a")
    slots.pin("a")
    assert not slots.can_load("c")
    with pytest.raises(AssertionError):
        slots.load("c")
    slots.unpin("a")
    assert slots.can_load("c")
    slots.load("c")
    assert resident(slots) == ["c"]


def test_pins_are_counted():
    slots = make_slots(1, a=1, b=1)
    load(slots, "a")
    slots.use("a")
    slots.use("a")
    assert slots.pin("a") == slots.pin("a") == 1
    slots.unpin("a")
    assert not slots.can_load("b")
    slots.unpin("a")
    assert slots.can_load("b")


def test_adapters_are_ordered_by_when_they_were_loaded():
    slots = make_slots(2, a=1, b=1)
    load(slots, "b", "a")
    slots.use("a")
    slots.use("b")
    assert 0 < slots.pin("b") < slots.pin("a")


def test_retiring_an_unused_adapter_frees_it_once_the_executor_is_told():
    slots = make_slots(1, a=1)
    load(slots, "a")
    slots.retire("a")
    assert not slots.can_use("a")
    assert slots.has_evictions
    assert slots.take_drained() == []
    assert slots.take_evictions() == ("a",)
    assert slots.take_drained() == ["a"]
    assert slots.take_drained() == []
    assert (slots.num_free_pages, slots.statuses()) == (1, [])


def test_an_adapter_that_is_not_resident_drains_at_once():
    slots = make_slots(1, a=1)
    slots.retire("a")
    assert slots.take_drained() == ["a"]


def test_a_retired_adapter_serves_its_users_to_the_end():
    slots = make_slots(1, a=1)
    slots.use("a")
    slots.retire("a")
    assert not slots.can_use("a")
    slots.load("a")
    slots.pin("a")
    slots.retire("a")
    slots.unpin("a")
    assert slots.take_drained() == []
    slots.end_use("a")
    slots.take_evictions()
    assert slots.take_drained() == ["a"]


def test_retiring_what_is_not_registered_reports_it_once():
    slots = make_slots(1)
    slots.retire("a")
    slots.retire("a")
    assert slots.take_drained() == ["a"]


def test_registering_a_draining_adapter_revives_it():
    slots = make_slots(1, a=1)
    slots.use("a")
    slots.retire("a")
    slots.register(make_adapter("a"))
    assert slots.can_use("a")
    slots.end_use("a")
    assert slots.take_drained() == []
    assert [status.adapter_id for status in slots.statuses()] == ["a"]


def test_registering_a_drained_adapter_withdraws_the_report():
    slots = make_slots(1, a=1)
    load(slots, "a")
    slots.retire("a")
    slots.register(make_adapter("a"))
    assert slots.take_evictions() == ("a",)
    assert slots.take_drained() == []
    assert slots.can_use("a") and not slots.is_resident("a")


def test_statuses_tell_users_pins_and_pages():
    slots = make_slots(2, a=1, b=1)
    slots.use("a")
    slots.use("a")
    (page_id,) = slots.load("a").page_ids
    slots.pin("a")
    slots.retire("a")
    first, second = slots.statuses()
    assert (first.adapter_id, first.page_ids, first.is_draining) == ("a", (page_id,), True)
    assert (first.num_users, first.num_pins, first.is_resident) == (2, 1, True)
    assert (second.page_ids, second.is_draining, second.is_resident) == (None, False, False)


def test_forgetting_leaves_adapters_registered_but_not_resident():
    slots = make_slots(3, a=1, b=1, c=1)
    load(slots, "a", "b")
    slots.load("c")
    slots.forget_all()
    assert (resident(slots), slots.num_free_pages) == ([], 3)
    assert slots.can_use("a")
    assert slots.take_evictions() == ("a", "b"), "what the executor was told of it may still hold"


def test_misuse_is_noticed():
    slots = make_slots(1, a=1)
    with pytest.raises(AssertionError):
        slots.use("b")
    slots.use("a")
    with pytest.raises(AssertionError, match="resident"):
        slots.pin("a")
    slots.load("a")
    slots.pin("a")
    with pytest.raises(AssertionError, match="only users"):
        slots.pin("a")
    with pytest.raises(AssertionError, match="unpins before"):
        slots.end_use("a")
    with pytest.raises(AssertionError, match="pinned"):
        slots.forget_all()
    slots.unpin("a")
    with pytest.raises(AssertionError, match="more often"):
        slots.unpin("a")
