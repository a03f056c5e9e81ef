import copy
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from pomona.core.errors import ConfigError
from pomona.router.autoscale import AutoscalerName
from pomona.sim.cluster import ClusterSim
from pomona.sim.profile_file import TermEntry
from pomona.sim.setup import prepare
from pomona.sim.spec import parse_spec
from support.sim import make_profile, make_spec

EXTRAS_S = 2e-3
EXTRA_TERMS = (*make_profile().terms, TermEntry(quantity="num_extra_adapters", seconds_each=EXTRAS_S))
ZIPF = {"kind": "zipf", "num_adapters": 50, "alpha": 0.0}

FILES = {
    "extras.json": make_profile(terms=EXTRA_TERMS).to_json(),
    "bare.json": make_profile(adapters=()).to_json(),
    "p.json": make_profile().to_json(),
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.1,30,4\n2023-11-16 18:15:47.1,30,4\n",
    "empty.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n",
    "unsorted.csv": "arrival_s,num_prompt_tokens,num_output_tokens\n2,5,5\n1,5,5\n",
    "negative.csv": "arrival_s,num_prompt_tokens,num_output_tokens\n-2,5,5\n",
    "mooncake.jsonl": '{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}\n',
    "spot.csv": "0,add,a\n0,add,b\n1000,remove,a\n",
    "uses.csv": "lora_args\n\"[{'modelVersionId': 'x', 'scale': 1.0}]\"\n[]\n",
}


def read_lines(name):
    if name not in FILES:
        raise ConfigError(f"{name}: cannot be read: no such file")
    return FILES[name].splitlines()


def changed(path, value, **more):
    values = copy.deepcopy(make_spec(**more))
    section = values
    *parents, last = path.split(".")
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    return values


def trace(file, form="plain"):
    return {"kind": "trace", "file": file, "format": form}


@pytest.mark.parametrize(
    "path, value, complaint",
    [
        ("surprise", 1, "surprise: unknown key"),
        ("router.polcy", "random", "router.polcy: unknown key"),
        ("router.affinity.foo", 1, "router.affinity.foo: unknown key"),
        ("router.policy", "best", "router.policy: Input should be"),
        ("workload.arrivals.rate", 1.0, "workload.arrivals.rate: unknown key"),
        ("workload.arrivals.rate_per_s", "many", "workload.arrivals.rate_per_s: Input should be a valid number"),
        ("workload.kind", "dreams", "workload: Input tag 'dreams'"),
        ("workload.num_requests", 0, "workload.num_requests: "),
        ("workload.duration_s", 5.0, "workload: needs either num_requests or duration_s"),
        ("replica.num_kv_blocks", 0, "replica.num_kv_blocks: "),
        ("replica.machine", "H100", "replica: needs either a profile"),
        ("adapters.lora_ranks", [], "adapters.lora_ranks: "),
        ("adapters.lora_ranks", [8, 0], "adapters.lora_ranks.1: "),
        ("adapters.extras_share", 1.5, "adapters.extras_share: "),
        ("adapters.extras_share", -0.1, "adapters.extras_share: "),
        ("adapters.zipf", {}, "adapters.zipf: unknown key"),
        ("workload.trace", "a.csv", "workload.trace: unknown key"),
        ("replica.overlap_steps", "often", "replica.overlap_steps: "),
        ("replica.num_kv_blocks", 2**64, "replica.num_kv_blocks: must fit 64 bits"),
        ("replica", {"machine": "abacus", "model": "llama-2-7b"}, "replica.machine: 'abacus' is not known"),
        ("replica", {"machine": "H100", "model": "llama-9"}, "replica.model: 'llama-9' is not known"),
        ("cluster.consolidation_interval_s", 1e-9, "cluster.consolidation_interval_s: "),
        ("losses.mean_life_s", 1e-9, "losses.mean_life_s: "),
        ("cluster.num_replicas", 0, "cluster.num_replicas: "),
        ("cluster.start_s", -1.0, "cluster.start_s: "),
        ("until_s", -5.0, "until_s: "),
        ("tenants", {}, "tenants: Dictionary should have at least 1 item"),
        ("tenants", {"a": -1.0}, "tenants.a: "),
        ("slo.ttft_s", float("nan"), "slo.ttft_s: "),
    ],
)
def test_a_bad_spec_is_refused_with_the_path_of_the_key(path, value, complaint):
    with pytest.raises(ConfigError, match=f"^x.toml: {complaint}"):
        parse_spec(changed(path, value), "x.toml")


