"""The load generator against a real HTTP server on loopback. Times are only ever bounded from below."""

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from pomona.bench.client import ServerClient
from pomona.bench.config import ServeBenchConfig
from pomona.bench.load import PreparedRequest, run_load
from pomona.bench.prompts import WORDS, completion_body
from pomona.bench.report import BenchReport, RunReport
from pomona.bench.serve import BenchProgress, run_serve_bench, serve_bench
from pomona.bench.table import ProgressBar
from pomona.core.errors import ConfigError
from pomona.workload.lengths import FixedLength, UniformLength
from pomona.workload.popularity import GROUP_COUNTS
from support.streaming_server import StreamingServer, serving


@pytest.fixture(scope="module")
def running() -> Iterator[StreamingServer]:
    with serving(StreamingServer()) as server:
        yield server


@pytest.fixture
def server(running: StreamingServer) -> StreamingServer:
    """The running server, as if it had just started."""
    fresh = StreamingServer()
    vars(running).update({**vars(fresh), "url": running.url})
    return running


def make_config(server: StreamingServer, **changes: Any) -> ServeBenchConfig:
    config = ServeBenchConfig(
        base_url=server.url,
        popularities=("base",),
        num_requests=4,
        prompt_lengths=FixedLength(10),
        output_lengths=FixedLength(5),
        num_warmup_requests=0,
    )
    return replace(config, **changes)


async def bench(server: StreamingServer, **changes: Any) -> BenchReport:
    return await run_serve_bench(make_config(server, **changes))


async def bench_one(server: StreamingServer, **changes: Any) -> RunReport:
    return (await bench(server, **changes)).runs[0]


async def test_token_counts_are_the_servers_not_what_was_asked_for(server):
    server.num_tokens_before_eos = 3
    run = await bench_one(server, ignore_eos=False, output_lengths=FixedLength(50))
    assert [record.num_output_tokens for record in run.records] == [3, 3, 3, 3]
    assert run.summary.num_output_tokens == 12
    assert run.summary.num_prompt_tokens == 40


async def test_ignoring_the_end_of_sequence_gives_exactly_the_drawn_lengths(server):
    server.num_tokens_before_eos = 3
    run = await bench_one(server, output_lengths=UniformLength(4, 40))
    asked = [body["max_tokens"] for body in server.bodies if body["max_tokens"] > 1]
    assert sorted(record.num_output_tokens or 0 for record in run.records) == sorted(asked)


async def test_gaps_between_tokens_are_seen_as_the_server_makes_them(server):
    server.first_token_s, server.gap_s = 0.05, 0.02
    run = await bench_one(server)
    for record in run.records:
        assert len(record.token_times_s) == 5
        assert record.token_times_s[0] - record.sent_s >= 0.05
        assert record.token_times_s[-1] - record.token_times_s[0] >= 0.02 * 3.5
        assert record.ended_s >= record.token_times_s[-1]
    assert run.summary.tokens_per_event == 1.0


async def test_a_last_token_without_text_came_with_the_event_that_ended_the_answer(server):
    server.num_silent_tokens = 1
    run = await bench_one(server)
    assert [len(record.token_times_s) for record in run.records] == [6] * 4
    assert [record.num_output_tokens for record in run.records] == [6] * 4


async def test_tokens_without_text_count_until_the_event_that_ends_the_answer(server):
    server.num_silent_tokens, server.silent_s = 5, 0.1
    run = await bench_one(server)
    assert run.summary.e2e_s is not None and run.summary.e2e_s.p50 >= 0.1
    assert run.summary.tpot_s is not None and run.summary.tpot_s.p50 >= 0.01


async def test_several_tokens_in_one_event_are_counted_by_usage(server):
    server.tokens_per_event = 2
    run = await bench_one(server, output_lengths=FixedLength(6))
    assert run.summary.num_output_tokens == 24
    assert run.summary.tokens_per_event == 2.0


async def test_prefix_hits_that_the_server_tells_of_are_reported(server):
    server.num_cached_tokens = 8
    assert (await bench_one(server)).summary.num_cached_tokens == 32


async def test_requests_do_not_wait_for_earlier_answers(server):
    server.has_tokenize, server.num_awaited = False, 30
    run = await bench_one(server, num_requests=30, request_timeout_s=30.0)
    assert run.summary.num_completed == 30
    assert run.summary.max_in_flight == 30


async def test_concurrency_is_limited_when_asked_and_waiting_for_ones_turn_is_no_latency(server):
    server.gap_s = 0.01
    run = await bench_one(server, num_requests=9, max_concurrency=3)
    assert server.max_in_flight == 3
    assert run.summary.max_in_flight == 3
    held = [record for record in run.records if record.arrival_s > record.scheduled_s]
    assert len(held) == 6
    assert all(record.sent_s >= record.arrival_s for record in run.records)


async def test_requests_never_leave_before_their_time(server):
    run = await bench_one(server, num_requests=20, request_rate_per_s=100.0)
    assert len({record.scheduled_s for record in run.records}) == 20
    assert all(record.sent_s >= record.scheduled_s == record.arrival_s for record in run.records)


