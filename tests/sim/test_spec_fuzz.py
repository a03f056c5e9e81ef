"""Whatever is done to a valid spec, it loads or is refused with the path of a key: nothing else is raised, and nothing
hangs. What loads is then simulated for a moment, unless it is large.
"""

import copy
import gzip
import importlib.resources
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomona.core.errors import ConfigError
from pomona.sim.cluster import ClusterSim
from pomona.sim.plan_spec import PlanSection, parse_plan
from pomona.sim.setup import prepare
from pomona.sim.spec import SimulationSpec, parse_spec
from support.sim import make_profile, make_spec


def _bundled(name, num_lines):
    packed = importlib.resources.files("pomona").joinpath("workload", "data", f"{name}.gz").read_bytes()
    return gzip.decompress(packed).decode().splitlines()[:num_lines]


FILES = {
    "p.json": make_profile().to_json().splitlines(),
    "azure.csv": _bundled("azure-conv-2023.csv", 30),
    "mooncake.jsonl": _bundled("mooncake-conversation.jsonl", 10),
    "plain.csv": ["arrival_s,num_prompt_tokens,num_output_tokens", *(f"{k * 0.1},{k + 1},5" for k in range(20))],
    "rates.csv": _bundled("servegen-m-small-rates.csv", 40),
    "lengths.csv": _bundled("servegen-m-small-lengths.csv", 40),
    "spot.csv": _bundled("spot-g4dn-12xlarge.csv", 20),
    "uses.csv": ["lora_args", "\"[{'modelVersionId': 'x', 'scale': 1.0}]\"", "[]"],
}

SPECS = [
    make_spec(),
    make_spec(
        seed=3,
        until_s=60.0,
        replica={
            "machine": "cpu-2-cores",
            "model": "smollm2-135m",
            "num_kv_blocks": 500,
            "max_num_seqs": 16,
            "block_size": 16,
            "overlap_steps": True,
        },
        adapters={
            "lora_ranks": [8, 16],
            "popularity": {"kind": "zipf", "num_adapters": 20, "alpha": 1.0},
            "extras_share": 0.0,
        },
        tenants={"gold": 2.0, "free": 1.0},
        cluster={"num_replicas": 2, "start_s": 1.0, "consolidation_interval_s": 1.0, "max_moves": 4},
        router={"policy": "affinity", "affinity": {"max_holders": 2}, "step_model": {"base_s": 0.01}},
        autoscaler={"policy": "target-utilisation", "max_replicas": 3, "interval_s": 0.2, "target_requests": 2.0},
        losses={"mean_life_s": 20.0, "capacity": [[0.0, 3], [0.5, 1]], "notice_s": 0.1},
        slo={"ttft_s": 0.5, "tpot_s": 0.1},
    ),
    make_spec(
        adapters={"popularity": {"kind": "group", "groups": "uniform", "num_adapters": 4, "group_size": 8}},
        workload={
            "kind": "synthetic",
            "duration_s": 2.0,
            "arrivals": {"kind": "gamma", "rate_per_s": 20.0, "cv": 2.0},
            "prompt_lengths": {"kind": "lognormal", "median_tokens": 30.0, "sigma": 0.8, "max_tokens": 200},
            "output_lengths": {"kind": "uniform", "min_tokens": 1, "max_tokens": 9},
        },
        router={"policy": "rank-aware", "step_model": {"num_output_tokens": 10.0}},
        losses={"capacity_file": "spot.csv", "capacity_start_s": 10.0},
    ),
    make_spec(
        workload={
            "kind": "trace",
            "file": "azure.csv",
            "format": "azure",
            "selection": {"duration_s": 5.0, "speed": 2},
        },
        adapters={"popularity": {"kind": "recorded", "file": "uses.csv", "base_share": 0.5}},
    ),
    make_spec(
        replica={"profile": "p.json", "enable_prefix_cache": True, "max_model_len": 2048},
        workload={"kind": "trace", "file": "mooncake.jsonl", "format": "mooncake"},
        router={"policy": "credit"},
    ),
    make_spec(
        workload={"kind": "trace", "file": "plain.csv", "format": "plain", "selection": {"max_prompt_tokens": 9}}
    ),
    make_spec(
        workload={"kind": "clients", "rates_file": "rates.csv", "lengths_file": "lengths.csv", "duration_s": 2.0},
        slo={"e2e_s": 5.0},
    ),
]


