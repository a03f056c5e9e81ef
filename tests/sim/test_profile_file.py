import json

import pytest

from pomona.core.errors import ConfigError
from pomona.sim.profile_file import CostProfile, TermEntry
from pomona.sim.step_work import StepWork
from support.sim import make_profile


def test_a_profile_survives_its_file():
    profile = make_profile()
    assert CostProfile.from_json(profile.to_json(), "p.json") == profile
    assert profile.cost_model.seconds(StepWork(num_rows=100, num_seqs=1)) == pytest.approx(1e-3 + 100e-6 + 36e-5)


def test_what_is_read_beside_few_rows_is_free_beside_many():
    read = TermEntry(quantity="sum_adapter_ranks", seconds_each=1e-3, beside_rows=8)
    profile = make_profile().model_copy(update={"terms": (read,)})
    cost = CostProfile.from_json(profile.to_json(), "p.json").cost_model
    assert cost.seconds(StepWork(num_rows=8, sum_adapter_ranks=16)) == pytest.approx(cost.step_s + 16e-3)
    assert cost.seconds(StepWork(num_rows=9, sum_adapter_ranks=16)) == cost.step_s


@pytest.mark.parametrize(
    "change, path",
    [
        ({"surprise": 1}, "surprise"),
        ({"step_s": -1.0}, "step_s"),
        ({"format": 2}, "format"),
        ({"terms": [{"quantity": "num_wishes", "seconds_each": 1.0}]}, "terms.0.quantity"),
        ({"terms": [{"quantity": "num_rows", "seconds_each": -1.0}]}, "terms.0.seconds_each"),
        ({"terms": [{"quantity": "num_rows", "seconds_each": 1.0, "beside_rows": 0}]}, "terms.0.beside_rows"),
        (
            {"terms": [{"quantity": "num_rows", "seconds_each": 1.0, "above": 9, "up_to": 5}]},
            "terms.0: .*up_to is 5",
        ),
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