async def test_a_client_that_falls_behind_reports_how_late_it_sent(server):
    body = completion_body("tiny", [100], 1)
    async with ServerClient(server.url, None, 30.0) as client:
        asyncio.get_running_loop().call_later(0.02, time.sleep, 0.5)
        requests = [PreparedRequest(arrival_s, "tiny", body) for arrival_s in (0.05, 0.1)]
        load = await run_load(client, requests, None, lambda record: None)
    for record, scheduled_s in zip(load.records, (0.05, 0.1), strict=True):
        assert record.scheduled_s == scheduled_s
        assert record.sent_s - record.arrival_s >= 0.1
        assert record.token_times_s[0] - record.arrival_s >= 0.1
    assert max(load.loop_lags_s) >= 0.1


async def test_a_run_shorter_than_a_group_is_a_group_of_its_own(server):
    run = await bench_one(server, popularities=("uniform",), num_requests=8, group_size=32)
    assert sorted(Counter(record.model for record in run.records).values()) == [2, 3, 3]


@pytest.mark.parametrize("popularity", GROUP_COUNTS)
async def test_adapters_are_asked_for_as_often_as_the_popularity_says(server, popularity):
    run = await bench_one(server, popularities=(popularity,), num_requests=64, output_lengths=FixedLength(1))
    per_group = Counter[str]()
    for k, count in enumerate(GROUP_COUNTS[popularity](32)):
        per_group[server.adapters[k % 8]] += count
    expected = {name: 2 * count for name, count in per_group.items()}
    assert Counter(record.model for record in run.records) == expected
    assert Counter(body["model"] for body in server.requests_to(*server.adapters)) == expected


async def test_adapters_are_the_listed_models_with_a_parent_and_the_base_the_one_without(server):
    server.base_model, server.adapters = "big", ("big-math", "big-sql")
    report = await bench(server, popularities=("base", "distinct"))
    assert report.setup.base_model == "big"
    assert report.setup.adapters == ("big-math", "big-sql")
    assert report.setup.served_models == ("big", "big-math", "big-sql")
    assert [record.model for record in report.runs[0].records] == ["big"] * 4
    assert Counter(record.model for record in report.runs[1].records) == {"big-math": 2, "big-sql": 2}


async def test_named_adapters_are_used_even_if_the_server_does_not_list_them(server):
    run = await bench_one(server, popularities=("identical",), adapters=("unlisted",))
    assert {record.model for record in run.records} == {"unlisted"}


async def test_runs_share_arrivals_and_lengths_but_never_a_prompt(server):
    report = await bench(
        server,
        popularities=("base", "identical"),
        num_requests=16,
        request_rate_per_s=500.0,
        output_lengths=UniformLength(2, 9),
        num_warmup_requests=3,
    )
    base, identical = report.runs
    for field in ("scheduled_s", "num_prompt_tokens", "num_output_tokens"):
        assert [getattr(r, field) for r in base.records] == [getattr(r, field) for r in identical.records]
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(prompts)) == len(prompts) == 1 + 2 * (16 + 3)


async def test_the_same_seed_sends_the_same_requests(server):
    sent = []
    for _ in range(2):
        server.bodies.clear()
        await bench(server, prompt_lengths=UniformLength(5, 50), seed=3, max_concurrency=1)
        sent.append(list(server.bodies))
    assert sent[0] == sent[1]


async def test_prompts_have_exactly_the_drawn_length_when_the_server_can_tokenize(server):
    report = await bench(server, prompt_lengths=FixedLength(37))
    assert report.setup.is_prompt_length_exact
    assert [record.num_prompt_tokens for record in report.runs[0].records] == [37] * 4
    assert all(1 not in body["prompt"] for body in server.bodies), "the begin-of-sequence mark is not a word"


@pytest.mark.parametrize("missing", ["has_tokenize", "takes_token_ids"])
async def test_prompts_are_words_when_the_server_cannot_take_token_ids(server, missing):
    setattr(server, missing, False)
    report = await bench(server, prompt_lengths=FixedLength(12))
    assert not report.setup.is_prompt_length_exact
    texts = [body["prompt"] for body in server.bodies if isinstance(body["prompt"], str)]
    assert [len(text.split()) for text in texts] == [12] * 4
    assert set(" ".join(texts).split()) <= set(WORDS.split())
    assert [record.num_prompt_tokens for record in report.runs[0].records] == [13] * 4


async def test_warm_up_asks_each_model_once_and_is_not_counted(server):
    progress: list[BenchProgress] = []
    config = make_config(server, popularities=("zipf-1.5",), num_requests=32, num_warmup_requests=None)
    run = (await run_serve_bench(config, progress.append)).runs[0]
    assert len(run.records) == 32
    warmed = server.bodies[1:9]
    assert sorted(body["model"] for body in warmed) == sorted(server.adapters)
    assert max(step.num_done for step in progress if step.is_warmup) == 8


