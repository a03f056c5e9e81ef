import json

import pytest

from pomona.core.errors import ConfigError
from pomona.sim.profile_file import CostProfile
from pomona.sim.step_work import StepWork
from support.sim import make_profile


def test_a_profile_survives_its_file():
    profile = make_profile()
    assert CostProfile.from_json(profile.to_json(), "p.json") == profile
    assert profile.cost_model.seconds(StepWork(num_rows=100, num_seqs=1)) == pytest.approx(1e-3 + 100e-6 + 36e-5)
    assert profile.replica.scheduler_config().num_kv_blocks == 1024


@pytest.mark.parametrize(
    "change, path",
    [
        ({"surprise": 1}, "surprise"),
        ({"step_s": -1.0}, "step_s"),
        ({"format": 2}, "format"),
        ({"terms": [{"quantity": "num_wishes", "seconds_each": 1.0}]}, "terms.0.quantity"),
        ({"terms": [{"quantity": "num_rows", "seconds_each": -1.0}]}, "terms.0.seconds_each"),
        ({"replica": {"num_kv_blocks": 0}}, "replica.num_kv_blocks"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_the_field(change, path):
    content = json.loads(make_profile().to_json()) | change
    with pytest.raises(ConfigError, match=f"^p.json: {path}"):
        CostProfile.from_json(json.dumps(content), "p.json")


def test_a_file_that_is_no_json_is_refused():
    with pytest.raises(ConfigError, match=r"^p\.json: "):
        CostProfile.from_json("{", "p.json")
