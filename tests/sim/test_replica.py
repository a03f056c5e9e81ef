from pomona.core.errors import QueueFullError
from pomona.core.ids import RequestId
from pomona.core.request import FinishReason
from pomona.sim.clock import EventHeap
from pomona.sim.cost_model import PerTokenCost
from pomona.sim.executor import SimExecutor
from pomona.sim.replica import SimReplica
from support.engine import make_adapter, make_config, make_request


class Setting:
    """One replica whose steps take a second, and who hears what of it when."""

    def __init__(self, **config):
        self.heap = EventHeap()
        self.ranks = {}
        self.heard = []
        self.rejected = []
        executor = SimExecutor(PerTokenCost(step_s=1.0), self.ranks)
        self.replica = SimReplica(
            make_config(**config),
            executor,
            self.heap,
            lambda outputs: self.heard.extend((self.heap.now_s, output) for output in outputs),
            lambda request, error: self.rejected.append((self.heap.now_s, str(request.request_id), type(error))),
        )

    def arrive(self, time_s, request, adapter=None):
        if adapter is not None:
            self.ranks[adapter.adapter_id] = adapter.lora_rank
        self.heap.at(time_s, lambda: self.replica.submit(request, adapter))

    def times(self, name):
        return [time_s for time_s, output in self.heard if output.request_id == name]

    def ending(self, name):
        return [output.finish_reason for _, output in self.heard if output.request_id == name][-1]


def test_outputs_come_when_the_step_has_passed():
    setting = Setting()
    setting.arrive(0.5, make_request("r", max_tokens=3))
    setting.heap.run()
    assert setting.times("r") == [1.5, 2.5, 3.5]
    assert setting.ending("r") is FinishReason.LENGTH
    assert setting.replica.is_idle
    assert setting.replica.busy_s == 3.0
    assert not setting.replica.in_flight


def test_what_arrives_together_is_in_one_step():
    setting = Setting()
    setting.arrive(0.0, make_request("a", prompt=[1, 2], max_tokens=1))
    setting.arrive(0.0, make_request("b", prompt=[3, 4], max_tokens=1))
    setting.heap.run()
    assert setting.times("a") == setting.times("b") == [1.0]


def test_what_arrives_during_a_step_waits_for_its_end():
    setting = Setting()
    setting.arrive(0.0, make_request("a", prompt=[1, 2], max_tokens=3))
    setting.arrive(0.4, make_request("b", prompt=[3, 4], max_tokens=1))
    setting.heap.run()
    assert setting.times("b") == [2.0]


def test_a_request_the_engine_refuses_is_told_so_and_forgotten():
    setting = Setting(max_num_seqs=1, max_waiting=1)
    for name in "abc":
        setting.arrive(0.0, make_request(name, max_tokens=1))
    setting.heap.run()
    assert setting.rejected == [(0.0, "b", QueueFullError), (0.0, "c", QueueFullError)]
    assert not setting.replica.in_flight


def test_an_abort_ends_the_request_at_the_next_turn():
    setting = Setting()
    setting.arrive(0.0, make_request("r", max_tokens=30))
    setting.heap.at(2.5, lambda: setting.replica.abort(RequestId("r")))
    setting.heap.run()
    assert setting.ending("r") is FinishReason.ABORT
    assert setting.times("r") == [1.0, 2.0, 3.0, 3.0]


def test_a_request_takes_the_place_of_one_whose_client_has_gone_before_it_came():
    setting = Setting(max_waiting=1, max_num_seqs=1)
    setting.arrive(0.0, make_request("a", max_tokens=5))
    setting.arrive(0.5, make_request("b", max_tokens=1))
    setting.heap.at(2.5, lambda: setting.replica.abort("b"))
    setting.arrive(2.5, make_request("c", max_tokens=1))
    setting.heap.run()
    assert not setting.rejected
    assert (setting.times("b"), setting.times("c")) == ([4.0], [6.0])


def test_a_step_under_way_counts_as_far_as_it_has_come():
    setting = Setting()
    setting.arrive(0.5, make_request("r", max_tokens=3))
    setting.heap.run(until_s=2.25)
    assert setting.replica.busy_s == 1.75


def test_a_killed_replica_delivers_nothing_more_and_gives_its_requests_back():
    setting = Setting()
    setting.arrive(0.0, make_request("a", prompt=[1, 2], max_tokens=1))
    setting.arrive(0.5, make_request("b", prompt=[3, 4], max_tokens=1))
    lost = []
    setting.heap.at(0.7, lambda: lost.extend(setting.replica.kill()))
    setting.heap.run()
    assert [str(request.request_id) for request in lost] == ["a", "b"]
    assert setting.heard == []


def test_stats_are_those_of_the_last_turn_that_ended():
    setting = Setting()
    setting.arrive(0.0, make_request("r", max_tokens=2))
    setting.heap.run(until_s=0.5)
    assert setting.replica.stats.num_running == 0
    setting.heap.run(until_s=1.5)
    assert setting.replica.stats.num_running == 1


def test_an_adapter_is_registered_when_a_request_brings_it():
    setting = Setting()
    for number in range(3):
        adapter = make_adapter("x")
        setting.arrive(number * 10.0, make_request(f"r{number}", adapter="x", max_tokens=1), adapter)
    setting.heap.run()
    assert [setting.ending(f"r{number}") for number in range(3)] == [FinishReason.LENGTH] * 3
    assert setting.replica.stats.num_adapter_loads == 1


def test_an_adapter_larger_than_the_memory_is_refused():
    setting = Setting(num_adapter_pages=1)
    setting.arrive(0.0, make_request("r", adapter="x"), make_adapter("x", num_pages=2))
    setting.heap.run()
    assert [name for _, name, _ in setting.rejected] == ["r"]
