import tracemalloc
from dataclasses import replace

import pytest

from pomona.core.ids import TenantId
from pomona.router.fleet import RouterConfig
from pomona.sim.cluster import ClusterSim
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.sim.prompts import RecordedPrompts, UniquePrompts
from pomona.workload.spec import WorkloadRequest
from support.clusters import check_all_finished, make_cluster, make_cluster_scheduler, make_population, steady


def test_replicas_that_share_system_prompts_hit_them_and_affinity_hits_more():
    scheduler = make_cluster_scheduler(enable_prefix_cache=True, num_kv_blocks=200)
    workload = [replace(one, tenant_id="t") for one in steady(200, 0.02, num_prompt_tokens=100, num_adapters=8)]
    prompts = RecordedPrompts([(request.adapter_index or 0,) for request in workload], block_tokens=80)
    num_computed = {}
    for policy in ("random", "affinity"):
        config = make_cluster(scheduler=scheduler, num_replicas=4, router=RouterConfig(policy))
        sim = ClusterSim(config, AdapterPopulation((8,), AdapterPages()), prompts)
        sim.run(workload)
        check_all_finished(sim, workload)
        num_computed[policy] = sum(record.num_prompt_tokens for record in sim.replicas.values())
    assert num_computed["affinity"] < num_computed["random"] < 200 * 100


def test_tenants_find_none_of_each_others_prefixes_and_the_router_knows_it():
    scheduler = make_cluster_scheduler(enable_prefix_cache=True)
    workload = [WorkloadRequest(float(k), 100, 2, None, TenantId(tenant)) for k, tenant in enumerate("abab")]
    prompts = RecordedPrompts([(1,)] * 4, block_tokens=64)
    sim = ClusterSim(make_cluster(scheduler=scheduler, num_replicas=1), make_population(), prompts)
    sim.run(workload)
    check_all_finished(sim, workload)
    first, second, third, fourth = (sim.ledger.ttft_s(number) for number in range(4))
    assert first == pytest.approx(second) and third == pytest.approx(fourth) and third < first
    assert prompts.prefix_keys(0, workload[0]) == prompts.prefix_keys(2, workload[2])
    assert not set(prompts.prefix_keys(0, workload[0])) & set(prompts.prefix_keys(1, workload[1]))


def test_prompts_of_equal_length_are_one_object_and_long_ones_are_not_kept_for_ever():
    prompts = UniquePrompts(is_distinct=False)

    def make(num_tokens: int) -> tuple[int, ...]:
        return prompts.token_ids(0, WorkloadRequest(0.0, num_tokens, 1), 0)

    assert make(100) is make(100)
    assert make(20_000) is make(20_000)
    tracemalloc.start()
    for num_tokens in range(20_000, 20_500):  # 80 MB together
        assert len(make(num_tokens)) == num_tokens
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_bytes < 20e6