def _filled(spec):
    """The spec with every key that it could have, so that each is spoiled in its turn."""
    filled = parse_spec(spec, "x.toml").model_dump(mode="json")
    if "tenants" not in spec:
        del filled["tenants"]
    return filled


FILLED = [_filled(spec) for spec in SPECS]
PLANS = [
    spec
    | {"until_s": None, "slo": {"ttft_s": 1.0}, "plan": {**PlanSection().model_dump(mode="json"), "max_replicas": 2}}
    for spec in FILLED
]

NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 7, 10**6, 10**9, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400, -(10**400)]),
    st.sampled_from([-0.0, 0.5, 1.0, -1.5, 1e-320, 1e-200, 1e-9, 1e9, 1e200, 1e300, 1e308, -1e308]),
    st.sampled_from([float("inf"), float("nan")]),
)
STRINGS = st.sampled_from(
    ["", "5", "nowhere.csv", "best", *FILES, "zipf", "trace", "fixed", "plain", "H200", "a\0b", "\ud800", "x" * 300]
)
OTHERS = st.one_of(
    st.sampled_from([True, False, None, [], {}, [[]], [1, -1], [8, "x"], [[0.0, 1], [0.0, 2]], [[5.0, 1], [1.0, 1]]]),
    st.sampled_from([{"kind": "dreams"}, {"kind": 3}, {"kind": "base"}, {"": 1}, {"a": {"b": [1]}}]),
    st.sampled_from([[[0.0, 1], [1.0, 0]], [[1.0, 2**62]], ["a"] * 1000]),
)
ANYTHING = st.one_of(NUMBERS, STRINGS, OTHERS)
BAD_WORDS = (
    "",
    "nan",
    "inf",
    "-1",
    "1e999",
    "1" * 500,
    "x",
    '"',
    "[",
    "[" * 5000,
    "{}",
    "\0",
    "1" * 200_000,
    ",",
    "a,b",
)


def _paths(values, path=()):
    """Every key and element, sections included."""
    entries = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from _paths(value, (*path, key))


def _at(values, path):
    for key in path:
        values = values[key]
    return values


def _like(value):
    """Values of the type of this one, but not as expected."""
    if isinstance(value, dict | list | bool):
        return OTHERS
    return STRINGS if isinstance(value, str) else NUMBERS


@st.composite
def _spoiled(draw, specs):
    values = copy.deepcopy(draw(st.sampled_from(specs)))
    for _ in range(draw(st.integers(1, 2))):
        paths = sorted(_paths(values), key=str)
        leaves = [path for path in paths if not isinstance(_at(values, path), dict)]
        what = draw(st.sampled_from(["likely"] * 8 + ["change", "remove", "add"]))
        path = draw(st.sampled_from(leaves if what == "likely" else paths))
        section = _at(values, path[:-1])
        match what:
            case "likely":
                section[path[-1]] = copy.deepcopy(draw(_like(section[path[-1]])))
            case "change":
                section[path[-1]] = copy.deepcopy(draw(ANYTHING))
            case "remove":
                del section[path[-1]]
            case "add" if isinstance(section, dict):
                section[draw(st.sampled_from(["surprise", "kind", "trace", "zipf"]))] = copy.deepcopy(draw(ANYTHING))
    return values