@pytest.mark.parametrize(
    "path, value, complaint",
    [
        ("workload.arrivals.rate_per_s", 0.0, "workload.arrivals.rate_per_s is 0.0: must be between"),
        ("workload.prompt_lengths", {"kind": "uniform", "min_tokens": 9, "max_tokens": 3}, "workload.prompt_lengths."),
        ("slo.ttft_s", -1.0, "slo.ttft_s is -1.0: must be a positive number"),
        ("workload.arrivals", {"kind": "gamma", "rate_per_s": 1, "cv": 1e-200}, "workload.arrivals.cv is 1e-200: must"),
        ("workload.output_lengths.num_tokens", 10**9, "workload.output_lengths.num_tokens is 1000000000: must"),
        ("adapters.popularity", ZIPF | {"num_adapters": 10**9}, "adapters.popularity.num_adapters is 1000000000: must"),
        ("router.step_model.num_output_tokens", 0, "router.step_model.num_output_tokens is 0.0: must be at least 1"),
        ("autoscaler.interval_s", 1e-300, "autoscaler.interval_s is 1e-300: must be at least 0.001"),
        ("autoscaler", {"policy": "light-load", "max_replicas": 10**9}, "autoscaler.max_replicas is 1000000000: must"),
        ("adapters.extras_share", 0.5, "adapters.extras_share is 0.5: no request asks for an adapter"),
        ("adapters", {"extras_share": 0.5, "popularity": ZIPF}, "adapters.extras_share is 0.5: in replica"),
        ("router.max_requests", 0, "router.max_requests is 0"),
        ("autoscaler", {"policy": "light-load", "min_replicas": 3, "max_replicas": 2}, "autoscaler.min_replicas is 3"),
        ("losses.capacity", [[0.0, 2], [-3.0, 1]], r"losses.capacity\[1\] is at -3.0 s"),
        ("losses.capacity", [[5.0, 2], [3.0, 1]], r"losses.capacity\[1\] is at 3.0 s"),
        ("losses.capacity", [[0.0, 2], [9.0, 0]], "losses.capacity: ends with no instance"),
        ("losses", {"capacity": [[0.0, 2]], "capacity_file": "spot.csv"}, "losses.capacity: leave it out"),
        ("losses", {"capacity": [[0.0, 2]], "capacity_start_s": 60}, "losses.capacity_start_s is 60: needs losses"),
        ("replica.num_devices", 4, "replica.num_devices is 4: needs replica.machine"),
        ("replica.use_tables", True, "replica.use_tables is True: needs replica.machine"),
        ("replica.adapter_share", 0.5, "replica.adapter_share is 0.5: needs replica.machine"),
        ("losses.capacity_file", "nowhere.csv", "losses.capacity_file: nowhere.csv: cannot be read"),
        ("replica.profile", "nowhere.json", "replica.profile: nowhere.json: cannot be read"),
        ("replica.profile", "azure.csv", "replica.profile: azure.csv: "),
        ("replica.num_kv_blocks", 10**9, "replica.num_kv_blocks: makes 1000000000 blocks"),
        ("replica", {"machine": "H100", "model": "llama-2-7b", "use_tables": True}, "replica.use_tables: needs"),
        ("replica.max_model_len", 10**6, "replica.max_model_len is 1000000: the KV cache of 16384 tokens"),
        ("replica", {"machine": "L40S", "model": "llama-3.1-70b"}, "replica.model: llama-3.1-70b needs 141 GB"),
        ("workload", trace("nowhere.csv"), "workload.file: nowhere.csv: cannot be read"),
        ("workload", trace("empty.csv", "azure"), "workload.file: the trace has no rows"),
        ("workload", trace("unsorted.csv"), "workload.file: line 3: its time is 1 s before"),
        ("workload", trace("negative.csv"), "workload.file: line 2: arrival_s is -2"),
        ("workload", trace("azure.csv"), "workload.file: line 1: no column 'arrival_s'"),
        ("workload", trace("azure.csv", "azure") | {"selection": {"start_s": 60}}, "workload.selection.start_s is 60"),
        ("workload", trace("azure.csv", "azure") | {"selection": {"speed": 0}}, "workload.selection.speed is 0"),
        ("adapters", {"lora_ranks": [8, 512], "popularity": {"kind": "zipf", "num_adapters": 5, "alpha": 1}},
         "adapters.lora_ranks.1 is 512: needs 128 adapter pages, a replica has 64"),
        ("adapters.popularity", {"kind": "zipf", "num_adapters": 5, "alpha": -1}, "adapters.popularity.alpha is -1"),
        ("adapters.popularity", {"kind": "recorded", "file": "azure.csv"}, "adapters.popularity.file: line 1: "),
    ],
)  # fmt: skip
def test_what_only_shows_when_the_spec_is_carried_out_is_refused_with_its_path_too(path, value, complaint):
    with pytest.raises(ConfigError, match=f"^{complaint}"):
        prepare(parse_spec(changed(path, value), "x.toml"), read_lines)


