import gzip
import importlib.resources
import itertools
import random
from collections import Counter

import pytest

from pomona.core.errors import ConfigError
from pomona.workload.popularity import BaseOnly, RecordedPopularity, ZipfPopularity
from pomona.workload.servegen import client_requests, read_lengths, read_rates
from pomona.workload.traces import (
    READERS,
    TraceRow,
    TraceSelection,
    compose,
    read_azure,
    read_lora_uses,
    read_mooncake,
    read_plain,
    read_spot_events,
)


def sample(name):
    path = importlib.resources.files("pomona").joinpath("workload/data", name)
    return gzip.decompress(path.read_bytes()).decode().splitlines()


AZURE = ["TIMESTAMP,ContextTokens,GeneratedTokens"]


def test_azure_times_are_read_to_the_last_digit_and_begin_at_zero():
    rows = read_azure([*AZURE, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,0"])
    assert rows[0] == TraceRow(0.0, 374, 44)
    assert rows[1].arrival_s == pytest.approx(4.314579, abs=1e-6)
    assert rows[1].num_output_tokens == 1


@pytest.mark.parametrize(
    "lines, complaint",
    [
        (AZURE, "no rows"),
        ([], "no column 'TIMESTAMP'"),
        (["TIMESTAMP,ContextTokens"], "no column 'GeneratedTokens'"),
        ([*AZURE, "2023-11-16 18:15:46.1,0,44"], "line 2: ContextTokens is 0: must be at least 1"),
        ([*AZURE, "2023-11-16 18:15:46.1,7,-1"], "line 2: GeneratedTokens is -1"),
        ([*AZURE, "2023-11-16 18:15:46.1,seven,1"], "line 2: ContextTokens is 'seven': must be an integer"),
        ([*AZURE, "yesterday,7,1"], "line 2: TIMESTAMP is 'yesterday'"),
        ([*AZURE, "2023-11-16 18:15:46,7,1", "2023-11-16 18:15:45,7,1"], "line 3: its time is 1 s before"),
    ],
)
def test_a_bad_azure_trace_is_refused_with_the_line(lines, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read_azure(lines)


def test_empty_lines_are_passed_over_and_counted():
    lines = [*AZURE, "", "2023-11-16 18:15:46,7,1", "", "2023-11-16 18:15:45,7,1"]
    with pytest.raises(ConfigError, match="line 5: its time is 1 s before"):
        read_azure(lines)
    assert len(read_azure(lines[:-1])) == 1


def test_mooncake_requests_are_spread_over_their_tick_and_stay_in_order():
    lines = [
        f'{{"timestamp": {tick}, "input_length": 600, "output_length": 5, "hash_ids": [0, {number}]}}'
        for number, tick in enumerate([0, 0, 0, 3000, 3000, 9000])
    ]
    rows = read_mooncake(lines)
    times = [row.arrival_s for row in rows]
    assert times == sorted(times)
    assert len(set(times)) == 6
    assert {row.prefix_hashes for row in rows} == {(0, number) for number in range(6)}
    assert read_mooncake(lines) == rows
    assert [row.arrival_s for row in read_mooncake(lines, tick_s=0)] == [0.0, 0.0, 0.0, 3.0, 3.0, 9.0]


def test_mooncake_hashes_are_numbered_as_they_appear_however_large_they_are():
    lines = [
        f'{{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [{first}, {2**63 + k}]}}'
        for k, first in enumerate([2**31, 2**31, -1])
    ]
    assert [row.prefix_hashes for row in read_mooncake(lines, tick_s=0)] == [(0, 1), (0, 2), (3, 4)]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "{}",
        '{"timestamp": 0, "input_length": 4, "output_length": 5, "hash_ids": ["x"]}',
        '{"timestamp": 0, "input_length": -4, "output_length": 5}',
        "[1]",
        '{"timestamp": 0, "input_length": 3.7, "output_length": 5}',
    ],
)
def test_a_bad_mooncake_line_is_refused(line):
    with pytest.raises(ConfigError, match=r"^line 1: "):
        read_mooncake([line])


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("-1,2,3", "arrival_s is -1"),
        ("nan,2,3", "arrival_s is nan"),
        ("0,0,3", "num_prompt_tokens is 0"),
        ("0,2", "num_output"),
    ],
)
def test_a_bad_plain_row_is_refused(row, complaint):
    with pytest.raises(ConfigError, match=f"^line 2: {complaint}"):
        read_plain(["arrival_s,num_prompt_tokens,num_output_tokens", row])


@pytest.mark.parametrize(
    "name, kind, num_rows",
    [
        ("azure-code-2023.csv.gz", "azure", 1482),
        ("azure-conv-2023.csv.gz", "azure", 2867),
        ("mooncake-conversation.jsonl.gz", "mooncake", 1750),
    ],
)
def test_the_samples_that_ship_are_ten_minutes_of_real_traces(name, kind, num_rows):
    rows = READERS[kind](sample(name))
    assert len(rows) == num_rows
    assert 580 < rows[-1].arrival_s < 603


def test_a_selection_cuts_time_and_lengths_and_runs_faster():
    rows = [TraceRow(float(second), 100, 50) for second in range(10)]
    selection = TraceSelection(start_s=2.0, duration_s=4.0, speed=2.0, max_prompt_tokens=60, max_output_tokens=200)
    assert selection.apply(rows) == [TraceRow(second / 2, 60, 50) for second in range(4)]
    with pytest.raises(ConfigError, match="no rows from there on"):
        TraceSelection(start_s=100.0).apply(rows)
    with pytest.raises(ConfigError, match="speed is 0"):
        TraceSelection(speed=0)


