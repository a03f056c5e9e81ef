"""Continuous batching: who computes how many tokens in which step, and how requests end."""

import pytest

from pomona.core.errors import InvalidRequestError, PromptTooLongError, QueueFullError
from pomona.core.request import FinishReason, SamplingParams
from support.engine import EngineHarness, expected_output, make_request, make_scheduler


def distinct(name: str, num_tokens: int, **options: object):
    """A request that shares no prefix with others."""
    first = sum(map(ord, name)) * 64
    return make_request(name, prompt=[first + index for index in range(num_tokens)], **options)


class TestAdmission:
    def test_prompts_share_a_step_with_decodes_under_the_budget(self):
        harness = EngineHarness(max_num_batched_tokens=10)
        harness.add(distinct("a", 6))
        harness.step()
        harness.add(distinct("b", 6))
        harness.add(distinct("c", 6))
        harness.step()
        assert harness.scheduled() == {"a": 1, "b": 6, "c": 3}
        harness.step()
        assert harness.scheduled() == {"a": 1, "b": 1, "c": 3}
        harness.run()

    def test_a_long_prompt_is_computed_in_chunks(self):
        harness = EngineHarness(max_num_batched_tokens=8)
        harness.add(distinct("a", 20))
        chunks = []
        for _ in range(4):
            harness.step()
            chunks.append((harness.scheduled()["a"], harness.plan().seqs[0].is_sampled))
        assert chunks == [(8, False), (8, False), (4, True), (1, True)]
        harness.run()

    def test_max_prefill_chunk_leaves_budget_for_others(self):
        harness = EngineHarness(max_num_batched_tokens=16, max_prefill_chunk=6)
        harness.add(distinct("a", 20))
        harness.add(distinct("b", 3))
        harness.step()
        assert harness.scheduled() == {"a": 6, "b": 3}
        harness.run()

    def test_no_more_than_max_num_seqs_run(self):
        harness = EngineHarness(max_num_seqs=2)
        for name in "abc":
            harness.add(distinct(name, 3))
        harness.step()
        assert list(harness.scheduled()) == ["a", "b"]
        assert (harness.engine.stats().num_running, harness.engine.stats().num_waiting) == (2, 1)
        harness.run()

    def test_one_that_lacks_blocks_holds_up_those_behind_it(self):
        harness = EngineHarness(num_kv_blocks=6)
        harness.add(distinct("a", 12))
        harness.add(distinct("big", 16))
        harness.add(distinct("small", 2))
        harness.step()
        assert list(harness.scheduled()) == ["a"]
        harness.run()

    def test_room_is_reserved_for_those_that_run(self):
        harness = EngineHarness(num_kv_blocks=6, reserve_steps=4)
        harness.add(distinct("a", 12))
        harness.add(distinct("b", 12))
        harness.step()
        assert list(harness.scheduled()) == ["a"]
        harness.run()
        assert harness.engine.stats().num_preemptions == 0

    def test_start_tells_the_executor_everything_once(self):
        harness = EngineHarness()
        request = distinct("a", 5)
        harness.add(request)
        harness.step()
        (entry,) = harness.plan().seqs
        assert entry.start.token_ids == request.prompt_token_ids
        assert (entry.start.num_prompt_tokens, entry.start.sampling) == (5, request.sampling)
        assert len(entry.new_block_ids) == 2
        harness.step()
        (entry,) = harness.plan().seqs
        assert (entry.start, entry.new_block_ids) == (None, ())
        harness.run()

    def test_first_scheduled_is_reported_and_kept(self):
        harness = EngineHarness()
        harness.clock.advance(3.0)
        harness.add(distinct("a", 5))
        harness.run()
        assert {output.first_scheduled_s for output in harness.endings["a"].outputs} == {3.0}

    def test_budget_smaller_than_the_running_set_serves_the_oldest_first(self):
        harness = EngineHarness(max_num_batched_tokens=1)
        harness.add(distinct("a", 2, max_tokens=2))
        harness.add(distinct("b", 2, max_tokens=2))
        harness.step()
        assert harness.scheduled() == {"a": 1}
        harness.run()

    def test_equal_adapters_stand_together_and_base_rows_first(self):
        harness = EngineHarness(max_num_seqs=8, max_num_batched_tokens=32)
        harness.register("x")
        harness.register("y")
        for index, adapter in enumerate(["y", None, "x", "y", None, "x"]):
            harness.add(distinct(f"{adapter}{index}", 2, adapter=adapter))
        harness.step()
        assert list(harness.scheduled()) == ["None1", "None4", "y0", "y3", "x2", "x5"]
        harness.step()
        assert list(harness.scheduled()) == ["None1", "None4", "y0", "y3", "x2", "x5"]
        harness.run()


