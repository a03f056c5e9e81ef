"""Order of the waiting requests."""

import math

from pomona.sched.fair_queue import FairQueue
from pomona.sched.fairness import FairnessConfig
from pomona.sched.sequence import Sequence
from support.engine import make_request


def make_seq(name: str) -> Sequence:
    return Sequence(make_request(name), max_model_len=64)


def names(queue: FairQueue) -> list[str]:
    return [seq.request_id for seq in queue.candidates()]


def test_first_come_first_served():
    queue = FairQueue(FairnessConfig(policy="fcfs"), math.inf)
    for name in "abc":
        queue.push(make_seq(name))
    assert names(queue) == ["a", "b", "c"]
    assert len(queue) == 3


def test_preempted_sequences_come_before_new_ones_oldest_first():
    queue = FairQueue(FairnessConfig(policy="fcfs"), math.inf)
    queue.push(make_seq("new"))
    for name in ("older", "younger"):
        queue.push(make_seq(name))
    younger, older = [seq for seq in queue.candidates()][:0:-1]
    for seq in (younger, older):
        queue.admit(seq, 0, 0)
    queue.requeue(younger)
    queue.requeue(older)
    assert names(queue) == ["older", "younger", "new"]


def test_a_candidate_may_be_removed_while_going_through_them():
    queue = FairQueue(FairnessConfig(policy="fcfs"), math.inf)
    for name in "abc":
        queue.push(make_seq(name))
    for seq in queue.candidates():
        if seq.request_id != "b":
            queue.remove(seq)
    assert names(queue) == ["b"]
