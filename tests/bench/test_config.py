import math
from typing import Any

import pytest

from pomona.bench.config import ALL_POPULARITIES, ServeBenchConfig, expand_popularities
from pomona.core.errors import ConfigError
from pomona.workload.arrivals import AllAtOnce, GammaArrivals, PoissonArrivals


def test_an_infinite_rate_sends_all_at_once_and_burstiness_one_is_poisson():
    assert ServeBenchConfig().arrivals == AllAtOnce()
    assert ServeBenchConfig(request_rate_per_s=4.0).arrivals == PoissonArrivals(4.0)
    assert ServeBenchConfig(request_rate_per_s=4.0, arrival_cv=2.0).arrivals == GammaArrivals(4.0, 2.0)


def test_all_means_base_first_and_then_the_four_popularities():
    assert expand_popularities("all") == ("base", "identical", "distinct", "uniform", "zipf-1.5")
    assert expand_popularities("all") == ALL_POPULARITIES


def test_all_among_others_is_all():
    assert expand_popularities("base, all") == ALL_POPULARITIES


def test_several_popularities_are_joined_by_commas():
    assert expand_popularities("uniform, base") == ("uniform", "base")


def test_the_api_key_is_not_shown():
    assert "hunter2" not in repr(ServeBenchConfig(api_key="hunter2"))


@pytest.mark.parametrize(
    "change, field",
    [
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "http://me:secret@host"}, "base_url"),
        ({"base_url": "http://127.0.0.1:80000"}, "base_url"),
        ({"base_url": "http://[::1"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"popularities": ()}, "popularities"),
        ({"popularities": expand_popularities("base,zipf")}, "popularity"),
        ({"popularities": expand_popularities("base,distinct,base")}, "popularities"),
        ({"group_size": 0}, "group_size"),
        ({"num_requests": 0}, "num_requests"),
        ({"request_rate_per_s": 0.0}, "request_rate_per_s"),
        ({"request_rate_per_s": math.nan}, "request_rate_per_s"),
        ({"arrival_cv": -1.0}, "arrival_cv"),
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"num_warmup_requests": -1}, "num_warmup_requests"),
        ({"temperature": math.nan}, "temperature"),
        ({"request_timeout_s": 0.0}, "request_timeout_s"),
    ],
)
def test_impossible_settings_are_refused_by_name(change: dict[str, Any], field):
    with pytest.raises(ConfigError, match=rf"^{field} is"):
        ServeBenchConfig(**change)