class TestRefusal:
    def test_the_queue_is_bounded(self):
        scheduler = make_scheduler(max_waiting=1)
        scheduler.add(make_request("a"))
        with pytest.raises(QueueFullError, match="max_waiting"):
            scheduler.add(make_request("b"))
        scheduler.schedule(0.0)
        scheduler.add(make_request("b"))

    def test_a_prompt_that_fills_the_context_is_refused(self):
        scheduler = make_scheduler(max_model_len=16)
        scheduler.add(make_request("fits", prompt=15))
        with pytest.raises(PromptTooLongError, match="16 tokens") as error:
            scheduler.add(make_request("a", prompt=16))
        assert error.value.field == "prompt"

    def test_what_never_fits_the_kv_cache_is_refused(self):
        scheduler = make_scheduler(num_kv_blocks=2)
        scheduler.add(make_request("fits", prompt=5, max_tokens=4))
        with pytest.raises(PromptTooLongError, match="9 KV") as error:
            scheduler.add(make_request("a", prompt=5, max_tokens=5))
        assert error.value.field == "max_tokens"

    def test_an_unknown_adapter_is_refused(self):
        with pytest.raises(InvalidRequestError, match="'x' is not registered") as error:
            make_scheduler().add(make_request("a", adapter="x"))
        assert error.value.field == "model"

    def test_a_request_id_in_use_is_refused(self):
        scheduler = make_scheduler()
        scheduler.add(make_request("a"))
        with pytest.raises(InvalidRequestError, match="in use"):
            scheduler.add(make_request("a"))

    @pytest.mark.parametrize("token_id", [-1, 50, 2**31])
    def test_token_ids_that_the_model_does_not_have_are_refused(self, token_id):
        scheduler = make_scheduler(vocab_size=50)
        scheduler.add(make_request("fits", prompt=[0, 49]))
        with pytest.raises(InvalidRequestError, match=f"prompt is {token_id}: must be a token id from 0 to 49"):
            scheduler.add(make_request("a", prompt=[1, token_id, 2]))

    @pytest.mark.parametrize(
        ("field", "params"),
        [
            ("logit_bias", SamplingParams(logit_bias=((49, 1.0), (50, 1.0)))),
            ("stop_token_ids", SamplingParams(min_tokens=1, stop_token_ids=(49, 50))),
        ],
    )
    def test_token_ids_of_parameters_are_checked_as_well(self, field, params):
        with pytest.raises(InvalidRequestError, match=f"{field} is 50: must be a token id") as error:
            make_scheduler(vocab_size=50).add(make_request("a", sampling=params))
        assert error.value.field == field

    def test_a_refused_request_leaves_nothing_behind(self):
        harness = EngineHarness(max_waiting=1)
        harness.register("x")
        harness.add(make_request("a", adapter="x"))
        with pytest.raises(QueueFullError):
            harness.engine.add(make_request("b", adapter="x"))
        assert harness.engine.adapter_statuses()[0].num_users == 1
        harness.run()


