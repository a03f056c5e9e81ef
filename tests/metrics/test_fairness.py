"""Differences in service."""

import pytest

from pomona.core.ids import TenantId
from pomona.metrics.fairness import (
    ServiceLog,
    ServiceSpan,
    accumulated_gap,
    jain_index,
    largest_accumulated_gap,
    windowed_difference,
)

A, B = TenantId("a"), TenantId("b")


def test_jains_index_is_one_for_equals_and_one_over_n_for_one_who_has_all():
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([0.0, 0.0]) == 1.0


def test_the_accumulated_gap_is_between_most_and_least_served_since_the_start():
    log = ServiceLog()
    for time_s in range(10):
        log.add(A, float(time_s), 3.0)
        log.add(B, float(time_s), 1.0)
    assert accumulated_gap(log, [A, B], 4.5) == 10.0
    assert accumulated_gap(log, [A, B, TenantId("none")], 4.5) == 15.0
    assert largest_accumulated_gap(log, [A, B], [1.0, 9.0, 2.0]) == 20.0
    assert log.total(A, -1.0) == 0.0


def test_unmet_demand_counts_and_unasked_service_does_not():
    # Both served for 60 s; a gets 120 units and b 60. In one case b asked for no more, in the other for as much as a.
    served = [ServiceSpan(A, 1.0, 0.0, 60.0, 120.0), ServiceSpan(B, 1.0, 0.0, 60.0, 60.0)]
    assert windowed_difference(served, [30.0]).mean == pytest.approx(0.0)
    late = ServiceSpan(B, 2.0, 100.0, 160.0, 60.0)
    assert windowed_difference([*served, late], [30.0]).largest == pytest.approx(1.0)


def test_a_window_sees_its_part_of_a_request():
    spans = [ServiceSpan(A, 0.0, 0.0, 100.0, 100.0), ServiceSpan(B, 0.0, 50.0, 100.0, 100.0)]
    found = windowed_difference(spans, [20.0, 80.0], window_s=40.0)
    # First window: a served at 1, b at 0 though it asked at 2.5. Second: b served at 2, a at 1 and asking nothing.
    assert (found.largest, found.mean, found.variance) == pytest.approx((1.0 + 0.0, 1.0, 0.0))
