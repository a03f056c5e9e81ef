"""Block keys cannot collide by construction, and blocks are shared exactly when their KV is equal and computed."""

import gc
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.core.request import SamplingParams
from pomona.sched.prefix_cache import KEY_BYTES, ROOT_KEY, block_key, key_namespace
from pomona.sched.sequence import Sequence
from support.engine import EngineHarness, make_request

TOKENS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
NAMESPACES = st.tuples(st.binary(max_size=6), st.none() | st.text(max_size=6))


def with_prompt_logprobs(max_tokens: int = 4) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, prompt_logprobs=0)


def cached_tokens(harness: EngineHarness, name: str) -> int:
    return harness.endings[name].outputs[-1].num_cached_tokens


def num_alive_sequences() -> int:
    gc.collect()
    return sum(type(alive) is Sequence for alive in gc.get_objects())


@given(NAMESPACES, NAMESPACES)
def test_namespaces_are_equal_only_for_equal_salt_and_adapter(first, second):
    assert (key_namespace(*first) == key_namespace(*second)) == (first == second)


@given(st.tuples(NAMESPACES, TOKENS), st.tuples(NAMESPACES, TOKENS))
def test_what_is_hashed_is_unambiguous(first, second):
    keys = [block_key(key_namespace(*namespace), ROOT_KEY, tokens) for namespace, tokens in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)


def test_parts_cannot_be_moved_into_each_other():
    pairs = [(b"", None), (b"", ""), (b"a", None), (b"", "a"), (b"a", "b"), (b"ab", None), (b"", "ab"), (b"aa", "")]
    assert len({key_namespace(salt, adapter_id) for salt, adapter_id in pairs}) == len(pairs)
    # A salt that imitates the encoding of another tenant's salt and adapter.
    forged = key_namespace(b"s", "x")[8:]
    assert not key_namespace(forged, None).startswith(key_namespace(b"s", "x"))


def test_a_key_depends_on_every_part():
    namespace, parent = key_namespace(b"s", "a"), block_key(b"", ROOT_KEY, [9])
    keys = {
        block_key(namespace, ROOT_KEY, [1, 2]),
        block_key(namespace, parent, [1, 2]),
        block_key(namespace, ROOT_KEY, [2, 1]),
        block_key(namespace, ROOT_KEY, [1, 2, 0]),
        block_key(key_namespace(b"t", "a"), ROOT_KEY, [1, 2]),
        block_key(key_namespace(b"s", "b"), ROOT_KEY, [1, 2]),
    }
    assert len(keys) == 6
    assert {len(key) for key in keys} == {KEY_BYTES}


def test_a_second_request_takes_the_full_blocks_of_the_first():
    harness = EngineHarness()
    harness.add(make_request("first", prompt=10))
    harness.run()
    harness.add(make_request("second", prompt=10))
    harness.run()
    assert cached_tokens(harness, "first") == 0
    assert cached_tokens(harness, "second") == 8
    assert [entry.num_scheduled_tokens for plan in harness.executor.plans for entry in plan.seqs if entry.start] == [
        10,
        2,
    ]


def test_a_fully_cached_prompt_computes_its_last_token():
    harness = EngineHarness()
    harness.add(make_request("first", prompt=8))
    harness.run()
    harness.add(make_request("second", prompt=8))
    harness.run()
    assert cached_tokens(harness, "second") == 4


def test_outputs_are_cached_too():
    harness = EngineHarness()
    first = make_request("first", prompt=6, max_tokens=7)
    harness.add(first)
    harness.run()
    turns = (*first.prompt_token_ids, *harness.tokens("first"), 1)
    harness.add(make_request("second", prompt=turns))
    harness.run()
    assert cached_tokens(harness, "second") == 12


@pytest.mark.parametrize(
    ("first", "second", "num_cached"),
    [
        ({"salt": b"1"}, {"salt": b"1"}, 8),
        ({"salt": b"1"}, {"salt": b"2"}, 0),
        ({"salt": b"1"}, {}, 0),
        ({"adapter": "a"}, {"adapter": "a"}, 8),
        ({"adapter": "a"}, {"adapter": "b"}, 0),
        ({"adapter": "a"}, {}, 0),
        ({"adapter": "a", "salt": b"1"}, {"adapter": "a", "salt": b"2"}, 0),
    ],
)
def test_blocks_are_shared_only_within_salt_and_adapter(first, second, num_cached):
    harness = EngineHarness()
    harness.register("a")
    harness.register("b")
    harness.add(make_request("first", prompt=10, **first))
    harness.run()
    harness.add(make_request("second", prompt=10, **second))
    harness.run()
    assert cached_tokens(harness, "second") == num_cached


def test_nothing_is_shared_when_switched_off():
    harness = EngineHarness(enable_prefix_cache=False, min_prefix_wait_tokens=4)
    for name in ("first", "second"):
        harness.add(make_request(name, prompt=10))
        harness.run()
    assert cached_tokens(harness, "second") == 0
    assert harness.engine.stats().num_prefix_queries == 0


def test_blocks_are_found_only_after_the_step_that_computes_them():
    harness = EngineHarness()
    harness.add(make_request("first", prompt=10))
    harness.executor.during_step = lambda: harness.add(make_request("second", prompt=10))
    harness.add(make_request("same step", prompt=10))
    harness.run()
    assert cached_tokens(harness, "same step") == 0
    assert cached_tokens(harness, "second") == 8