class TestEndings:
    def test_max_tokens_ends_with_length(self):
        harness = EngineHarness()
        harness.add(distinct("a", 3, max_tokens=5))
        harness.run()
        assert harness.endings["a"].finish_reason is FinishReason.LENGTH
        assert len(harness.tokens("a")) == 5

    def test_the_context_ends_with_length(self):
        harness = EngineHarness(max_model_len=8)
        harness.add(distinct("a", 5, max_tokens=50))
        harness.run()
        assert harness.endings["a"].finish_reason is FinishReason.LENGTH
        assert len(harness.tokens("a")) == 3

    def test_a_stop_token_ends_the_output_and_is_its_last(self):
        plain = distinct("a", 3, max_tokens=6)
        third = expected_output(plain)[2]
        harness = EngineHarness()
        harness.add(distinct("a", 3, sampling=SamplingParams(max_tokens=6, temperature=0.0, stop_token_ids=(third,))))
        harness.run()
        assert harness.tokens("a") == expected_output(plain)[:3]
        last = harness.endings["a"].outputs[-1]
        assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, third)

    @pytest.mark.parametrize(("min_tokens", "num_output"), [(1, 2), (2, 6), (6, 6)])
    def test_a_stop_token_counts_only_after_min_tokens(self, min_tokens, num_output):
        second = expected_output(distinct("a", 3))[1]
        sampling = SamplingParams(max_tokens=6, min_tokens=min_tokens, temperature=0.0, stop_token_ids=(second,))
        harness = EngineHarness()
        harness.add(distinct("a", 3, sampling=sampling))
        harness.run()
        assert len(harness.tokens("a")) == num_output

    def test_a_stop_token_at_max_tokens_is_a_stop(self):
        last = expected_output(distinct("a", 3, max_tokens=4))[3]
        harness = EngineHarness()
        harness.add(distinct("a", 3, sampling=SamplingParams(max_tokens=4, temperature=0.0, stop_token_ids=(last,))))
        harness.run()
        assert harness.endings["a"].finish_reason is FinishReason.STOP

    def test_a_failed_sequence_ends_alone(self):
        harness = EngineHarness()
        harness.add(distinct("a", 3))
        harness.add(distinct("b", 3))
        harness.step()
        harness.executor.failing["a"] = "logits are not finite"
        harness.step()
        last = harness.endings["a"].outputs[-1]
        assert (last.finish_reason, last.error, last.new_token_ids) == (FinishReason.FAIL, "logits are not finite", ())
        harness.run()
        assert harness.endings["b"].finish_reason is FinishReason.LENGTH

    def test_the_executor_is_told_to_forget_what_ended(self):
        harness = EngineHarness()
        harness.add(distinct("a", 3, max_tokens=1))
        harness.add(distinct("b", 3, max_tokens=3))
        harness.step()
        harness.step()
        assert harness.plan().released == ("a",)
        harness.run()
        assert harness.plan().released == ("b",)
        assert harness.plan().seqs == ()


class TestAbort:
    def test_a_waiting_request_ends_without_ever_running(self):
        harness = EngineHarness()
        harness.add(distinct("a", 3))
        output = harness.abort("a")
        assert (output.finish_reason, output.first_scheduled_s) == (FinishReason.ABORT, None)
        assert not harness.engine.has_work

    def test_a_running_request_ends_and_is_released(self):
        harness = EngineHarness()
        harness.add(distinct("a", 3))
        harness.step()
        assert harness.abort("a").finish_reason is FinishReason.ABORT
        harness.run()
        assert harness.plan().released == ("a",)

    def test_during_a_step_its_result_is_ignored(self):
        harness = EngineHarness()
        harness.add(distinct("a", 3))
        harness.add(distinct("b", 3))
        harness.step()
        harness.executor.during_step = lambda: harness.abort("a")
        harness.step()
        assert len(harness.tokens("a")) == 1
        assert len(harness.tokens("b")) == 2
        harness.run()

    def test_during_a_step_the_id_may_be_used_again(self):
        harness = EngineHarness()
        harness.add(distinct("a", 3, max_tokens=6))
        harness.step()
        first = harness.endings["a"]

        def replace() -> None:
            harness.abort("a")
            harness.add(distinct("a", 5, max_tokens=2))

        harness.executor.during_step = replace
        harness.step()
        assert first.finish_reason is FinishReason.ABORT
        harness.run()
        assert harness.endings["a"].finish_reason is FinishReason.LENGTH

    def test_an_unknown_or_ended_request_is_ignored(self):
        harness = EngineHarness()
        harness.add(distinct("a", 3))
        harness.run()
        assert harness.abort("a") is None
        assert harness.abort("b") is None

    def test_it_makes_room_at_once(self):
        harness = EngineHarness(num_kv_blocks=4)
        harness.add(distinct("a", 12))
        harness.add(distinct("b", 12))
        harness.step()
        harness.abort("a")
        harness.step()
        assert harness.scheduled() == {"b": 12}
        harness.run()


