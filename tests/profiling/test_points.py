from dataclasses import replace

import numpy as np
import pytest

from pomona.core.errors import ConfigError
from pomona.engine.engine import Engine
from pomona.profiling.design import Design
from pomona.profiling.measure import MeteredExecutor, PointMeter
from pomona.profiling.points import Point, adapter_groups, candidates, seeds
from pomona.sim.cost_model import CostTerm, LinearCost
from support.engine import FakeExecutor, make_adapter, make_config

CONFIG = make_config(
    num_kv_blocks=256, max_model_len=128, num_adapter_pages=8, max_num_batched_tokens=64, max_num_seqs=8
)
ADAPTERS = tuple(make_adapter(f"a{index}", num_pages=1 + index % 3) for index in range(4))
COST = LinearCost(1e-3, (CostTerm("num_rows", 1e-5),))


def make_meter():
    fake = FakeExecutor(CONFIG, adapters={info.adapter_id: info for info in ADAPTERS})
    executor = MeteredExecutor(fake)
    engine = Engine(CONFIG, executor)
    for info in ADAPTERS:
        engine.register_adapter(info)
    return PointMeter(engine, executor, ADAPTERS, vocab_size=1000), engine


@pytest.mark.parametrize("point", [*candidates(CONFIG, ADAPTERS, 60), *seeds(CONFIG)], ids=str)
def test_the_engine_does_at_a_point_what_the_point_says(point):
    meter, engine = make_meter()
    work = meter.measure(point, 7)[-1].work
    expected = point.work()
    told = ("num_seqs", "num_rows", "num_adapters", "sum_row_ranks", "max_rank", "num_loads", "num_loaded_pages")
    if point.num_prompts:
        for name in told if point.is_cold else told[:-2]:
            assert getattr(work, name) == getattr(expected, name), name
    else:
        assert (work.num_decode_rows, work.num_adapters) == (point.num_decodes, expected.num_adapters)
    assert not engine.has_work
    assert all(sample.point_index == 7 for sample in meter.measure(point, 7))


def test_a_replica_too_small_for_the_steps_that_are_timed_is_refused():
    with pytest.raises(ConfigError, match=r"max_model_len is 48, the KV cache has 256 blocks of .*: too small"):
        seeds(replace(CONFIG, max_model_len=48))
    with pytest.raises(ConfigError, match="the KV cache has 8 blocks"):
        seeds(replace(CONFIG, num_kv_blocks=8))


def test_candidates_differ_and_are_the_same_every_time():
    points = candidates(CONFIG, ADAPTERS, 100)
    assert len(set(points)) == 100
    assert points == candidates(CONFIG, ADAPTERS, 100)


def test_groups_of_adapters_fit_the_device_together():
    groups = adapter_groups(ADAPTERS, num_pages=4)
    assert () in groups
    assert all(sum(info.num_pages for info in group) <= 4 for group in groups)
    assert {len({info.lora_rank for info in group}) for group in groups} >= {0, 1, 2}


def test_what_was_never_measured_is_chosen_before_more_of_the_same():
    base = [Point(0, 0, 1, tokens) for tokens in (16, 20, 24)]
    adapted = replace(base[1], adapters=ADAPTERS[:1])
    measured = [point.work() for point in base[:1]] * 5
    assert Design([*base, adapted]).choose(measured, COST, 1e9) == adapted


def test_points_that_take_too_long_are_passed_over_and_each_is_chosen_once():
    points = [Point(0, 0, 1, 16), Point(0, 0, 1, 60)]
    measured = [points[0].work()]
    design = Design(points)
    limit_s = sum(COST.seconds(work) for work in points[0].works()) * 1.01
    assert design.choose(measured, COST, limit_s) == points[0]
    assert design.choose(measured, COST, limit_s) is None


def test_measuring_a_point_lowers_the_leverage_of_all():
    points = candidates(CONFIG, ADAPTERS, 40)
    design = Design(points)
    measured = [point.work() for point in points[:3]]
    before = design.leverages(measured, COST)
    chosen = design.choose(measured, COST, 1e9)
    after = design.leverages([*measured, chosen.work()], COST)
    assert (after <= before * (1 + 1e-6)).all()
    assert after[points.index(chosen)] < 1.0
    assert np.isfinite(after).all()


def test_going_back_to_decodes_is_a_sample_of_its_own():
    meter, _ = make_meter()
    point = Point(3, 10, 2, 8)
    works = [sample.work for sample in meter.measure(point, 0)]
    decodes = [work for work in works if work.num_rows == work.num_decode_rows]
    assert sorted(work.is_back_to_decodes for work in decodes) == [0, 1, 1]
    assert all(work.num_decode_rows == 3 for work in decodes)


def test_points_are_drawn_in_their_order_and_taken_once():
    points = candidates(CONFIG, ADAPTERS, 30)
    design = Design(points)
    measured = [points[0].work()]
    chosen = design.choose(measured, COST, 10.0)
    drawn = [design.draw(COST, 10.0) for _ in points]
    assert drawn == [*(point for point in points if point != chosen), None]


def test_any_adapters_meet_as_requests_bring_them():
    groups = {frozenset(point.adapters) for point in candidates(CONFIG, ADAPTERS, 300)}
    assert len(groups) > len(adapter_groups(ADAPTERS, CONFIG.num_adapter_pages))
