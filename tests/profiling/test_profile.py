from pomona.profiling.fit import Sample
from pomona.profiling.points import candidates
from pomona.profiling.profile import ProfileLimits, run_profile
from support.engine import make_config

CONFIG = make_config(num_kv_blocks=64, max_model_len=128, max_num_batched_tokens=64, max_num_seqs=2)


class FakeMeter:
    config = CONFIG

    def warm_up(self, points, max_seconds):
        pass

    def measure(self, point, point_index):
        work = point.work()
        return [Sample(work, 1e-3 + 1e-5 * work.num_rows, point_index)]


def test_a_profile_that_has_measured_every_batch_says_so():
    limits = ProfileLimits(max_points=30, max_seconds=300.0)
    outcome = run_profile(FakeMeter(), candidates(CONFIG, (), 5), limits, lambda progress: False)
    assert (outcome.num_points, outcome.reason) == (8, "no other batch to measure")  # three to begin with
    outcome = run_profile(FakeMeter(), candidates(CONFIG, (), 30), limits, lambda progress: False)
    assert (outcome.num_points, outcome.reason) == (30, "30 points")