def test_blocks_of_a_sequence_aborted_during_its_step_are_not_found():
    harness = EngineHarness()
    harness.add(make_request("first", prompt=10))
    harness.executor.during_step = lambda: harness.abort("first")
    harness.step()
    harness.add(make_request("second", prompt=10))
    harness.run()
    assert cached_tokens(harness, "second") == 0


def test_blocks_of_a_failed_sequence_are_not_found():
    harness = EngineHarness(max_num_batched_tokens=4)
    harness.add(make_request("first", prompt=10))
    harness.step()
    harness.executor.failing["first"] = "not finite"
    harness.step()
    harness.add(make_request("second", prompt=10))
    harness.run()
    assert cached_tokens(harness, "second") == 0


def test_prompt_logprobs_take_no_hits_but_leave_blocks_for_others():
    harness = EngineHarness()
    for name in ("first", "second"):
        harness.add(make_request(name, prompt=10, sampling=with_prompt_logprobs()))
        harness.run()
        assert cached_tokens(harness, name) == 0
        told = itertools.chain.from_iterable(output.prompt_logprobs for output in harness.endings[name].outputs)
        assert [entry.token_id for entry in told] == list(range(1, 10))
    harness.add(make_request("third", prompt=10))
    harness.run()
    assert cached_tokens(harness, "third") == 8


def test_hits_and_queries_are_counted_in_prompt_tokens():
    harness = EngineHarness()
    for name in ("first", "second"):
        harness.add(make_request(name, prompt=10))
        harness.run()
    stats = harness.engine.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits, stats.num_prompt_tokens) == (20, 8, 12)


def test_equal_prompts_that_arrive_together_are_computed_once():
    harness = EngineHarness(min_prefix_wait_tokens=8, max_num_batched_tokens=64)
    for index in range(4):
        harness.add(make_request(f"r{index}", prompt=18))
    harness.step()
    assert harness.scheduled() == {"r0": 18}
    harness.step()
    assert harness.scheduled() == {"r0": 1, "r1": 2, "r2": 2, "r3": 2}
    harness.run()


def test_those_that_share_little_do_not_wait():
    harness = EngineHarness(min_prefix_wait_tokens=12, max_num_batched_tokens=64)
    harness.add(make_request("r0", prompt=[*range(8), 50, 51, 52, 53, 54]))
    harness.add(make_request("r1", prompt=[*range(8), 60, 61, 62, 63, 64]))
    harness.step()
    assert harness.scheduled() == {"r0": 13, "r1": 13}


def test_a_waiting_prefix_does_not_hold_up_others():
    harness = EngineHarness(min_prefix_wait_tokens=8)
    harness.add(make_request("r0", prompt=12))
    harness.add(make_request("r1", prompt=12))
    harness.add(make_request("other", prompt=[7, 7, 7]))
    harness.step()
    assert harness.scheduled() == {"r0": 12, "other": 3}


def test_waiting_ends_when_the_leader_is_aborted():
    harness = EngineHarness(min_prefix_wait_tokens=8, max_num_batched_tokens=4)
    harness.add(make_request("r0", prompt=20))
    harness.add(make_request("r1", prompt=20))
    harness.step()
    harness.abort("r0")
    harness.step()
    assert harness.scheduled() == {"r1": 4}
    harness.run()


def test_one_waits_for_one_leader_only():
    harness = EngineHarness(min_prefix_wait_tokens=8, max_prefill_chunk=4)
    for name in ("r0", "r1", "r2"):
        harness.add(make_request(name, prompt=20))
    harness.step()
    assert harness.scheduled() == {"r0": 4}
    harness.abort("r0")
    harness.step()
    assert harness.scheduled() == {"r1": 4, "r2": 4}, "r2 has waited for r0 and does not wait for r1 as well"
    harness.run()


def test_a_chain_of_sequences_that_waited_for_each_other_is_not_kept_alive():
    num_before = num_alive_sequences()
    harness = EngineHarness(min_prefix_wait_tokens=4, max_model_len=256, num_kv_blocks=200)
    harness.add(make_request("r0", prompt=5, max_tokens=1))
    for index in range(1, 20):
        # Each begins with all of the one before, which starts in this step: so it waits for it.
        harness.add(make_request(f"r{index}", prompt=4 * index + 5, max_tokens=1))
        harness.step()
        assert list(harness.scheduled()) == [f"r{index - 1}"]
    assert num_alive_sequences() <= num_before + 2
    harness.run()


def test_a_preempted_sequence_finds_its_own_blocks_again():
    harness = EngineHarness(num_kv_blocks=6, max_num_seqs=2)
    harness.add(make_request("old", prompt=[*range(10, 18)], max_tokens=9))
    harness.add(make_request("new", prompt=[*range(20, 28)], max_tokens=9))
    harness.run()
    assert harness.engine.stats().num_preemptions > 0
    restarts = [
        entry
        for plan in harness.executor.plans
        for entry in plan.seqs
        if entry.start and len(entry.start.token_ids) > 8
    ]
    assert restarts and all(entry.num_computed_tokens > 0 for entry in restarts)
