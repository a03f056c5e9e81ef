"""Jobs that take turns: real engines of a tiny model."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import assets, engine, workload
from benchmarks.shapes import SHAPES


class NotedJob:
    """Notes its steps in a list that jobs share."""

    def __init__(self, name, num_steps, steps, overlaps_steps=False):
        self.loaded = SimpleNamespace(overlaps_steps=overlaps_steps)
        self.name, self.num_left, self.steps = name, num_steps, steps

    def step(self):
        if self.num_left == 0:
            return False
        self.num_left -= 1
        self.steps.append(self.name)
        return True


def test_each_is_first_every_other_round_and_the_longer_one_goes_on_alone():
    steps = []
    engine.run_in_turns([NotedJob("a", 2, steps), NotedJob("b", 4, steps)])
    assert "".join(steps) == "abbabb"


def test_ceilings_are_looked_at_before_the_long_first_rounds_and_now_and_then():
    steps = []
    engine.run_in_turns([NotedJob("a", 14, steps)], lambda: steps.append("|"))
    assert "".join(steps) == "|a|a|" + "a" * 10 + "|aa"


def test_steps_that_overlap_take_no_turns():
    steps = []
    engine.run_in_turns([NotedJob("a", 2, steps, overlaps_steps=True), NotedJob("b", 2, steps)])
    assert "".join(steps) == "aabb"


@pytest.mark.usefixtures("tiny_cache")
def test_a_job_in_turns_yields_what_it_yields_alone_on_a_clock_of_its_own_steps():
    assets.make(SHAPES["tiny"])
    content = json.loads(workload.write(SHAPES["tiny"]).read_text())
    base = engine.load_engine(content, 0, {"num_threads": 1})
    loaded = engine.load_engine(content, workload.NUM_ADAPTERS, {"num_threads": 1})
    cell, alone = content["cells"]["b8-128-64/distinct"], content["cells"]["b8-128-64/base"]
    jobs = [engine.RunningJob(loaded, cell, 5), engine.RunningJob(base, alone, 5)]
    engine.run_in_turns(jobs)
    ours, theirs = (job.result() for job in jobs)
    again = engine.RunningJob(loaded, cell, 5)
    engine.run_in_turns([again])
    assert again.result()["token_ids"] == ours["token_ids"]
    assert loaded.parts.engine.stats().num_adapter_loads == len(set(cell["assignment"])) > 1
    assert base.parts.engine.stats().num_adapter_loads == 0
    assert theirs["wall_s"] == max(theirs["finish_s"])
    assert ours["wall_s"] == max(ours["finish_s"]) > max(ours["first_token_s"]) > 0
    assert not loaded.parts.engine.has_work
