import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomona.core.errors import ConfigError
from pomona.sim.plan_search import PlanSearch, PlanSettings, SearchSpace, Trial, TrialOutcome

SHARES = (0.1, 0.3)
POLICIES = ("least-loaded", "affinity")


def _outcome(attainment: float) -> TrialOutcome:
    return TrialOutcome(attainment, 0.1, 0.01, 0.5, 3, 100.0)


class World:
    """Attainment is the capacity of the settings over the load, at most 1."""

    def __init__(self, capacity: dict[tuple[float, str], float], load: float, whole_load: float | None = None) -> None:
        self.capacity = capacity
        self.load = load
        self.whole_load = load if whole_load is None else whole_load
        self.trials: list[Trial] = []
        self.relaxed: dict[str, float] = {}

    def attainment(self, settings: PlanSettings, load: float) -> float:
        return min(1.0, settings.num_replicas * self.capacity[settings.adapter_share, settings.policy] / load)

    def __call__(self, trial: Trial) -> TrialOutcome:
        self.trials.append(trial)
        load = (self.whole_load if trial.is_whole else self.load) * trial.rate_scale
        load /= self.relaxed.get(trial.relaxation, 1.0)
        return _outcome(self.attainment(trial.settings, load))


def _space(**changes: object) -> SearchSpace:
    values: dict[str, object] = {
        "max_replicas": 40,
        "adapter_shares": SHARES,
        "policies": POLICIES,
        "min_attainment": 0.9,
    }
    return SearchSpace(**(values | changes))  # type: ignore[arg-type]


@given(
    st.lists(st.floats(0.5, 2.0), min_size=4, max_size=4),
    st.floats(0.5, 40.0),
    st.floats(1.0, 1.5),
)
def test_the_answer_is_the_smallest_fleet_of_the_grid(capacities, load: float, whole_factor: float):
    grid = list(itertools.product(SHARES, POLICIES))
    world = World(dict(zip(grid, capacities, strict=True)), load)
    plan = PlanSearch(_space(max_replicas=200), world).run()

    def smallest(key) -> int:
        return next(n for n in itertools.count(1) if min(1.0, n * world.capacity[key] / load) >= 0.9)

    assert plan.settings.num_replicas == min(smallest(key) for key in grid)
    assert plan.outcome.attainment >= 0.9
    if plan.settings.num_replicas > 1:
        assert plan.one_fewer is not None
        assert plan.one_fewer.attainment < 0.9


@given(st.lists(st.floats(0.5, 2.0), min_size=4, max_size=4), st.floats(0.5, 40.0))
def test_no_trial_is_simulated_twice(capacities, load: float):
    world = World(dict(zip(itertools.product(SHARES, POLICIES), capacities, strict=True)), load)
    plan = PlanSearch(_space(max_replicas=200), world).run()
    assert len(world.trials) == len(set(world.trials)) == plan.num_trials


@pytest.mark.parametrize(("window_load", "whole_load"), [(4.0, 6.0), (6.0, 4.0)])
def test_the_whole_workload_decides_where_it_is_harder_or_easier_than_the_window(window_load, whole_load):
    world = World(dict.fromkeys(itertools.product(SHARES, POLICIES), 1.0), load=window_load, whole_load=whole_load)
    plan = PlanSearch(_space(), world).run()
    assert plan.settings.num_replicas == whole_load
    assert plan.one_fewer is not None
    assert plan.one_fewer.attainment == pytest.approx((whole_load - 1) / whole_load)


def test_what_binds_shows_on_the_whole_workload_where_the_window_is_too_easy():
    world = World(dict.fromkeys(itertools.product(SHARES, POLICIES), 1.0), load=4.0, whole_load=6.0)
    world.relaxed = {"kv": 1.1}
    plan = PlanSearch(_space(), world).run()
    assert plan.binding["none"] == pytest.approx(5 / 6)
    assert plan.binds == "kv"


def test_what_binds_is_what_helps_most_when_plentiful():
    world = World(dict.fromkeys(itertools.product(SHARES, POLICIES), 1.0), load=4.0)
    world.relaxed = {"kv": 1.2, "adapter memory": 1.1}
    plan = PlanSearch(_space(), world).run()
    assert plan.binds == "kv"
    assert plan.binding["none"] == plan.binding["compute"] == pytest.approx(0.75)


def test_a_single_replica_has_none_fewer_and_is_starved_by_load_instead():
    world = World(dict.fromkeys(itertools.product(SHARES, POLICIES), 1.0), load=0.9)
    plan = PlanSearch(_space(), world).run()
    assert (plan.settings.num_replicas, plan.one_fewer) == (1, None)
    assert plan.binding["none"] < 1.0


def test_the_curve_and_the_sensitivity_surround_the_answer():
    world = World(dict.fromkeys(itertools.product(SHARES, POLICIES), 1.0), load=10.0)
    plan = PlanSearch(_space(), world).run()
    assert plan.settings.num_replicas == 9
    assert [count for count, _ in plan.curve] == [7, 8, 9, 10, 11]
    assert [share for _, share in plan.curve] == sorted(share for _, share in plan.curve)
    assert dict(plan.sensitivity)["rate x 1.2"] == pytest.approx(9 / 12)


@pytest.mark.parametrize("whole_load", [4.0, 6.0])
def test_settings_that_cannot_do_hide_none_that_can(whole_load):
    capacity = dict.fromkeys(itertools.product(SHARES, POLICIES), 0.01) | {(0.3, "affinity"): 1.0}
    plan = PlanSearch(_space(), World(capacity, load=4.0, whole_load=whole_load)).run()
    assert plan.settings == PlanSettings(int(whole_load), 0.3, "affinity")


def test_settings_that_are_alike_in_the_window_are_told_apart_by_the_whole_workload():
    class Alike(World):
        def __call__(self, trial: Trial) -> TrialOutcome:
            if trial.is_whole:
                return super().__call__(trial)
            self.trials.append(trial)
            return _outcome(1.0 if trial.settings.num_replicas > 1 else 0.0)

    capacity = dict.fromkeys(itertools.product(SHARES, POLICIES), 1.0) | {(0.3, "affinity"): 2.0}
    plan = PlanSearch(_space(), Alike(capacity, load=8.0)).run()
    assert plan.settings == PlanSettings(4, 0.3, "affinity")
    assert plan.one_fewer_settings == PlanSettings(3, 0.3, "affinity")
    assert plan.one_fewer is not None and plan.one_fewer.attainment == pytest.approx(0.75)


def test_objectives_that_the_largest_fleet_misses_are_refused_with_how_far_it_got():
    world = World(dict.fromkeys(itertools.product(SHARES, POLICIES), 1.0), load=100.0)
    with pytest.raises(ConfigError, match=r"max_replicas is 40: attainment is then 40\.0% at best"):
        PlanSearch(_space(), world).run()
    world = World(dict.fromkeys(itertools.product(SHARES, POLICIES), 1.0), load=20.0, whole_load=80.0)
    with pytest.raises(ConfigError, match=r"is 40: attainment of the whole workload is then 50\.0% at best"):
        PlanSearch(_space(), world).run()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_replicas": 0}, "max_replicas"),
        ({"adapter_shares": ()}, "adapter_shares"),
        ({"adapter_shares": (0.0,)}, "adapter_shares"),
        ({"policies": ()}, "policies"),
        ({"min_attainment": math.nan}, "min_attainment"),
    ],
)
def test_spaces_without_a_choice_are_refused_by_name(changes, name: str):
    with pytest.raises(ConfigError, match=name):
        _space(**changes)
