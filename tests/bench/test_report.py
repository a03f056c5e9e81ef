import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from pomona.bench.config import ServeBenchConfig
from pomona.bench.load import LoadResult
from pomona.bench.report import (
    BenchReport,
    BenchSetup,
    RunReport,
    append_json_lines,
    summarise,
    to_json_lines,
    to_timeline,
)
from pomona.bench.table import cautions, render_table
from pomona.core.errors import ConfigError
from pomona.metrics.slo import Slo
from support.bench_records import make_load, make_record


def make_setup(config: ServeBenchConfig | None = None) -> BenchSetup:
    return BenchSetup(
        config=config or ServeBenchConfig(api_key="hunter2"),
        base_model="tiny",
        adapters=("tiny-0", "tiny-1"),
        served_models=("tiny", "tiny-0", "tiny-1"),
        is_prompt_length_exact=True,
        pomona_version="1.2.3",
        commit="abc",
        client_hardware="a laptop",
        started_at="2026-01-01T00:00:00+00:00",
    )


def make_report(config: ServeBenchConfig | None = None, **loads: LoadResult) -> BenchReport:
    config = config or ServeBenchConfig(api_key="hunter2")
    runs = [
        RunReport(summarise(popularity.replace("zipf", "zipf-1.5"), load, config.slo), load.records)
        for popularity, load in loads.items()
    ]
    return BenchReport(make_setup(config), tuple(runs))


def printed(report: BenchReport) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(render_table(report))
    return console.export_text()


def test_latencies_count_from_the_arrival():
    timeline = to_timeline(make_record(1.5, 1.75, 2.5, arrival_s=1.0, scheduled_s=0.5, sent_s=1.25))
    assert (timeline.ttft_s, timeline.itl_s, timeline.e2e_s, timeline.tpot_s) == (0.5, [0.25, 0.75], 1.5, 0.5)


def test_tokens_that_came_in_one_event_count_one_by_one():
    timeline = to_timeline(make_record(1.0, 2.0, 3.0, num_output_tokens=5))
    assert timeline.tpot_s == 0.5
    assert sorted(timeline.itl_s) == [0.0, 0.0, 1.0, 1.0]


def test_tokens_without_text_came_before_the_end_not_with_the_last_that_has_any():
    timeline = to_timeline(make_record(1.0, 2.0, finished_s=6.0, num_output_tokens=6))
    assert (timeline.ttft_s, timeline.e2e_s, timeline.tpot_s) == (1.0, 6.0, 1.0)
    silent = to_timeline(make_record(finished_s=6.0, num_output_tokens=3))
    assert (silent.ttft_s, silent.e2e_s) == (6.0, 6.0)


def test_a_failed_request_is_not_finished_even_if_tokens_came():
    assert not to_timeline(make_record(1.0, 2.0, error="disconnect")).is_finished


def test_throughput_counts_completed_answers_over_the_whole_run():
    summary = summarise(
        "base",
        make_load(
            make_record(1.0, 2.0, arrival_s=0.0),
            make_record(3.0, 4.0, arrival_s=1.0, num_output_tokens=6),
            make_record(arrival_s=1.0, ended_s=8.0, error="timeout"),
        ),
        None,
    )
    assert (summary.num_requests, summary.num_completed) == (3, 2)
    assert summary.duration_s == 8.0
    assert summary.output_tokens_per_s == 8 / 8.0
    assert summary.total_tokens_per_s == (8 + 20) / 8.0
    assert summary.requests_per_s == 2 / 8.0
    assert summary.tokens_per_event == 2.0


def test_failed_requests_count_as_arrived_in_attainment():
    load = make_load(make_record(0.1, 0.2), make_record(0.9, 1.0), make_record(error="http_429"), make_record(0.2, 2.0))
    summary = summarise("base", load, Slo(ttft_s=0.5))
    assert summary.attainment == 0.5
    assert summary.goodput_per_s == 2 / 2.0


def test_errors_are_counted_by_kind_with_the_first_message():
    load = make_load(*(make_record(1.0, error=kind) for kind in ("timeout", "http_429", "http_429")), make_record(1.0))
    assert summarise("base", load, None).errors == (
        ("http_429", 2, "about http_429"),
        ("timeout", 1, "about timeout"),
    )


def test_late_sends_are_counted_against_the_arrival_not_the_schedule():
    load = make_load(
        make_record(1.0, arrival_s=0.5, scheduled_s=0.0, sent_s=0.505),
        make_record(1.0, arrival_s=0.0, sent_s=0.25),
    )
    summary = summarise("base", load, None)
    assert summary.num_late_sends == 1
    assert summary.send_lateness_s is not None and summary.send_lateness_s.max == 0.25
    assert summary.held_s is not None and summary.held_s.max == 0.5


