import pytest

from benchmarks.scale_sim import measure, measure_sharded, profile


def test_a_small_cluster_is_simulated_measured_and_extrapolated():
    row = measure(4, 1000, 100.0, 2.0, "affinity")
    assert 0.1 < row["busy_share"] < 1.1
    assert row["num_requests"] == pytest.approx(100, rel=0.4)
    assert row["extrapolated_hours_for_ten_minutes"] == pytest.approx(row["wall_s"] * 600 / 3600)


def test_processes_simulate_the_same_requests():
    one, two = (measure_sharded(4, 1000, 100.0, 2.0, "least-loaded", count) for count in (1, 2))
    assert one["busy_share"] == pytest.approx(two["busy_share"])
    assert one["num_requests"] == two["num_requests"]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_tokens_are_those_of_the_steady_part(num_processes):
    case = (8, 1000, 400.0, 2.0, "least-loaded")
    row = measure(*case) if num_processes == 1 else measure_sharded(*case, num_processes)
    # Answers have 32 tokens on average.
    assert row["tokens_per_wall_s"] / row["requests_per_wall_s"] == pytest.approx(32, rel=0.15)


def test_the_parts_of_the_time_add_up():
    shares = profile(4, 1000, 100.0, 0.5, "affinity")
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["share scheduler"] > 0.1
    assert shares["share workload"] > 0.0