async def test_progress_counts_every_ended_request_and_failures(server):
    progress: list[BenchProgress] = []
    config = make_config(server, popularities=("distinct",), adapters=("tiny-0", "fail:http_429"))
    await run_serve_bench(config, progress.append)
    counted = [step for step in progress if not step.is_warmup]
    assert [step.num_done for step in counted] == [0, 1, 2, 3, 4]
    assert (counted[-1].num_failed, counted[-1].num_output_tokens, counted[-1].num_requests) == (2, 10, 4)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("http_429", "as asked: http_429"),
        ("http_500", "as asked: http_500"),
        ("disconnect", ""),
        ("incomplete", "without a finish reason"),
        ("bad_event", "JSON"),
        ("stream_error", "the engine died, as asked"),
        ("no_usage", "did not send usage"),
        ("timeout", "within 2.0 s"),
    ],
)
async def test_failures_are_told_apart_and_others_go_on(server, kind, words):
    timeout_s = 2.0 if kind == "timeout" else 60.0
    adapters = ("tiny-0", f"fail:{kind}")
    run = await bench_one(server, popularities=("distinct",), adapters=adapters, request_timeout_s=timeout_s)
    assert Counter((record.model, record.error) for record in run.records) == {
        ("tiny-0", None): 2,
        (f"fail:{kind}", kind): 2,
    }
    assert all(words in record.error_message for record in run.records if record.error)
    assert run.summary.num_output_tokens == 10


async def test_a_server_that_goes_away_is_a_failure_to_connect():
    async with ServerClient("http://127.0.0.1:9", None, 5.0) as client:
        outcome = await client.stream_completion(completion_body("tiny", "hello", 1))
    assert outcome.error == "connect"


async def test_an_unreachable_server_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"^base_url: no answer from http://127\.0\.0\.1:9/"):
        await run_serve_bench(ServeBenchConfig(base_url="http://127.0.0.1:9"))


async def test_a_server_that_serves_no_adapters_is_refused_with_what_to_do(server):
    server.adapters = ()
    with pytest.raises(ConfigError, match=r"^adapters: .* lists none; load some"):
        await bench(server, popularities=("uniform",))


async def test_a_server_that_is_no_openai_server_is_refused(server):
    with pytest.raises(ConfigError, match=r"^base_url: .*404"):
        await run_serve_bench(replace(make_config(server), base_url=server.url + "/elsewhere"))


async def test_the_api_key_is_sent_and_a_missing_one_is_told(server):
    server.api_key = "hunter2"
    with pytest.raises(ConfigError, match=r"401: who are you\?"):
        await bench(server)
    assert (await bench_one(server, api_key="hunter2")).summary.num_completed == 4


async def test_a_server_that_refuses_every_warm_up_request_stops_the_benchmark_with_its_message(server):
    server.refuses = ("ignore_eos",)
    with pytest.raises(ConfigError, match="http_400: ignore_eos is unknown"):
        await bench(server, num_warmup_requests=None)
    assert (await bench_one(server, num_warmup_requests=None, ignore_eos=False)).summary.num_completed == 4


async def test_results_are_appended_to_the_file_as_one_line_per_popularity(server, tmp_path):
    path = tmp_path / "results.jsonl"
    await bench(server, popularities=("base", "uniform"), output_file=path, is_recording_requests=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["setup"]["popularity"] for row in rows] == ["base", "uniform"]
    assert [len(row["requests"]) for row in rows] == [4, 4]
    assert rows[0]["setup"]["client_hardware"]
    assert rows[0]["setup"]["pomona_version"]


async def test_what_was_measured_is_in_the_file_when_the_rest_is_interrupted(server, tmp_path):
    path = tmp_path / "results.jsonl"

    def stop_in_the_second(progress: BenchProgress) -> None:
        if progress.popularity == "uniform":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await run_serve_bench(
            make_config(server, popularities=("base", "uniform"), output_file=path), stop_in_the_second
        )
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert (row["setup"]["popularity"], row["results"]["num_completed"]) == ("base", 4)


async def test_a_results_file_that_cannot_be_written_is_refused_before_any_load(server, tmp_path):
    with pytest.raises(ConfigError, match=r"^output_file: "):
        await bench(server, output_file=tmp_path)
    assert server.bodies == []


async def test_stopping_the_benchmark_closes_every_stream(server):
    server.gap_s = 0.01
    task = asyncio.create_task(bench(server, num_requests=10, output_lengths=FixedLength(100_000)))
    while server.max_in_flight < 10:
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while server.num_in_flight:
        await asyncio.sleep(0.005)
    assert server.num_disconnected == 10


async def test_the_progress_bar_shows_each_run_with_its_failures(server):
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    config = make_config(server, popularities=("base", "identical"), adapters=("fail:http_500",))
    with console.file, ProgressBar(console) as bar:
        await run_serve_bench(config, bar)
    text = console.export_text()
    assert "4/4" in text
    assert "20 tokens" in text
    assert "4 failed" in text


def test_the_benchmark_runs_from_plain_code_on_a_loop_of_its_own(server):
    assert serve_bench(make_config(server)).runs[0].summary.num_completed == 4


async def test_token_times_never_go_back(server):
    run = await bench_one(server, num_requests=32, output_lengths=FixedLength(20))
    for record in run.records:
        assert all(earlier <= later for earlier, later in itertools.pairwise(record.token_times_s))
