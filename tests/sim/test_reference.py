"""Where the meanings on docs/reference/simulation.md come from; that it is fresh: tests/cli/test_reference.py."""

from pomona.sim.reference import field_docs
from pomona.sim.spec import LossesSection, ReplicaSection


def test_meanings_come_from_where_the_key_was_written_first():
    replica, losses = field_docs(ReplicaSection), field_docs(LossesSection)
    assert replica["num_kv_blocks"].startswith("KV blocks on the device")  # SchedulerConfig's
    assert replica["max_waiting"].startswith("Requests that may wait on a replica")  # its own
    assert losses["on_loss"].startswith("What happens to requests")  # LossConfig's
    assert losses["mean_life_s"].startswith("Mean time to failure of a replica")  # its own goes before LossConfig's