@st.composite
def _spoiled_files(draw, spoiled):
    files = {name: list(lines) for name, lines in FILES.items()}
    lines = files[spoiled]
    for _ in range(draw(st.integers(1, 2))):
        line = draw(st.integers(0, len(lines) - 1)) if lines else 0
        match draw(st.sampled_from(["word"] * 6 + ["line", "swap", "cut"])):
            case "word" if lines:
                words = re.split(r"([,:\s]+)", lines[line])
                words[2 * draw(st.integers(0, len(words) // 2))] = draw(st.sampled_from(BAD_WORDS))
                lines[line] = "".join(words)
            case "line" if lines:
                lines[line] = draw(st.sampled_from(BAD_WORDS))
            case "swap":
                lines.reverse()
            case _:
                del lines[line:]
    return files


def _refusal(parse, values, files):
    """Load and simulate for a moment; returns the refusal, None if there was none."""

    def read_lines(name):
        if name not in files:
            raise ConfigError(f"{name}: cannot be read: no such file")
        return files[name]

    try:
        spec = parse(values, "x.toml")
        spec = getattr(spec, "simulation", spec)
        try:
            setup = prepare(spec, read_lines)
        except ConfigError as error:
            raise ConfigError(f"x.toml: {error}") from error
    except ConfigError as error:
        return str(error)
    requests = list(itertools.islice(setup.workload, 20))
    config = setup.cluster
    scheduler = config.scheduler
    sizes = (
        scheduler.num_kv_blocks + scheduler.num_adapter_pages * (1 + scheduler.blocks_per_page),
        10_000 * max(config.num_replicas, config.autoscaler.max_replicas, *(n for _, n in config.losses.capacity), 0),
        10 * sum(request.num_prompt_tokens + request.num_output_tokens for request in requests),
    )
    if max(sizes) < 1_000_000:
        sim = ClusterSim(config, setup.adapters, setup.prompts)
        sim.run(requests, min(0.5, spec.until_s or 0.5))
    return None


def _check(message, values):
    if message is None:
        return
    found = re.match(r"x\.toml: ([^\s:]*?)(?=: | is |\[)", message)
    assert found is not None, message
    known = {*SimulationSpec.model_fields, "plan", *map(str, values)}
    assert found[1].split(".")[0] in known, message


@settings(max_examples=500)
@given(values=_spoiled(FILLED))
def test_a_spoiled_spec_loads_or_is_refused_with_a_path(values):
    _check(_refusal(parse_spec, values, FILES), values)


@settings(max_examples=400)
@given(data=st.data(), spec=st.sampled_from(SPECS[:1] + SPECS[2:]))
def test_a_spoiled_file_is_read_or_refused_with_the_path_of_a_key(data, spec):
    named = sorted({str(_at(spec, path)) for path in _paths(spec)} & set(FILES))
    files = data.draw(_spoiled_files(data.draw(st.sampled_from(named))))
    _check(_refusal(parse_spec, spec, files), spec)


@settings(max_examples=200)
@given(values=_spoiled(PLANS))
def test_a_spoiled_plan_loads_or_is_refused_with_a_path(values):
    _check(_refusal(parse_plan, values, FILES), values)


LEAVES = [(number, path) for number, spec in enumerate(SPECS) for path in _paths(spec)]


@pytest.mark.parametrize("number, path", LEAVES, ids=lambda value: str(value))
def test_a_value_of_no_possible_type_is_refused_with_its_own_path(number, path):
    values = copy.deepcopy(SPECS[number])
    _at(values, path[:-1])[path[-1]] = {"surprise": ["of no", {"use": 1}]}
    message = _refusal(parse_spec, values, FILES)
    written = ".".join(map(str, path[:-1] if path[-1] == "kind" else path))
    assert message is not None
    assert message.startswith(f"x.toml: {written}"), message


@pytest.mark.parametrize("name", PlanSection.model_fields)
def test_a_value_of_no_possible_type_in_a_plan_is_refused_with_its_own_path(name):
    with pytest.raises(ConfigError, match=rf"^x.toml: plan\.{name}"):
        parse_plan(make_spec(plan={name: "no"}, slo={"ttft_s": 1.0}), "x.toml")
