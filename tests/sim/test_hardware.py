import dataclasses

import pytest

from pomona.core.errors import ConfigError
from pomona.sim.h200 import h200_cost, interpolate
from pomona.sim.hardware import MACHINES, MODELS, Machine, RooflineCost, plan_memory
from pomona.sim.step_work import StepWork

LLAMA = MODELS["llama-3.1-8b"]


def decode(batch, context=1000, **more):
    return StepWork(
        num_seqs=batch,
        num_rows=batch,
        num_decode_rows=batch,
        num_sampled=batch,
        num_decode_kv_tokens=batch * context,
        **more,
    )


def test_shapes_are_those_of_the_models():
    assert LLAMA.model_bytes == pytest.approx(16.06e9, rel=0.01)
    assert MODELS["llama-3.1-70b"].model_bytes == pytest.approx(141e9, rel=0.01)
    assert MODELS["smollm2-135m"].model_bytes == pytest.approx(2 * 134.5e6, rel=0.01)
    assert LLAMA.kv_token_bytes == 131072


def test_a_decode_of_one_reads_the_weights_once():
    machine = MACHINES["H100"]
    seconds = RooflineCost(machine, LLAMA).seconds(decode(1, context=1))
    read = (LLAMA.model_bytes - 2 * LLAMA.num_head_weights) / (0.8 * 3350e9)
    assert seconds == pytest.approx(read + machine.step_s, rel=0.01)


@pytest.mark.parametrize("name", MACHINES)
def test_more_work_never_takes_less_time(name):
    cost = RooflineCost(MACHINES[name], LLAMA)
    base = decode(8)
    for field in dataclasses.fields(StepWork):
        more = dataclasses.replace(base, **{field.name: getattr(base, field.name) + 100})
        assert cost.seconds(more) >= cost.seconds(base), field.name


def test_rows_are_nearly_free_until_computing_catches_up_with_reading():
    cost = RooflineCost(MACHINES["H100"], LLAMA)
    small, large = (cost.seconds(decode(batch, context=1)) for batch in (1, 64))
    assert large < 1.1 * small
    prefill = [StepWork(num_seqs=1, num_rows=rows, num_sampled=1) for rows in (2048, 4096)]
    assert cost.seconds(prefill[1]) > 1.8 * cost.seconds(prefill[0])


def test_ranks_and_copies_cost_what_they_move():
    cost = RooflineCost(MACHINES["H100"], LLAMA)
    base = cost.seconds(decode(32))
    distinct = cost.seconds(decode(32, num_adapters=32, sum_row_ranks=512, sum_adapter_ranks=512, max_rank=16))
    shared = cost.seconds(decode(32, num_adapters=1, sum_row_ranks=512, sum_adapter_ranks=16, max_rank=16))
    assert base < shared < distinct
    loads = cost.seconds(decode(32, num_loads=1, num_loaded_pages=4)) - base
    assert loads == pytest.approx(1e-3 + 4 * LLAMA.page_bytes(4) / 50e9)


def test_a_step_without_rows_costs_nothing():
    assert RooflineCost(MACHINES["H100"], LLAMA).seconds(StepWork()) == 0.0


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="needs 141 GB of weights: 1 x H100 has 80 GB"):
        plan_memory(MACHINES["H100"], MODELS["llama-3.1-70b"])
    assert plan_memory(MACHINES["H100"], MODELS["llama-3.1-70b"], num_devices=4).num_kv_blocks > 1000


def test_a_machine_must_make_sense():
    with pytest.raises(ConfigError, match=r"memory_share is 1\.5"):
        Machine("x", 1.0, 1.0, 1.0, 1.0, memory_share=1.5)
    with pytest.raises(ConfigError, match="flops_per_s is 0"):
        Machine("x", 0.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("name, num_devices", [("llama-3.1-8b", 1), ("llama-3.1-70b", 4), ("llama-3.1-70b", 8)])
def test_h200_tables_agree_with_its_roofline_within_a_factor(name, num_devices):
    tables, roofline = h200_cost(name, num_devices), RooflineCost(MACHINES["H200"], MODELS[name], 4, num_devices)
    prefill = StepWork(num_seqs=1, num_rows=2048, num_sampled=1, num_prefill_kv_tokens=2048, num_prefill_pairs=2**21)
    for work in (decode(1), decode(32), decode(256), prefill):
        assert 0.6 < tables.seconds(work) / roofline.seconds(work) < 1.7, work


def test_h200_tables_give_their_own_measurements_back_and_adapters_come_on_top():
    cost = h200_cost("llama-3.1-8b", 1)
    # 6144 x 4096 and 4096 x 4096 at one row: 16.1 and 12.6 microseconds.
    assert cost.layer_products[1][0] > 28e-6
    assert cost.seconds(decode(8, num_adapters=8, sum_row_ranks=128, sum_adapter_ranks=128)) > cost.seconds(decode(8))
    assert cost.seconds(StepWork()) == 0.0


def test_attention_beyond_the_longest_prompt_measured_takes_as_much_longer_as_it_has_more_pairs():
    cost, pairs = h200_cost("llama-3.1-8b", 1), 16384 * 16385 // 2
    without, longest, more = (
        cost.seconds(StepWork(num_seqs=1, num_rows=8192, num_prefill_pairs=count)) for count in (0, pairs, 4 * pairs)
    )
    assert longest - without == pytest.approx(LLAMA.num_layers * 0.003371)
    assert more - without == pytest.approx(4 * (longest - without))


def test_curves_are_straight_between_points_and_in_proportion_beyond_them():
    curve = ((1.0, 2.0, 4.0), (10.0, 20.0, 30.0))
    assert [interpolate(curve, x) for x in (0.5, 1.0, 1.5, 3.0, 4.0, 8.0)] == [10.0, 10.0, 15.0, 25.0, 30.0, 60.0]


def test_there_are_no_tables_of_other_models():
    with pytest.raises(ConfigError, match="no H200 tables of llama-2-7b on 1: there are"):
        h200_cost("llama-2-7b", 1)
