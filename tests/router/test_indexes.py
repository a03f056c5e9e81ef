from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.core.ids import ReplicaId
from pomona.router.holders import Holders
from pomona.router.max_tree import ABSENT, ANY, LevelIndex, MaxTree

numbers = st.one_of(st.just(ABSENT), st.integers(-5, 5))


@given(st.lists(st.tuples(st.integers(0, 40), numbers), max_size=80), st.just(ANY) | st.integers(-6, 6))
def test_a_tree_finds_what_a_scan_finds(puts: list[tuple[int, float]], at_least: float):
    tree, plain = MaxTree(), {}
    for index, value in puts:
        tree.put(index, value)
        plain[index] = value
    found = sorted(index for index, value in plain.items() if value != ABSENT and value >= at_least)
    assert tree.first(at_least) == (found[0] if found else None)
    assert tree.last(at_least) == (found[-1] if found else None)
    assert tree.largest == max(plain.values(), default=ABSENT)


def test_an_empty_tree_finds_nothing_even_without_a_bound():
    assert MaxTree().first(ANY) is None
    assert MaxTree().last(ANY) is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.none() | st.tuples(st.integers(0, 6), st.integers(0, 5))), max_size=50),
    st.integers(0, 6),
    st.integers(0, 8),
)
def test_levels_find_what_a_scan_finds_after_every_change(puts, at_least: int, below: int):
    levels, plain = LevelIndex(), {}
    for index, place in puts:
        if place is None:
            levels.drop(index)
            plain.pop(index, None)
        else:
            levels.put(index, *place)
            plain[index] = place
        fitting = [(level, index) for index, (level, value) in plain.items() if value >= at_least]
        assert levels.first_of_lowest(at_least) == min(fitting, default=(0, None))[1]
        under = [pair for pair in fitting if pair[0] < below]
        assert levels.last_of_highest(at_least, below) == max(under, default=(0, None))[1]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcdef")), max_size=60),
    st.integers(1, 6),
)
def test_holders_are_the_replicas_that_used_a_thing_and_did_not_drop_it_since(uses, room: int):
    sizes = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 3, "f": 7}
    holders: Holders[str] = Holders()
    plain: dict[int, list[str]] = {k: [] for k in range(4)}
    for k in plain:
        holders.replace(ReplicaId(k), room, ())
    last_use: dict[tuple[int, str], int] = {}
    for moment, (replica, thing) in enumerate(uses):
        holders.use(ReplicaId(replica), thing, sizes[thing])
        last_use[replica, thing] = moment
        held = plain[replica]
        if thing in held:
            held.remove(thing)
        if sizes[thing] <= room:
            while sum(sizes[h] for h in held) + sizes[thing] > room:
                held.pop(0)
            held.append(thing)
    for thing in sizes:
        expected = sorted((k for k in plain if thing in plain[k]), key=lambda k: -last_use[k, thing])
        assert holders.latest(thing, 9, plain) == expected
        assert holders.latest(thing, 1, plain) == expected[:1]
        assert holders.latest(thing, 1, (0, 2)) == [k for k in expected if k in (0, 2)][:1]
        assert all(holders.has(ReplicaId(k), thing) == (k in expected) for k in plain)


def test_a_forgotten_replica_holds_nothing():
    holders: Holders[str] = Holders()
    holders.replace(ReplicaId(0), 4, [("a", 1), ("b", 1)])
    holders.forget(ReplicaId(0))
    assert holders.latest("a", 3, [ReplicaId(0)]) == []
    holders.forget(ReplicaId(0))
