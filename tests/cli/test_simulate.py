import gzip
import itertools
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pomona.cli.simulate import SimulateOutputs, load_spec, read_lines, read_window, run_simulate
from pomona.core.errors import ConfigError
from pomona.sim.plan_spec import parse_plan
from pomona.sim.spec import parse_spec
from support.sim import make_profile

SPEC = """
seed = 3
[replica]
profile = "p.json"
[adapters]
lora_ranks = [8, 16]
popularity = { kind = "zipf", num_adapters = 20, alpha = 1.0 }
[workload]
kind = "trace"
file = "azure-conv-2023.csv"
format = "azure"
selection = { duration_s = 40, max_prompt_tokens = 1000 }
[tenants]
"<gold>" = 3
free = 1
[cluster]
num_replicas = 2
[slo]
ttft_s = 0.2
"""


@pytest.fixture
def spec_file(tmp_path):
    (tmp_path / "p.json").write_text(make_profile().to_json())
    (tmp_path / "s.toml").write_text(SPEC)
    return tmp_path / "s.toml"


def test_a_spec_becomes_a_table_json_a_page_and_a_trace(spec_file, capsys):
    page, trace = spec_file.with_suffix(".html"), spec_file.with_suffix(".json")
    run_simulate(spec_file, SimulateOutputs(as_json=True, page=page, trace=trace, trace_start_s=20.0, trace_end_s=24.0))
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["all"]["num_finished"] == found["all"]["num_requests"] > 50
    assert found["spec"]["cluster"]["num_replicas"] == 2
    assert {entry["tenant"] for entry in found["tenants"]} == {"<gold>", "free"}
    assert sum(entry["summary"]["num_requests"] for entry in found["tenants"]) == found["all"]["num_requests"]
    assert "TTFT p99 ms" in captured.err
    assert "\ncost model: profile, median error 1.0%\n" in captured.err
    check_page(page.read_text())
    check_trace(json.loads(trace.read_text()), found)


def check_page(text):
    parser = HTMLParser()
    parser.feed(text)
    assert text.count("<svg") == text.count("</svg>") == 9
    assert "<gold>" not in text and "&lt;gold&gt;" in text
    assert not re.search(r"(src|href)=|https?://", text), "the page needs nothing from elsewhere"
    assert "nan" not in text.lower().replace("tenant", "")


def check_trace(trace, found):
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    steps = [event for event in spans if event["cat"] == "step"]
    assert {event["pid"] for event in steps} == {0, 1}
    assert all(20e6 <= event["ts"] < 24e6 and event["dur"] > 0 for event in steps)
    for replica in (0, 1):
        ends = sorted((event["ts"], event["ts"] + event["dur"]) for event in steps if event["pid"] == replica)
        assert all(end <= begin + 1e-3 for (_, end), (begin, _) in itertools.pairwise(ends))
    requests = [event for event in spans if event["cat"] == "request"]
    assert 0 < len(requests) <= 2 * found["all"]["num_requests"]


def test_sizes_beyond_the_profiles_are_said_to_be_extrapolated(spec_file, capsys):
    run_simulate(spec_file, SimulateOutputs())
    assert "extrapolated: adapters.lora_ranks is 16 (measured: 8)\n" in capsys.readouterr().err
    spec_file.write_text(SPEC.replace("[8, 16]", "[8]").replace('"p.json"', '"p.json"\nmax_num_seqs = 65'))
    run_simulate(spec_file, SimulateOutputs())
    assert "extrapolated: replica.max_num_seqs is 65 (measured: 64)\n" in capsys.readouterr().err
    spec_file.write_text(SPEC.replace("[8, 16]", "[8]"))
    run_simulate(spec_file, SimulateOutputs())
    assert "extrapolated" not in capsys.readouterr().err


