from pomona.core.ids import AdapterId, PageId, RequestId
from pomona.core.plan import AdapterLoad, ScheduledSeq, SeqStart, StepPlan
from pomona.core.request import SamplingParams
from pomona.sim.step_work import StepWork, WorkMeter

RANKS = {AdapterId("small"): 4, AdapterId("large"): 64}


def begun(name, num_tokens, adapter=None, computed=0):
    start = SeqStart(tuple(range(num_tokens)), num_tokens, SamplingParams(), adapter and AdapterId(adapter))
    return ScheduledSeq(RequestId(name), computed, num_tokens - computed, is_sampled=True, start=start)


def decode(name, computed):
    return ScheduledSeq(RequestId(name), computed, 1, is_sampled=True)


def test_an_empty_plan_is_no_work():
    assert WorkMeter(RANKS).measure(StepPlan(1, ())) == StepWork()


def test_a_mixed_batch_is_counted():
    meter = WorkMeter(RANKS)
    load = AdapterLoad(AdapterId("large"), (PageId(0), PageId(1)))
    first = meter.measure(
        StepPlan(1, (begun("a", 10), begun("b", 6, "small"), begun("c", 4, "large", 1)), adapter_loads=(load,))
    )
    assert first == StepWork(
        num_seqs=3,
        num_rows=19,
        num_decode_rows=0,
        num_sampled=3,
        num_decode_kv_tokens=0,
        num_prefill_kv_tokens=20,
        num_prefill_pairs=55 + 21 + (2 + 3 + 4),
        num_adapter_rows=9,
        num_adapters=2,
        sum_row_ranks=6 * 4 + 3 * 64,
        sum_adapter_ranks=68,
        max_rank=64,
        num_new_mix_adapters=2,
        is_new_mix=1,
        is_afresh=1,
        num_loads=1,
        num_loaded_pages=2,
    )
    second = meter.measure(StepPlan(2, (decode("a", 10), decode("b", 6)), released=(RequestId("c"),)))
    assert (second.num_decode_rows, second.num_prefill_rows, second.num_kv_tokens) == (2, 0, 18)
    assert (second.num_decode_kv_tokens, second.num_prefill_pairs) == (18, 0)
    assert (second.sum_row_ranks, second.sum_adapter_ranks, second.max_rank) == (4, 4, 4)


def test_a_sequence_that_comes_back_is_known_by_its_new_start():
    meter = WorkMeter(RANKS)
    meter.measure(StepPlan(1, (begun("a", 3, "small"),)))
    back = meter.measure(StepPlan(2, (begun("a", 5, "small"),), released=(RequestId("a"),)))
    assert (back.num_adapter_rows, back.num_kv_tokens) == (5, 5)


def test_a_mix_is_new_when_other_adapters_meet_than_the_last_time_any_did():
    meter = WorkMeter(RANKS, {AdapterId("large")})
    steps = [
        (begun("a", 3, "small"),),
        (decode("a", 3),),
        (begun("x", 3),),
        (decode("a", 4), begun("b", 3, "large")),
        (decode("a", 5), decode("b", 3)),
        (decode("b", 4),),
    ]
    works = [meter.measure(StepPlan(number, seqs)) for number, seqs in enumerate(steps, 1)]
    assert [work.is_new_mix for work in works] == [1, 0, 0, 1, 0, 1]
    assert [work.num_new_mix_adapters for work in works] == [1, 0, 0, 2, 0, 1]
    assert [work.num_extra_adapters for work in works] == [0, 0, 0, 1, 1, 1]
    assert [work.has_extras for work in works] == [0, 0, 0, 1, 1, 1]


def test_decodes_right_after_other_rows_are_told_from_those_after_decodes():
    meter = WorkMeter(RANKS)
    steps = [
        (begun("a", 3),),
        (decode("a", 3),),
        (),
        (decode("a", 4),),
        (decode("a", 5), begun("b", 3)),
        (),
        (decode("a", 6), decode("b", 3)),
    ]
    works = [meter.measure(StepPlan(number, seqs)) for number, seqs in enumerate(steps, 1)]
    assert [work.is_back_to_decodes for work in works] == [0, 1, 0, 0, 0, 0, 1]


def test_a_step_is_afresh_when_no_sequence_goes_on():
    meter = WorkMeter(RANKS)
    plans = [
        StepPlan(1, (begun("a", 3),)),
        StepPlan(2, (decode("a", 3), begun("b", 2))),
        StepPlan(3, (begun("c", 3),), released=(RequestId("a"),)),
        StepPlan(4, (), released=(RequestId("b"), RequestId("c"))),
        StepPlan(5, (begun("d", 3),)),
        StepPlan(6, (begun("e", 3),), released=(RequestId("d"),)),
    ]
    assert [meter.measure(plan).is_afresh for plan in plans] == [1, 0, 0, 0, 1, 1]
