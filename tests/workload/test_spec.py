import dataclasses
import itertools
import subprocess
import sys
from collections import Counter

import pytest

from pomona.core.errors import ConfigError
from pomona.core.ids import TenantId
from pomona.workload.arrivals import AllAtOnce, PoissonArrivals
from pomona.workload.lengths import FixedLength, UniformLength
from pomona.workload.popularity import BaseOnly, GroupPopularity, ZipfPopularity
from pomona.workload.spec import WorkloadSpec, generate, iter_requests


def make_spec(**changes) -> WorkloadSpec:
    spec = WorkloadSpec(
        num_requests=64,
        arrivals=PoissonArrivals(rate_per_s=10.0),
        prompt_lengths=UniformLength(8, 512),
        output_lengths=UniformLength(1, 64),
        popularity=GroupPopularity("zipf-1.5", num_adapters=8),
    )
    return dataclasses.replace(spec, **changes)


def test_equal_specs_generate_equal_requests():
    assert generate(make_spec()) == generate(make_spec())


def test_another_seed_changes_every_aspect():
    one, other = generate(make_spec(seed=1)), generate(make_spec(seed=2))
    for aspect in ("arrival_s", "num_prompt_tokens", "num_output_tokens", "adapter_index"):
        assert [getattr(request, aspect) for request in one] != [getattr(request, aspect) for request in other]


@pytest.mark.parametrize(
    "change, aspects",
    [
        ({"popularity": BaseOnly()}, {"adapter_index"}),
        ({"arrivals": AllAtOnce()}, {"arrival_s"}),
        ({"prompt_lengths": FixedLength(1000)}, {"num_prompt_tokens"}),
        ({"output_lengths": FixedLength(1000)}, {"num_output_tokens"}),
        ({"tenant_weights": ((TenantId("a"), 1.0),)}, {"tenant_id"}),
    ],
)
def test_changing_one_aspect_leaves_the_others_as_they_were(change, aspects):
    before, after = generate(make_spec()), generate(make_spec(**change))
    for field in dataclasses.fields(before[0]):
        is_equal = [getattr(r, field.name) for r in before] == [getattr(r, field.name) for r in after]
        assert is_equal == (field.name not in aspects)


def test_a_longer_workload_begins_with_the_shorter_one():
    assert generate(make_spec(num_requests=200))[:64] == generate(make_spec())


def test_requests_come_one_by_one_so_that_millions_need_no_memory():
    endless = make_spec(num_requests=10**12, popularity=ZipfPopularity(100, 1.0))
    assert len(list(itertools.islice(iter_requests(endless), 5))) == 5


def test_tenants_get_their_shares():
    spec = make_spec(num_requests=20_000, tenant_weights=((TenantId("a"), 3.0), (TenantId("b"), 1.0)))
    counts = Counter(request.tenant_id for request in generate(spec))
    assert counts[TenantId("a")] / 20_000 == pytest.approx(0.75, rel=0.02)
    assert counts.total() == 20_000


@pytest.mark.parametrize(
    "change, field",
    [
        ({"num_requests": 0}, "num_requests"),
        ({"tenant_weights": ()}, "tenant_weights"),
        ({"tenant_weights": ((TenantId("a"), 1.0), (TenantId("a"), 1.0))}, "tenant_weights"),
        ({"tenant_weights": ((TenantId("a"), 0.0),)}, "tenant_weights\\[a\\]"),
    ],
)
def test_impossible_specs_are_refused_by_name(change, field):
    with pytest.raises(ConfigError, match=f"^{field}"):
        make_spec(**change)


def test_the_same_seed_means_the_same_requests_in_another_process():
    code = """
from pomona.workload.arrivals import GammaArrivals
from pomona.workload.lengths import FixedLength, UniformLength
from pomona.workload.popularity import ZipfPopularity
from pomona.workload.spec import WorkloadSpec, generate

arrivals = GammaArrivals(2.0, 2.0)
spec = WorkloadSpec(3, arrivals, UniformLength(1, 99), FixedLength(2), ZipfPopularity(50, 1.0), seed=7)
print(generate(spec))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
