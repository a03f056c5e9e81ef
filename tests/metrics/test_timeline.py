"""Latencies of one request from its event times."""

import pytest

from pomona.core.request import FinishReason
from pomona.metrics.timeline import RequestTimeline


def make_timeline(*token_times_s: float, arrival_s: float = 10.0) -> RequestTimeline:
    timeline = RequestTimeline(arrival_s)
    timeline.schedule(arrival_s + 1.0)
    for time_s in token_times_s:
        timeline.add_tokens(1, time_s)
    return timeline


def test_latencies_follow_the_glossary():
    timeline = make_timeline(12.0, 12.5, 14.0)
    timeline.end(15.0, FinishReason.STOP)
    assert timeline.ttft_s == 2.0
    assert timeline.itl_s == [0.5, 1.5]
    assert timeline.tpot_s == 1.0
    assert timeline.e2e_s == 4.0
    assert (timeline.end_s, timeline.is_finished, timeline.num_output_tokens) == (15.0, True, 3)


def test_tpot_is_undefined_at_one_token():
    timeline = make_timeline(12.0)
    assert timeline.tpot_s is None
    assert timeline.itl_s == []
    assert timeline.e2e_s == timeline.ttft_s == 2.0


def test_a_request_that_never_ran_has_no_latencies():
    timeline = RequestTimeline(10.0)
    timeline.end(11.0, None)
    assert timeline.first_scheduled_s is timeline.ttft_s is timeline.tpot_s is timeline.e2e_s is None
    assert timeline.is_ended and not timeline.is_finished


def test_only_the_first_scheduling_counts():
    timeline = make_timeline()
    timeline.schedule(20.0)
    assert timeline.first_scheduled_s == 11.0


def test_tokens_that_arrive_together_have_no_gap():
    timeline = make_timeline(12.0)
    timeline.add_tokens(2, 13.0)
    assert timeline.itl_s == [1.0, 0.0]


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.FAIL])
def test_abort_and_failure_are_ends_but_not_finishes(reason):
    timeline = make_timeline(12.0)
    timeline.end(13.0, reason)
    assert timeline.is_ended and not timeline.is_finished


def test_a_timeline_is_closed_once():
    timeline = make_timeline()
    timeline.end(11.0, FinishReason.ABORT)
    with pytest.raises(AssertionError):
        timeline.end(12.0, FinishReason.STOP)
    with pytest.raises(AssertionError):
        timeline.add_tokens(1, 12.0)