def test_ranks_that_no_request_asks_for_are_not_extrapolated(spec_file, capsys):
    spec_file.write_text(SPEC.replace('{ kind = "zipf", num_adapters = 20, alpha = 1.0 }', '{ kind = "base" }'))
    run_simulate(spec_file, SimulateOutputs())
    assert "extrapolated" not in capsys.readouterr().err


def test_a_tenants_name_is_no_emojis_code(spec_file, capsys):
    spec_file.write_text(SPEC.replace('"<gold>"', '"team:x:1"'))
    run_simulate(spec_file, SimulateOutputs())
    assert "team:x:1" in capsys.readouterr().err


def test_equal_specs_give_equal_results(spec_file):
    reports = [run_simulate(spec_file, SimulateOutputs()).to_json() for _ in range(2)]
    for report in reports:
        del report["wall_s"], report["requests_per_wall_s"]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (("[cluster]", "[clutser]"), "s.toml: clutser: unknown key"),
        (("seed = 3", "seed = "), "s.toml: "),
        (('"p.json"', '"q.json"'), "s.toml: replica.profile: q.json: cannot be read: No such file"),
        (("azure-conv-2023.csv", "azure-conv-1923.csv"), "s.toml: workload.file: azure-conv-1923.csv: cannot be read"),
    ],
)
def test_a_bad_spec_is_one_line_that_names_file_and_key(spec_file, change, complaint):
    spec_file.write_text(SPEC.replace(*change))
    with pytest.raises(ConfigError, match=complaint):
        run_simulate(spec_file, SimulateOutputs())


def test_a_place_that_cannot_be_written_to_is_refused_before_the_simulation(spec_file):
    with pytest.raises(ConfigError, match="--html"):
        run_simulate(spec_file, SimulateOutputs(page=spec_file.parent / "nowhere" / "a.html"))


def test_windows_are_two_ascending_seconds():
    assert read_window("60-70.5") == (60.0, 70.5)
    for text in ("", "5", "7-3", "-1-3", "a-b"):
        with pytest.raises(ConfigError, match="--trace-window"):
            read_window(text)


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_a_trace_of_a_simulation_that_was_stopped_is_json_and_shows_what_had_not_ended(spec_file):
    spec_file.write_text("until_s = 0.5\n" + SPEC.replace("duration_s = 40", "duration_s = 40, speed = 100"))
    trace = spec_file.with_suffix(".json")
    report = run_simulate(spec_file, SimulateOutputs(trace=trace, trace_end_s=5.0))
    open_requests = report.all.num_requests - report.all.num_finished
    assert open_requests > 0
    events = json.loads(trace.read_text(), parse_constant=refuse_constant)["traceEvents"]
    spans = [event for event in events if event.get("cat") == "request"]
    assert {event["args"]["request"] for event in spans} == set(range(report.all.num_requests))
    assert sum(event["ts"] + event["dur"] == pytest.approx(0.5e6) for event in spans) == open_requests


def test_requests_add_up_where_a_simulation_was_stopped(spec_file, capsys):
    page = spec_file.with_suffix(".html")
    run_simulate(spec_file, SimulateOutputs(page=page))
    assert "not ended" not in capsys.readouterr().err + page.read_text()
    spec_file.write_text("until_s = 0.5\n" + SPEC.replace("duration_s = 40", "duration_s = 40, speed = 100"))
    found = run_simulate(spec_file, SimulateOutputs(page=page)).all
    num_open = found.num_requests - found.num_finished
    assert re.search(rf"not ended +│ +{num_open} │", capsys.readouterr().err)
    assert f"rejected 0, failed 0, not ended {num_open}<" in page.read_text()