def test_a_run_in_which_everything_failed_still_reports():
    report = make_report(base=make_load(make_record(error="connect", ended_s=1.0)))
    summary = report.runs[0].summary
    assert (summary.output_tokens_per_s, summary.ttft_s, summary.num_completed) == (0.0, None, 0)
    assert report.throughput_ratio(summary) is None
    assert "1 x connect: about connect" in printed(report)


def test_popularities_are_compared_with_the_base_run():
    report = make_report(base=make_load(make_record(1.0, 2.0)), zipf=make_load(make_record(1.0, 4.0)))
    assert [report.throughput_ratio(run.summary) for run in report.runs] == [1.0, 0.5]
    assert "0.50x" in printed(report)


def test_without_a_base_run_nothing_is_compared():
    report = make_report(zipf=make_load(make_record(1.0, 2.0)))
    assert report.throughput_ratio(report.runs[0].summary) is None
    assert "over base" not in printed(report)


def test_there_is_one_json_line_per_popularity_with_setup_and_results():
    report = make_report(base=make_load(make_record(1.0, 2.0)), zipf=make_load(make_record(1.0, 4.0)))
    base, zipf = (json.loads(line) for line in to_json_lines(report))
    assert (base["setup"]["popularity"], zipf["setup"]["popularity"]) == ("base", "zipf-1.5")
    assert zipf["setup"]["served_models"] == ["tiny", "tiny-0", "tiny-1"]
    assert zipf["setup"]["config"]["request_rate_per_s"] == "inf"
    assert zipf["setup"]["config"]["prompt_lengths"] == {"kind": "FixedLength", "num_tokens": 128}
    assert zipf["results"]["throughput_ratio_to_base"] == 0.5
    assert zipf["results"]["ttft_s"]["p50"] == 1.0
    assert "requests" not in zipf


def test_requests_are_in_the_json_line_when_asked_for():
    line = to_json_lines(make_report(base=make_load(make_record(1.0, 2.0))), with_requests=True)[0]
    assert json.loads(line)["requests"][0]["token_times_s"] == [1.0, 2.0]


def test_the_api_key_is_in_no_json_line():
    assert "hunter2" not in "".join(to_json_lines(make_report(base=make_load(make_record(1.0)))))


def test_results_are_appended_not_overwritten(tmp_path):
    path = tmp_path / "new folder" / "results.jsonl"
    for _ in range(2):
        append_json_lines(make_report(base=make_load(make_record(1.0))), path, with_requests=False)
    assert [json.loads(line)["bench"] for line in path.read_text().splitlines()] == ["serve", "serve"]


def test_a_results_file_that_cannot_be_written_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"^output_file: "):
        append_json_lines(make_report(base=make_load(make_record(1.0))), tmp_path, with_requests=False)


def test_the_table_shows_each_latency_in_milliseconds_and_goodput_only_with_an_slo():
    load = make_load(make_record(0.125, 0.25))
    assert "125.0" in printed(make_report(base=load))
    assert "goodput" not in printed(make_report(base=load))
    assert "100.0%" in printed(make_report(ServeBenchConfig(slo=Slo(ttft_s=1.0)), base=load))


def test_the_table_fits_eighty_columns_with_all_popularities():
    load = make_load(make_record(123.456, 246.9))
    report = make_report(base=load, identical=load, distinct=load, uniform=load, zipf=load)
    console = Console(width=80, record=True, quiet=True)
    assert console.measure(render_table(report)).maximum <= 80


@pytest.mark.parametrize(
    "load, words",
    [
        (make_load(make_record(1.0, 2.0, sent_s=0.5)), "sent 1 of 1 requests more than 10 ms late"),
        (make_load(make_record(1.0, 1.1), loop_lags_s=(0.05,)), "the client itself lagged"),
        (make_load(make_record(1.0, 2.0, num_output_tokens=4)), "2.00 tokens per event"),
        (make_load(make_record(1.0, 2.0, num_output_tokens=1)), "events without a token"),
        (make_load(replace(make_record(1.0, 2.0), num_cached_tokens=5)), "50% of the prompt tokens"),
    ],
)
def test_whatever_weakens_the_numbers_is_said_beneath_the_table(load, words):
    assert words in "\n".join(cautions(make_report(base=load)))


def test_a_clean_run_needs_no_caution():
    assert cautions(make_report(base=make_load(make_record(1.0, 2.0), loop_lags_s=(0.001,)))) == []


def test_words_instead_of_token_ids_are_a_caution():
    report = make_report(base=make_load(make_record(1.0, 2.0)))
    worded = replace(report, setup=replace(report.setup, is_prompt_length_exact=False))
    assert "prompts are words" in cautions(worded)[0]


def test_infinities_never_reach_the_json():
    load = make_load(make_record(1.0, 2.0))
    line = to_json_lines(make_report(ServeBenchConfig(request_rate_per_s=math.inf), base=load))[0]
    assert "Infinity" not in line
