"""Objectives are judged per finished request, and counted over all that arrived."""

import pytest

from pomona.core.errors import ConfigError
from pomona.core.request import FinishReason
from pomona.metrics.slo import Slo, attainment, goodput
from pomona.metrics.timeline import RequestTimeline


def make_ended(*token_times_s: float, reason: FinishReason | None = FinishReason.STOP) -> RequestTimeline:
    timeline = RequestTimeline(0.0)
    for time_s in token_times_s:
        timeline.add_tokens(1, time_s)
    timeline.end(100.0, reason)
    return timeline


@pytest.mark.parametrize(
    ("slo", "is_met"),
    [
        (Slo(), True),
        (Slo(ttft_s=1.0, tpot_s=0.5, e2e_s=2.0), True),
        (Slo(ttft_s=0.9), False),
        (Slo(tpot_s=0.4), False),
        (Slo(e2e_s=1.9), False),
    ],
)
def test_every_bound_must_hold(slo, is_met):
    assert slo.is_met_by(make_ended(1.0, 1.5, 2.0)) is is_met


def test_one_token_meets_any_tpot():
    assert Slo(tpot_s=0.001).is_met_by(make_ended(1.0))


@pytest.mark.parametrize("reason", [None, FinishReason.ABORT, FinishReason.FAIL])
def test_only_whole_answers_count(reason):
    assert not Slo().is_met_by(make_ended(1.0, reason=reason))


def test_attainment_counts_over_arrivals():
    arrived = [make_ended(1.0), make_ended(3.0), make_ended(reason=None), RequestTimeline(0.0)]
    assert attainment(Slo(ttft_s=2.0), arrived) == 0.25
    assert attainment(Slo(), []) is None


def test_goodput_is_requests_per_second():
    assert goodput(Slo(ttft_s=2.0), [make_ended(1.0), make_ended(3.0), make_ended(1.5)], duration_s=4.0) == 0.5


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_no_positive_number_is_refused(bound):
    with pytest.raises(ConfigError, match="ttft_s"):
        Slo(ttft_s=bound)
