from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.core.ids import AdapterId, ReplicaId
from pomona.router.punica import consolidation
from pomona.router.snapshot import ReplicaState, RouteRequest

LIMIT = 6


def _fleet(sizes: list[tuple[int, int]]):
    """(requests, free KV tokens) per replica; every request fills 10 KV tokens."""
    request = RouteRequest(10, 10)
    states, running = [], {}
    for k, (num_requests, num_free) in enumerate(sizes):
        state = ReplicaState(ReplicaId(k))
        state.num_requests, state.num_free_kv_tokens = num_requests, num_free
        states.append(state)
        running[state.replica_id] = [((k, i), request) for i in range(num_requests)]
    return states, running


def _after(states, moves):
    loads = {state.replica_id: state.num_requests for state in states}
    free = {state.replica_id: state.num_free_kv_tokens for state in states}
    for move in moves:
        loads[move.source] -= 1
        loads[move.target] += 1
        free[move.target] -= 10
    return loads, free


def test_light_replicas_are_emptied_into_the_fullest_with_room():
    states, running = _fleet([(1, 100), (5, 100), (2, 100), (4, 100)])
    moves = consolidation(states, running, LIMIT, max_moves=10)
    loads, _ = _after(states, moves)
    assert loads == {0: 0, 1: 6, 2: 0, 3: 6}


def test_a_replica_that_cannot_be_emptied_whole_is_left_alone():
    states, running = _fleet([(3, 100), (5, 100)])
    assert consolidation(states, running, LIMIT, max_moves=10) == []


def test_no_more_requests_move_than_allowed():
    states, running = _fleet([(2, 100), (2, 100), (5, 100), (3, 100)])
    assert len(consolidation(states, running, LIMIT, max_moves=3)) <= 3


def test_the_pages_of_adapters_that_move_are_counted_where_they_go():
    states, running = _fleet([(3, 0), (3, 55)])
    for adapters, num_moves in (("aaa", 3), ("abc", 0)):
        running[states[0].replica_id] = [
            ((0, i), RouteRequest(10, 10, AdapterId(name), num_page_kv_tokens=20)) for i, name in enumerate(adapters)
        ]
        assert len(consolidation(states, running, LIMIT, max_moves=10)) == num_moves


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, LIMIT), st.integers(0, 60)), max_size=10), st.integers(0, 20))
def test_moves_empty_replicas_whole_and_never_overfill_any(sizes, max_moves: int):
    states, running = _fleet(sizes)
    moves = consolidation(states, running, LIMIT, max_moves)
    loads, free = _after(states, moves)
    sources, targets = {move.source for move in moves}, {move.target for move in moves}
    assert len(moves) <= max_moves
    assert not sources & targets
    assert all(loads[source] == 0 for source in sources)
    assert all(loads[target] <= LIMIT and free[target] >= 0 for target in targets)
    assert len({move.key for move in moves}) == len(moves)
    assert sum(loads.values()) == sum(state.num_requests for state in states)