def test_a_trace_shows_requests_that_were_rejected_or_failed_too(spec_file):
    # The longest prompts do not fit, and the only replica is lost for a while with what it had.
    losses = '[losses]\non_loss = "fail"\nnotice_s = 0\ncapacity = [[0, 1], [28.8, 0], [31, 1]]\n'
    text = SPEC.replace("num_replicas = 2", "num_replicas = 1").replace('"p.json"', '"p.json"\nmax_model_len = 900')
    spec_file.write_text(text + losses)
    trace = spec_file.with_suffix(".json")
    report = run_simulate(spec_file, SimulateOutputs(trace=trace, trace_end_s=1e6))
    assert report.all.num_rejected > 0 < report.all.num_failed
    events = json.loads(trace.read_text())["traceEvents"]
    shown = {event["args"]["request"] for event in events if event.get("cat") == "request"}
    assert shown == set(range(report.all.num_requests))


def test_a_window_in_which_nothing_happens_is_said_to_be_empty(spec_file, capsys):
    trace = spec_file.with_suffix(".json")
    run_simulate(spec_file, SimulateOutputs(trace=trace, trace_start_s=1e6, trace_end_s=2e6))
    assert "--trace-window 1e+06-2e+06: no step began in it" in capsys.readouterr().err


def test_a_page_that_is_a_folder_is_refused_before_the_simulation(spec_file):
    with pytest.raises(ConfigError, match=r"--html .* is a folder"):
        run_simulate(spec_file, SimulateOutputs(page=spec_file.parent))


@pytest.mark.parametrize("name", ["s.toml", "p.json"])
@pytest.mark.parametrize("flag", ["page", "trace"])
def test_what_was_read_is_not_written_over(spec_file, flag, name):
    before = (spec_file.parent / name).read_bytes()
    with pytest.raises(ConfigError, match=rf"--\w+ .*{name}: the simulation is read from this file"):
        run_simulate(spec_file, SimulateOutputs(**{flag: spec_file.parent / "." / name}))
    assert (spec_file.parent / name).read_bytes() == before


def test_page_and_trace_are_not_one_file(spec_file):
    place = spec_file.parent / "both"
    with pytest.raises(ConfigError, match=r"--trace .*both: is --html's file too"):
        run_simulate(spec_file, SimulateOutputs(page=place, trace=place))


def test_the_section_of_pomona_plan_is_passed_over(spec_file):
    spec = load_spec(spec_file)
    spec_file.write_text(SPEC + "[plan]\nmax_replicas = 3\n")
    assert load_spec(spec_file) == spec


@pytest.mark.parametrize("name", ["", "a\0b", "~nobody-of-this-name/a.csv", "x" * 5000, "damaged.gz", "latin.csv"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name):
    packed = bytearray(gzip.compress(b"some text that is long enough to be damaged" * 9))
    packed[14:24] = b"\xff" * 10
    (tmp_path / "damaged.gz").write_bytes(packed)
    (tmp_path / "latin.csv").write_bytes("ä".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lines(name, tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "own.csv").write_text("arrival_s,num_prompt_tokens,num_output_tokens\n0,5,5\n", encoding="utf-8-sig")
    assert read_lines("own.csv", tmp_path)[0] == "arrival_s,num_prompt_tokens,num_output_tokens"


def test_the_samples_that_there_are_are_named_when_one_is_misspelt(tmp_path):
    with pytest.raises(ConfigError, match=r"bundled samples are .*azure-conv-2023\.csv, "):
        read_lines("azure-conv-1923.csv", tmp_path)


@pytest.mark.parametrize("text", ["seed = " + "1" * 5000, "a = " + "[" * 5000, "seed = 1\nseed = 2", "\0"])
def test_what_is_no_toml_is_refused(tmp_path, text):
    spec = tmp_path / "s.toml"
    spec.write_text(text)
    with pytest.raises(ConfigError, match=r"s\.toml: is not TOML: "):
        load_spec(spec)


def test_the_specs_in_the_docs_are_specs():
    page = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    cluster, plan = (tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", page, re.DOTALL))
    parse_spec(cluster, "docs")
    parse_spec(cluster | plan, "docs")
    parse_plan(cluster | plan, "docs")
    assert re.search(r"extras_share = 0.1 .*", page) and "overlap_steps = true" in page
