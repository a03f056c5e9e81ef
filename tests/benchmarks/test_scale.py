import pytest

from benchmarks.scale_sim import measure, measure_sharded, profile


def test_a_small_cluster_is_simulated_measured_and_extrapolated():
    row = measure(4, 1000, 100.0, 1.5, "affinity")
    assert 0.1 < row["busy_share"] < 1.1
    assert row["num_requests"] == pytest.approx(100, rel=0.4)
    assert row["extrapolated_hours_for_ten_minutes"] == pytest.approx(row["wall_s"] * 600 / 3600)


def test_processes_simulate_the_same_requests():
    one, two = (measure_sharded(4, 1000, 100.0, 1.5, "least-loaded", count) for count in (1, 2))
    assert one["busy_share"] == pytest.approx(two["busy_share"])
    assert one["num_requests"] == two["num_requests"]


def test_the_parts_of_the_time_add_up():
    shares = profile(4, 1000, 100.0, 0.5, "affinity")
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["share scheduler"] > 0.1