def test_adapters_that_would_cost_nothing_are_refused():
    values = changed("replica.profile", "bare.json")
    assert prepare(parse_spec(values, "x"), read_lines).cost_error == 0.01
    values["adapters"] = {"popularity": ZIPF}
    with pytest.raises(ConfigError, match=r"^adapters.popularity: replica.profile was taken without adapters"):
        prepare(parse_spec(values, "x"), read_lines)


def test_a_router_that_counts_other_prefixes_than_the_trace_has_is_refused():
    values = changed("router.affinity.prefix_tokens", 256, workload=trace("mooncake.jsonl", "mooncake"))
    values["replica"]["enable_prefix_cache"] = True
    with pytest.raises(ConfigError, match=r"^router.affinity.prefix_tokens is 256: must be 512, what a hash"):
        prepare(parse_spec(values, "x"), read_lines)


@pytest.mark.parametrize("autoscaler", [{}, {"max_replicas": 3}, {"min_replicas": 5, "max_replicas": 8}])
def test_a_fleet_that_the_autoscaler_would_change_at_once_is_refused(autoscaler):
    values = changed("cluster.num_replicas", 4, autoscaler=autoscaler | {"policy": "light-load"})
    low, high = autoscaler.get("min_replicas", 1), autoscaler.get("max_replicas", 1)
    complaint = (
        f"cluster.num_replicas is 4: must be from autoscaler.min_replicas ({low}) to autoscaler.max_replicas ({high}), "
        "between which light-load keeps the fleet"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(complaint)}$"):
        prepare(parse_spec(values, "x"), read_lines)
    values["autoscaler"]["policy"] = "fixed"
    assert prepare(parse_spec(values, "x"), read_lines).cluster.autoscaler.max_replicas == 4


def test_the_docs_spec_may_choose_any_autoscaler():
    page = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    values = tomllib.loads(page.partition("```toml\n")[2].partition("```")[0]) | {"workload": make_spec()["workload"]}
    values["replica"]["profile"] = "p.json"
    for policy in get_args(AutoscalerName):
        values["autoscaler"]["policy"] = policy
        cluster = prepare(parse_spec(values, "docs"), read_lines).cluster
        assert cluster.autoscaler.policy == policy
        assert cluster.autoscaler.min_replicas <= cluster.num_replicas <= cluster.autoscaler.max_replicas


def test_a_profile_gives_a_replica_its_cost_and_sizes_and_the_spec_overrides_them():
    setup = prepare(parse_spec(changed("replica.num_kv_blocks", 512), "x"), read_lines)
    assert setup.cluster.scheduler.num_kv_blocks == 512
    assert setup.cluster.scheduler.max_num_seqs == 64
    assert setup.cluster.cost_model == make_profile().cost_model
    assert setup.cost_error == 0.01


def test_a_context_that_the_kv_cache_cannot_hold_is_cut():
    setup = prepare(parse_spec(changed("replica.num_kv_blocks", 32), "x"), read_lines)
    assert setup.cluster.scheduler.max_model_len == 512


def test_more_memory_for_adapters_leaves_less_for_kv():
    sizes = []
    for share in (0.1, 0.5):
        section = {"machine": "H100", "model": "llama-3.1-8b", "adapter_share": share}
        scheduler = prepare(parse_spec(changed("replica", section), "x"), read_lines).cluster.scheduler
        sizes.append((scheduler.num_adapter_pages, scheduler.num_kv_blocks))
    assert sizes[0][0] < sizes[1][0]
    assert sizes[0][1] > sizes[1][1]


def test_an_azure_trace_becomes_requests_with_adapters_and_tenants():
    values = make_spec(
        workload=trace("azure.csv", "azure"),
        adapters={"popularity": {"kind": "zipf", "num_adapters": 4, "alpha": 1.0}},
        tenants={"gold": 2.0},
    )
    requests = list(prepare(parse_spec(values, "x"), read_lines).workload)
    assert [request.num_prompt_tokens for request in requests] == [30, 30]
    assert all(request.tenant_id == "gold" and request.adapter_index in range(4) for request in requests)


def test_prompts_of_a_trace_with_hashes_begin_alike_where_it_says_so():
    values = make_spec(workload=trace("mooncake.jsonl", "mooncake"))
    values["replica"]["enable_prefix_cache"] = True
    setup = prepare(parse_spec(values, "x"), read_lines)
    (request,) = setup.workload
    token_ids = setup.prompts.token_ids(0, request, 3)
    assert len(token_ids) == 1103
    assert token_ids[:512] == (1,) * 512 and token_ids[512:1024] == (2,) * 512
    assert set(token_ids[1024:]) == {2**30}
    assert setup.prompts.prefix_keys(0, request) == (b"default/None/0", b"default/None/1")


