"""Order of the waiting requests."""

from pomona.sched.fair_queue import FairQueue
from pomona.sched.sequence import Sequence
from support.engine import make_request


def make_seq(name: str) -> Sequence:
    return Sequence(make_request(name), max_model_len=64)


def names(queue: FairQueue) -> list[str]:
    return [seq.request_id for seq in queue.candidates()]


def test_first_come_first_served():
    queue = FairQueue()
    for name in "abc":
        queue.push(make_seq(name))
    assert names(queue) == ["a", "b", "c"]
    assert len(queue) == 3


def test_preempted_sequences_come_before_new_ones_oldest_first():
    queue = FairQueue()
    queue.push(make_seq("new"))
    queue.requeue(make_seq("younger"))
    queue.requeue(make_seq("older"))
    assert names(queue) == ["older", "younger", "new"]


def test_a_candidate_may_be_removed_while_going_through_them():
    queue = FairQueue()
    for name in "abc":
        queue.push(make_seq(name))
    for seq in queue.candidates():
        if seq.request_id != "b":
            queue.remove(seq)
    assert names(queue) == ["b"]