class TestPreemption:
    def test_the_newest_gives_way_and_its_answer_is_unchanged(self):
        harness = EngineHarness(num_kv_blocks=6, enable_prefix_cache=False)
        harness.add(distinct("a", 8, max_tokens=9))
        harness.add(distinct("b", 8, max_tokens=9))
        harness.run()
        assert harness.engine.stats().num_preemptions == 1
        assert any(
            "b" in plan.released and "a" in {entry.request_id for entry in plan.seqs} for plan in harness.executor.plans
        )
        starts = [entry.start for plan in harness.executor.plans for entry in plan.seqs if entry.start is not None]
        assert [len(start.token_ids) for start in starts] == [8, 8, 13]
        assert {start.num_prompt_tokens for start in starts} == {8}

    def test_nobody_is_admitted_in_a_step_that_preempts(self):
        harness = EngineHarness(num_kv_blocks=6)
        for name in "abc":
            harness.add(distinct(name, 8, max_tokens=9))
        harness.run()
        plans = harness.executor.plans
        started = [{entry.request_id for entry in plan.seqs if entry.start} for plan in plans]
        preempting = [
            index for index, plan in enumerate(plans) if set(plan.released) & set().union(*started[index + 1 :])
        ]
        assert preempting
        assert not any(started[index] for index in preempting)

    def test_the_only_sequence_that_needs_a_block_may_be_the_one_that_goes(self):
        harness = EngineHarness(num_kv_blocks=5, enable_prefix_cache=False)
        harness.add(distinct("a", 10, max_tokens=8))
        harness.add(distinct("b", 7, max_tokens=8))
        harness.run()
        assert harness.engine.stats().num_preemptions >= 1

    def test_prompt_logprobs_are_sent_once_although_computed_twice(self):
        harness = EngineHarness(num_kv_blocks=6, max_num_batched_tokens=8, enable_prefix_cache=False)
        sampling = SamplingParams(max_tokens=9, temperature=0.0, prompt_logprobs=1, logprobs=1)
        harness.add(distinct("a", 8, max_tokens=9))
        harness.add(distinct("b", 8, sampling=sampling))
        harness.run()
        assert harness.engine.stats().num_preemptions > 0
        outputs = harness.endings["b"].outputs
        prompt = [entry.token_id for output in outputs for entry in output.prompt_logprobs]
        assert prompt == list(harness.requests["b"].prompt_token_ids[1:])
        assert [entry.token_id for output in outputs for entry in output.logprobs] == harness.tokens("b")

    def test_prompt_logprobs_come_with_the_chunk_that_computed_them(self):
        harness = EngineHarness(max_num_batched_tokens=4)
        harness.add(distinct("a", 10, sampling=SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)))
        counts = [len(output.prompt_logprobs) for _ in range(3) for output in harness.step()]
        assert counts == [4, 4, 1]


def test_statistics_add_up():
    harness = EngineHarness(num_kv_blocks=8)
    harness.register("x", 2)
    harness.add(distinct("a", 6, adapter="x"))
    harness.add(distinct("b", 5))
    harness.step()
    stats = harness.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (2, 0, 1)
    assert (stats.num_kv_blocks, stats.num_kv_blocks_used) == (8, 4)
    assert (stats.num_adapter_pages, stats.num_adapter_pages_used) == (4, 2)
    assert (stats.num_resident_adapters, stats.num_pinned_adapters, stats.num_adapter_loads) == (1, 1, 1)
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (11, 2)
    harness.run()
    stats = harness.engine.stats()
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (11, 8)
    assert (stats.num_resident_adapters, stats.num_pinned_adapters) == (1, 0)


def test_results_and_plans_must_match():
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    scheduler.schedule(0.0)
    with pytest.raises(AssertionError, match="update comes before"):
        scheduler.schedule(0.0)
