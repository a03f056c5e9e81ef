import pytest

from pomona.core.errors import ConfigError
from pomona.driver.config import DriverConfig
from pomona.driver.restarts import RestartRule

_CONFIG = DriverConfig(max_deaths=5, death_window_s=100.0, restart_delay_s=1.0, max_restart_delay_s=3.0)


def test_pauses_double_up_to_the_limit_and_then_it_gives_up():
    rule = RestartRule(_CONFIG)
    assert [rule.delay_after_death_s(now_s) for now_s in (0.0, 1.0, 2.0, 3.0, 4.0)] == [1.0, 2.0, 3.0, 3.0, None]


def test_deaths_outside_the_window_are_forgotten():
    rule = RestartRule(_CONFIG)
    assert [rule.delay_after_death_s(now_s) for now_s in (0.0, 101.0, 202.0, 303.0, 404.0, 505.0)] == [1.0] * 6


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_limit_that_is_not_positive_is_refused_by_name(value):
    with pytest.raises(ConfigError, match="hang_limit_s"):
        DriverConfig(hang_limit_s=value)