def test_times_that_are_no_seconds_are_refused():
    lines = ["arrival_s,num_prompt_tokens,num_output_tokens", "0,2,3", "600000000000,2,3"]
    with pytest.raises(ConfigError, match=r"^line 3: its time is 6e\+11 s after the first: must be at most 1e\+09$"):
        read_plain(lines)


def test_a_selection_that_would_take_decades_is_refused():
    with pytest.raises(ConfigError, match=r"^speed is 1e-06: requests would arrive for 2e\+09 s: must be at most 1e"):
        TraceSelection(speed=1e-6).apply([TraceRow(0.0, 1, 1), TraceRow(2000.0, 1, 1)])


def test_a_selection_of_nothing_says_how_long_a_part_was_asked_for():
    rows = [TraceRow(0.0, 100, 50), TraceRow(9.0, 100, 50)]
    with pytest.raises(ConfigError, match=r"^start_s is 2.0: the trace has no rows in the 4 s from there on$"):
        TraceSelection(start_s=2.0, duration_s=4.0).apply(rows)


def test_a_composed_workload_has_the_traces_times_and_the_popularitys_adapters():
    rows = [TraceRow(float(second), 10, 5) for second in range(300)]
    requests = list(compose(rows, ZipfPopularity(50, 1.0), (("a", 3.0), ("b", 1.0)), seed=1))
    assert [request.arrival_s for request in requests] == [row.arrival_s for row in rows]
    assert requests == list(compose(rows, ZipfPopularity(50, 1.0), (("a", 3.0), ("b", 1.0)), seed=1))
    by_tenant = Counter(request.tenant_id for request in requests)
    assert 2.0 < by_tenant["a"] / by_tenant["b"] < 5.0
    assert all(request.adapter_index is None for request in compose(rows, BaseOnly()))


def test_uses_of_adapters_are_counted_most_popular_first():
    lines = [
        "lora_args,other",
        "\"[{'modelVersionId': 'x', 'scale': 1.0}, {'modelVersionId': 'y', 'scale': 1}]\",1",
        "[],2",
    ]
    assert read_lora_uses([*lines, "\"[{'modelVersionId': 'y', 'scale': 1.0}]\",3"]) == ((2, 1), 1 / 3)
    with pytest.raises(ConfigError, match="no adapters"):
        read_lora_uses(["lora_args", "[]"])
    with pytest.raises(ConfigError, match="line 2: lora_args"):
        read_lora_uses(["lora_args", "nonsense"])


def test_recorded_popularity_draws_in_proportion():
    indices = RecordedPopularity((60.0, 30.0, 10.0), base_share=0.5).indices(random.Random(1))
    counts = Counter(itertools.islice(indices, 20_000))
    assert counts[None] == pytest.approx(10_000, rel=0.05)
    assert counts[0] == pytest.approx(6_000, rel=0.06)
    assert counts[2] == pytest.approx(1_000, rel=0.15)


def test_spot_events_become_the_number_of_instances_over_time():
    assert read_spot_events(["0,add,a", "0,add,b", "1500,remove,a", "2000,add,c"]) == ((0.0, 2), (1.5, 1), (2.0, 2))
    for name, peak in (("spot-g4dn-12xlarge.csv.gz", 24), ("spot-p3-2xlarge.csv.gz", 32)):
        assert max(count for _, count in read_spot_events(sample(name))) == peak
    with pytest.raises(ConfigError, match="line 2: its time is 5 ms before"):
        read_spot_events(["5,add,a", "0,add,b"])
    with pytest.raises(ConfigError, match="line 1: is '5,grow,a'"):
        read_spot_events(["5,grow,a"])


def test_servegens_clients_send_at_their_own_rates_and_their_sum_is_in_order():
    rates = read_rates(sample("servegen-m-small-rates.csv.gz"))
    lengths = read_lengths(sample("servegen-m-small-lengths.csv.gz"))
    requests = list(client_requests(rates, lengths, 0.0, 20.0, seed=3))
    times = [request.arrival_s for request in requests]
    assert times == sorted(times)
    assert times[0] >= 0.0 and times[-1] < 20.0
    known = [windows for client, windows in rates.items() if (client, "input_tokens") in lengths]
    expected = sum(20 * window.rate_per_s for windows in known for window in windows if window.start_s == 0)
    assert len(requests) == pytest.approx(expected, rel=0.2)
    assert len({request.tenant_id for request in requests}) > 5
    assert requests == list(client_requests(rates, lengths, 0.0, 20.0, seed=3))


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_a_client_sends_as_often_as_its_rate_says_however_bursty_it_is(cv):
    rates = read_rates(["client,window_start_s,rate_rps,cv", *(f"a,{600 * k},0.01,{cv}" for k in range(6))])
    lengths = read_lengths(
        ["client,window_start_s,field,p50,p90,p99", *(f"a,0,{field}_tokens,5,5,5" for field in ("input", "output"))]
    )
    num_requests = sum(len(list(client_requests(rates, lengths, 0.0, 3600.0, seed))) for seed in range(400))
    assert num_requests / 400 == pytest.approx(36.0, rel=0.1)


def test_a_bad_servegen_table_is_refused_with_the_line():
    with pytest.raises(ConfigError, match="line 2: rate_rps is 'x'"):
        read_rates(["client,window_start_s,rate_rps,cv", "0,0,x,1"])
    with pytest.raises(ConfigError, match="client '0' has windows at 300 and 600 s: must be 600 s apart"):
        read_rates(["client,window_start_s,rate_rps,cv", "0,600,5,1", "0,300,5,1"])
    with pytest.raises(ConfigError, match="no client"):
        read_rates(["client,window_start_s,rate_rps,cv", "0,0,0,0"])
