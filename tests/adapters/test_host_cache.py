"""Which adapters stay in host memory."""

from hypothesis import given
from hypothesis import strategies as st

from pomona.adapters.host_cache import HostCache
from pomona.core.ids import AdapterId


def _use(cache: HostCache, adapter_id: str, num_times: int = 1) -> None:
    for _ in range(num_times):
        cache.hold(AdapterId(adapter_id))
        cache.release(AdapterId(adapter_id))


def test_what_is_used_often_stays():
    cache = HostCache(30)
    for name in "abc":
        cache.add(AdapterId(name), 10, 1.0)
    _use(cache, "a", 3)
    _use(cache, "c", 2)
    assert cache.victims(10) == ["b"]
    assert cache.victims(20) == ["b", "c"]


def test_what_is_small_for_what_it_costs_to_load_stays():
    cache = HostCache(100)
    cache.add(AdapterId("large"), 50, 1.0)
    cache.add(AdapterId("small"), 10, 1.0)
    cache.add(AdapterId("far away"), 40, 100.0)
    assert cache.victims(20) == ["large"]


def test_what_was_popular_once_goes_in_the_end():
    cache = HostCache(20)
    cache.add(AdapterId("once"), 10, 1.0)
    _use(cache, "once", 20)
    for index in range(100):
        (victim,) = cache.victims(10) or ["nothing"] if index else ["nothing"]
        if victim == "once":
            return
        if index:
            cache.evict(AdapterId(victim))
        cache.add(AdapterId(str(index)), 10, 1.0)
        _use(cache, str(index), 2)
    raise AssertionError("it stayed for ever")


def test_what_is_held_or_pinned_is_never_chosen():
    cache = HostCache(20)
    cache.add(AdapterId("held"), 10, 1.0)
    cache.add(AdapterId("pinned"), 10, 1.0)
    cache.hold(AdapterId("held"))
    cache.pin(frozenset({AdapterId("pinned")}))
    assert cache.victims(5) is None
    cache.release(AdapterId("held"))
    assert cache.victims(5) == ["held"]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 40), st.booleans()), max_size=60))
def test_bytes_are_those_of_what_is_kept_and_never_more_than_the_budget(events):
    cache = HostCache(100)
    sizes: dict[str, int] = {}
    for number, num_bytes, is_use in events:
        name = AdapterId(str(number))
        if is_use and name in cache:
            _use(cache, name)
        elif name not in cache:
            for victim in cache.victims(num_bytes) or []:
                assert cache.evict(victim) == sizes.pop(victim)
            cache.add(name, num_bytes, 1.0)
            sizes[name] = num_bytes
        assert cache.num_bytes == sum(sizes.values()) <= 100
        assert set(cache.ids) == set(sizes)