def test_recorded_popularity_keeps_the_traces_share_of_requests_without_an_adapter():
    values = make_spec(adapters={"popularity": {"kind": "recorded", "file": "uses.csv"}})
    values["workload"]["num_requests"] = 1000
    indices = [request.adapter_index for request in prepare(parse_spec(values, "x"), read_lines).workload]
    assert set(indices) == {None, 0}
    assert 400 < indices.count(None) < 600


def test_spot_capacity_comes_from_a_file():
    values = changed("losses.capacity_file", "spot.csv")
    assert prepare(parse_spec(values, "x"), read_lines).cluster.losses.capacity == ((0.0, 2), (1.0, 1))


def test_a_simulation_that_stops_long_before_its_workload_ends_has_some_hundreds_of_samples():
    values = make_spec(until_s=10.0)
    values["workload"]["num_requests"] = 200_000
    setup = prepare(parse_spec(values, "x"), read_lines)
    sim = ClusterSim(setup.cluster, setup.adapters, setup.prompts)
    sim.run(setup.workload, 10.0)
    assert 300 <= len(sim.samples) <= 301


def test_a_duration_ends_the_workload():
    values = changed("workload.duration_s", 3.0)
    del values["workload"]["num_requests"]
    requests = list(prepare(parse_spec(values, "x"), read_lines).workload)
    assert requests[-1].arrival_s < 3.0
    assert len(requests) > 3


def test_a_machines_data_sheet_does_not_say_what_extras_cost():
    values = make_spec(
        replica={"machine": "H100", "model": "llama-3.1-8b"}, adapters={"extras_share": 0.5, "popularity": ZIPF}
    )
    with pytest.raises(ConfigError, match=r"^adapters.extras_share is 0.5: needs replica.profile"):
        prepare(parse_spec(values, "x"), read_lines)


def with_extras(share, seed=1):
    """A simulation where this share of the adapters has extras; returns it and those adapters."""
    adapters = {"popularity": ZIPF, "extras_share": share}
    values = make_spec(seed=seed, replica={"profile": "extras.json"}, adapters=adapters)
    setup = prepare(parse_spec(values, "x"), read_lines)
    works = []
    sim = ClusterSim(setup.cluster, setup.adapters, setup.prompts)
    sim.observe = lambda replica_id, seconds, work: works.append((seconds, work))
    sim.run(setup.workload)
    return works, setup.adapters.with_extras


def test_adapters_with_extras_make_the_steps_that_they_are_in_longer():
    plain, nobody = with_extras(0.0)
    works, everybody = with_extras(1.0)
    assert not nobody
    assert len(everybody) > 20
    assert all(work.num_extra_adapters == work.num_adapters for _, work in works)
    cost = make_profile().cost_model
    for seconds, work in (*plain, *works):
        assert seconds == pytest.approx(cost.seconds(work) + EXTRAS_S * work.num_extra_adapters)
    assert sum(seconds for seconds, _ in works) > 1.2 * sum(seconds for seconds, _ in plain)


def test_which_adapters_have_extras_is_the_seeds_choice_and_grows_with_the_share():
    few, more = with_extras(0.3)[1], with_extras(0.6)[1]
    assert 0 < len(few) < len(more) < 50
    assert few < more
    assert with_extras(0.3)[1] == few
    assert with_extras(0.3, seed=2)[1] != few


def test_clients_bring_their_own_tenants_and_must_send_something():
    def read(name):
        if name == "r":
            return ["client,window_start_s,rate_rps,cv", "1,0,5,1"]
        if name == "l":
            return ["client,window_start_s,field,p50,p90,p99", "1,0,input_tokens,5,9,9", "1,0,output_tokens,5,9,9"]
        return read_lines(name)

    clients = {"kind": "clients", "rates_file": "r", "lengths_file": "l", "duration_s": 5.0}
    assert list(prepare(parse_spec(make_spec(workload=clients), "x"), read).workload)
    for changes, complaint in (
        ({"tenants": {"gold": 1.0}}, "^tenants: leave it out"),
        (
            {"workload": clients | {"start_s": 9000.0}},
            "^workload.start_s: no client sends anything from 9000 to 9005 s",
        ),
    ):
        with pytest.raises(ConfigError, match=complaint):
            prepare(parse_spec(make_spec(workload=clients) | changes, "x"), read)
