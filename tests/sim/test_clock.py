import pytest

from pomona.sim.clock import EventHeap


def recorder(heap):
    seen = []
    return seen, lambda name: lambda: seen.append((heap.now_s, name))


def test_events_happen_in_order_of_time_and_equal_times_in_order_of_their_making():
    heap = EventHeap()
    seen, note = recorder(heap)
    heap.at(2.0, note("late"))
    heap.at(1.0, note("first"))
    heap.at(1.0, note("second"))
    heap.run()
    assert seen == [(1.0, "first"), (1.0, "second"), (2.0, "late")]
    assert heap.num_handled == 3


def test_an_event_may_make_another_at_its_own_time_which_comes_after_those_already_there():
    heap = EventHeap()
    seen, note = recorder(heap)
    heap.at(1.0, lambda: heap.at(1.0, note("made")))
    heap.at(1.0, note("there"))
    heap.run()
    assert seen == [(1.0, "there"), (1.0, "made")]


def test_a_run_stops_at_its_limit_and_goes_on_from_there():
    heap = EventHeap()
    seen, note = recorder(heap)
    heap.at(1.0, note("in"))
    heap.at(3.0, note("out"))
    heap.run(until_s=2.0)
    assert (seen, heap.now_s) == ([(1.0, "in")], 2.0)
    heap.after(0.5, note("added"))
    heap.run()
    assert seen == [(1.0, "in"), (2.5, "added"), (3.0, "out")]


def test_the_past_cannot_be_changed():
    heap = EventHeap()
    heap.run(until_s=1.0)
    with pytest.raises(AssertionError):
        heap.at(0.5, lambda: None)
