from typing import get_args

import pytest

from benchmarks.router import REQUESTS_PER_REPLICA, make_fleet, measure, requests, scan
from pomona.router.fleet import PolicyName


@pytest.mark.parametrize("policy", get_args(PolicyName))
def test_the_stream_keeps_the_load_that_the_page_states(policy: PolicyName):
    cost = measure(policy, num_replicas=4, num_decisions=20)
    assert 0.0 < cost["decision_us"] < cost["request_us"]


def test_every_policy_sees_the_same_requests():
    assert requests(50) == requests(50)
    assert len({request.adapter_id for request in requests(200)}) > 100
    assert len(make_fleet("punica", 7)) == 7
    assert REQUESTS_PER_REPLICA < 32
    assert scan(10) > 0.0
