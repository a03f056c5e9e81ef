import pytest

from benchmarks.server import EngineStamps


def test_the_engines_host_part_is_of_every_step_that_gave_tokens_in_the_span():
    # Steps end at 1.0, 2.0 and so on; each takes 5 ms of the loop's thread, after 700 ms of loading.
    stamps = EngineStamps({}, [(float(step), 0.7 + 0.005 * step) for step in range(1, 11)])
    assert stamps.host_cpu_s(2.5, 8.5) == pytest.approx(6 * 0.005)  # the third to the eighth
    assert stamps.host_cpu_s(3.0, 4.0) == pytest.approx(0.005)
    assert stamps.host_cpu_s(3.2, 3.4) == 0.0
