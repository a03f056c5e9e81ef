import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.core.errors import ConfigError
from pomona.router.autoscale import AutoscalerConfig, FleetObservation, make_autoscaler


def _seen(
    *loads: int,
    num_waiting: int = 0,
    num_ended: int = 0,
    num_missed: int = 0,
    idle: tuple[float, ...] = (),
    num_starting: int = 0,
):
    return FleetObservation(0.0, loads, num_waiting, num_ended, num_missed, idle, num_starting)


def _scaler(policy: str, **changes: object):
    values = {"min_replicas": 1, "max_replicas": 10, "num_calm": 1} | changes
    return make_autoscaler(AutoscalerConfig(policy=policy, **values))  # type: ignore[arg-type]


def test_a_fixed_fleet_is_replaced_when_it_shrinks():
    assert _scaler("fixed", max_replicas=4).wanted(_seen(3, 3)) == 4


def test_a_fleet_without_a_lightly_loaded_replica_grows_by_one():
    scaler = _scaler("light-load", light_requests=8)
    assert scaler.wanted(_seen(20, 9)) == 3
    assert scaler.wanted(_seen(20, 7)) == 2


def test_empty_replicas_go_but_one_light_one_stays():
    scaler = _scaler("light-load", light_requests=8)
    assert scaler.wanted(_seen(20, 0, 0, 0)) == 2
    assert scaler.wanted(_seen(20, 3, 0, 0)) == 2
    assert scaler.wanted(_seen(0, 0)) == 1


def test_a_light_load_fleet_grows_no_further_while_those_that_start_will_do():
    scaler = _scaler("light-load", light_requests=8)
    assert scaler.wanted(_seen(20, num_waiting=3)) == 2
    assert scaler.wanted(_seen(20, 0, num_waiting=7, num_starting=1)) == 2
    assert scaler.wanted(_seen(20, 0, num_waiting=8, num_starting=1)) == 3
    assert scaler.wanted(_seen(20, 0, 0, num_waiting=8, num_starting=2)) == 3
    assert scaler.wanted(_seen(20, 5, num_waiting=1)) == 3


def test_late_requests_make_a_load_proportional_fleet_grow_and_an_idle_tail_makes_it_shrink():
    scaler = _scaler("load-proportional", max_missed_share=0.01, grow_share=0.5)
    assert scaler.wanted(_seen(5, 5, 5, 5, num_ended=100, num_missed=2)) == 6
    assert scaler.wanted(_seen(5, 5, 0, 0, num_ended=100, num_missed=1, idle=(0.1, 0.2, 0.95, 1.0))) == 3
    assert scaler.wanted(_seen(5, 5, 0, num_ended=100, idle=(0.1, 0.2, 0.95))) == 3


def test_utilisation_is_brought_to_its_target_unless_it_is_near():
    scaler = _scaler("target-utilisation", target_requests=10.0, deadband=0.1)
    assert scaler.wanted(_seen(20, 20)) == 4
    assert scaler.wanted(_seen(10, 11)) == 2
    assert scaler.wanted(_seen(2, 2, 2)) == 1


def test_shrinking_needs_agreement_and_growth_interrupts_it():
    scaler = _scaler("target-utilisation", target_requests=10.0, num_calm=3)
    quiet, busy = _seen(1, 1, 1, 1), _seen(20, 20, 20, 20)
    assert [scaler.wanted(seen) for seen in (quiet, quiet, busy, quiet, quiet, quiet)] == [4, 4, 8, 4, 4, 1]


@given(
    st.sampled_from(["fixed", "light-load", "load-proportional", "target-utilisation"]),
    st.lists(st.tuples(st.lists(st.integers(0, 60), max_size=12), st.integers(0, 9), st.integers(0, 9)), max_size=8),
)
def test_the_fleet_stays_between_its_bounds(policy: str, history):
    scaler = _scaler(policy, min_replicas=2, max_replicas=7)
    for loads, num_waiting, num_missed in history:
        seen = _seen(*loads, num_waiting=num_waiting, num_ended=9, num_missed=num_missed, idle=(1.0,) * len(loads))
        assert 2 <= scaler.wanted(seen) <= 7


@pytest.mark.parametrize(
    "changes",
    [
        {"min_replicas": 0},
        {"min_replicas": 3, "max_replicas": 2},
        {"interval_s": 0.0},
        {"target_requests": float("nan")},
        {"deadband": 2.0},
        {"num_calm": 0},
    ],
)
def test_settings_out_of_range_are_refused_by_name(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        AutoscalerConfig(**changes)
