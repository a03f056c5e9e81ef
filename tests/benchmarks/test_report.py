"""Tables and charts from rows, and that the committed docs are what the committed results say."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results, tables
from benchmarks.chart import Bar, Point, Series, grouped_bars, nice_step, roofline
from benchmarks.report import DOCS, Report, all_reports, fill, stale
from benchmarks.results import Row
from benchmarks.shapes import TINY

SETUP = {
    "utc": "2026-01-02T03:04:05+00:00",
    "commit": "abc",
    "program": "p",
    "hardware": {"cpu": "A CPU", "cores": 2},
    "command": "do",
}
LIMITS = {"peaks": {"bfloat16_gflop_per_s": 500.0, "float32_gflop_per_s": 200.0, "read_gb_per_s": 25.0}}


def peer_row(system: str, popularity: str, tokens_per_s: float, repetition: int = 0, *, is_clean: bool = True) -> Row:
    return {
        **SETUP,
        "kind": "peer",
        "repetition": repetition,
        "shape": "tiny",
        "cell": f"b32-128-64/{popularity}",
        "popularity": popularity,
        "system": system,
        "settings": {"num_threads": 2},
        "versions": {system: "1.0 | a"},
        "output_tokens_per_s": tokens_per_s,
        "ttft_mean_s": 0.5,
        "tpot_mean_ms": 12.0,
        "wall_s": 2048 / tokens_per_s,
        "memory_mib": 400.0,
        "other_pct": 1.0 if is_clean else 40.0,
        "steal_pct": 0.0,
        "is_clean": is_clean,
    }


def peer_rows() -> list[Row]:
    speeds = {("pomona", "base"): 800, ("pomona", "distinct"): 600, ("vllm", "base"): 500, ("vllm", "distinct"): 100}
    return [
        peer_row(system, popularity, speed + 10 * repetition, repetition)
        for (system, popularity), speed in speeds.items()
        for repetition in range(3)
    ]


STEPS = {"base": 6.0, "distinct": 9.0, tables.ALL_SMALL: 7.0, tables.ONE_LARGE: 7.5}


def step_row(mix: str, step_ms: float, floor_ms: float = 5.0) -> Row:
    floor = {"floor_ms": floor_ms, "times_floor": step_ms / floor_ms, "bytes": 1e8, "flops": 1e9}
    limits = {"ceilings": {"bytes_per_s": 1e8 / floor_ms * 1e3, "flops_per_s": 5e11}}
    numbers = {"step_ms": step_ms, **floor, **limits, "other_pct": 0.0, "steal_pct": 0.0}
    what = {"kind": "step", "shape": "tiny", "phase": "decode", "batch": 32, "mix": mix, "is_clean": True}
    return {**SETUP, **what, **numbers}


def job_row(popularity: str, tokens_per_s: float, floor_s: float) -> Row:
    row = peer_row("pomona", popularity, tokens_per_s)
    work = {"bytes": 1e10, "flops": 1e12} if popularity == "base" else {"bytes": 1.5e10, "flops": 1.1e12}
    limits = {"bytes_per_s": 2.5e10, "flops_per_s": 5e11}
    times = {"floor_s": floor_s, "times_floor": row["wall_s"] / floor_s, "base_wall_s": 0.75 * row["wall_s"]}
    return {**row, "kind": "job", **times, **work, "ceilings": limits}


def server_row() -> Row:
    latencies = {"engine_itl_ms": {"p50": 10.0, "p99": 20.0}, "client_itl_ms": {"p50": 10.5, "p99": 21.0}}
    what = {"kind": "server", "shape": "tiny", "popularity": "base", "num_streams": 256, "is_clean": True}
    return {
        **SETUP,
        **what,
        **latencies,
        "output_tokens_per_s": 900.0,
        "itl_p99_ratio": 1.05,
        "server_cpu_us_per_token": 30.0,
        "engine_host_cpu_us_per_token": 4.5,
    }


def ceilings_row() -> Row:
    facts = {"dtype": "bfloat16", "rows": 8, "in": 4, "out": 4, "method": "torch"}
    gemm = {"group": "gemm", "name": "8 rows", "unit": "GFLOP/s", "median": 500.0, "worst": 450.0, "best": 510.0}
    return {**SETUP, **LIMITS, "kind": "ceilings", "is_clean": True, "ceilings": [{**gemm, "facts": facts}]}


def op_row(backend: str = "cpu", median_us: float = 10.0) -> Row:
    limits = {"peak_gflop_per_s": 500.0, "bandwidth_gb_per_s": 25.0, "threads": 2, "dtype": "bfloat16"}
    what = {"kind": "op", "shape": "tiny", "op": "lora", "case": "decode", "backend": backend, "is_clean": True}
    numbers = {"median_us": median_us, "floor_us": 4.0, "bytes": 1e5, "flops": 2e5, "other_pct": 0.0, "steal_pct": 0.0}
    return {**SETUP, **limits, **what, **numbers}


def residency_row() -> Row:
    counts = {"num_adapters": 10_000, "num_requests": 2_000, "num_named": 1_000, "num_failed": 0}
    seconds = {"few_start_s": 3.5, "start_s": 3.6, "run_s": 20.0, "load_ms": 10.0}
    kinds = ("budget", "all_budgets", "host", "server_before", "server_peak", "engine_before", "engine_peak")
    sizes = {f"{kind}_bytes": 2**27 for kind in kinds}
    events = {"hits": 900.0, "misses": 1100.0, "loads": 1050.0, "evictions": 1000.0}
    answer = {"answer_ms": {"p50": 10.0, "p99": 20.0, "max": 30.0}}
    return {**SETUP, "kind": "residency", **counts, **seconds, **sizes, **events, **answer}


def precision_rows() -> list[Row]:
    part = {"num_positions": 9, "kl_mean": 2e-6, "kl_max": 3e-4, "same_top": 0.998, "logprob_error_mean": 0.04}
    what = {**SETUP, "kind": "precision", "right_mean": 0.995, "right_least": 0.98}
    steps = [
        {**step_row("base", 9.0), "quantization": "none"},
        {**step_row("base int8", 6.0), "quantization": "int8", "floor_ms": 2.5, "program": "another"},
        {**step_row("base", 8.0), "quantization": "none", "program": "another"},
    ]
    return [{**what, "variant": "float32"}, {**what, "variant": "int8", "adapters": part, "base": part}, *steps]


def fill_of(name: str, text: str) -> str:
    """What stands in a marked part."""
    return text.partition(f"<!-- generated: {name} -->\n")[2].partition("<!-- end -->")[0].strip()


@pytest.fixture
def results_folder(tmp_path):
    profile = {"kind": "step_profile", "shape": "tiny", "batch": 32, "mix": "base"}
    functions = [{"function": "kernels.lora", "calls_per_step": 8.0, "own_ms_per_step": 1.25}]
    agreement = {"kind": "agreement", "system": "vllm", "same_first_token": 0.5, "mean_common_prefix": 30.0}
    rows: dict[str, list[dict[str, Any]]] = {
        "peers": [*peer_rows(), agreement],
        "step": [
            *(step_row(mix, step_ms) for mix, step_ms in STEPS.items()),
            {**SETUP, **profile, "functions": functions},
        ],
        "engine": [job_row("base", 800.0, 1.0), job_row("distinct", 600.0, 1.25)],
        "server": [server_row()],
        "ceilings": [ceilings_row()],
        "ops": [op_row(), op_row("reference", 50.0)],
        "precision": precision_rows(),
        "residency": [residency_row()],
    }
    for what, of_kind in rows.items():
        for row in of_kind:
            results.append(tmp_path / f"2026-01-02-{what}.jsonl", row)
    return tmp_path


def test_committed_docs_are_what_the_committed_results_say():
    assert [name for report in all_reports() for name in stale(DOCS, report)] == []


def test_every_page_can_be_made_from_sample_rows(results_folder):
    files = dict(Report(results_folder).files((DOCS / "performance.md").read_text()))
    assert "| Pomona | 810 [800–820] | 610 [600–620] |" in files["benchmarks/peers.md"]
    assert "| decode 32 | distinct | 100 | 1.00 | 5.00 | 9.00 | 1.80 |" in files["benchmarks/step.md"]
    assert "| `kernels.lora` | 8 | 1.25 |" in files["benchmarks/step.md"]
    assert "| distinct | 600 | 3.41 | 1.25 | 2.73 | 25.0% | 13.5% | 2.13 |" in files["benchmarks/engine.md"]
    assert "| lora: decode | 4.0 | 10.0 | 50.0 | 2.50 |" in files["benchmarks/ops.md"]
    ranks = "| 32 sequences | 7.00 | 7.50 | +0.50 | 0.05 | 1.0 | 0.001 | 34 |"
    assert ranks in files["benchmarks/step.md"]
    assert ranks in files["performance.md"]
    assert "| 256 streams, base | 900 | 10.0 | 10.5 | 20.0 | 21.0 | 1.05 | 30 | 4.5 |" in files["performance.md"]
    both = "2.0e-06 | 3.0e-04 | 99.80% | 0.040 | 2.0e-06 | 3.0e-04 | 99.80% | 0.040 |"
    assert f"| int8 | 99.5% | 98% | {both}" in files["benchmarks/precision.md"]
    assert "| decode of 32 | 8.00 | 6.00 | 1.33 | 5.00 | 2.50 |" in files["benchmarks/precision.md"]
    assert "With 500 GFLOP/s and 25 GB/s" in files["performance.md"]
    assert "| 10,000 | 2,000 | 1,000 | 0 | 3.50 s | 3.60 s | 100 |" in files["benchmarks/residency.md"]
    assert "No results yet" not in "".join(files.values())


def test_making_the_pages_again_changes_nothing(results_folder):
    once = dict(Report(results_folder).files((DOCS / "performance.md").read_text()))
    assert dict(Report(results_folder).files(once["performance.md"])) == once


def test_committed_pages_have_no_empty_part():
    for page in (DOCS / "performance.md", *DOCS.glob("benchmarks/**/*.md")):
        text = page.read_text()
        assert not re.search("No (results|rows) yet", text), page
        assert not re.search(r"^\|[-:| ]+\|\n(?!\|)", text, re.MULTILINE), f"{page}: a table without rows"


def test_every_page_is_in_the_index():
    index = (DOCS / "benchmarks" / "README.md").read_text()
    assert {path.name for path in DOCS.glob("benchmarks/*.md")} - {"README.md"} <= set(re.findall(r"]\((.*?)\)", index))


def test_what_was_not_measured_has_no_page_and_performance_says_so(tmp_path):
    files = dict(Report(tmp_path).files((DOCS / "performance.md").read_text()))
    assert files.keys() == {"performance.md"}
    assert "No results yet." in files["performance.md"]


def test_a_shape_without_ranks_has_no_table_of_them(results_folder):
    for mix in STEPS:
        if mix not in (tables.ALL_SMALL, tables.ONE_LARGE):
            results.append(results_folder / "2026-01-02-step.jsonl", {**step_row(mix, 1.0), "shape": "other"})
    files = dict(Report(results_folder).files((DOCS / "performance.md").read_text()))
    ranks = fill_of("ranks", files["performance.md"])
    assert "tiny:" in ranks and "other:" not in ranks
    assert "### tiny: a large rank" in files["benchmarks/step.md"]
    assert "### other: a large rank" not in files["benchmarks/step.md"]


def test_the_section_on_ops_is_of_those_machines_that_have_rows(results_folder):
    text = (DOCS / "performance.md").read_text()
    own = fill_of("ops", dict(Report(results_folder).files(text))["performance.md"])
    assert "## Ops, measured" in own and "![tiny](benchmarks/ops-tiny.svg)" in own
    [ops] = results_folder.glob("*-ops.jsonl")
    (results_folder / "other").mkdir()
    ops.rename(results_folder / "other" / ops.name)
    pages = dict(page for report in all_reports(results_folder) for page in report.files(text))
    others = fill_of("ops", pages["performance.md"])
    assert "## Ops, measured" in others and "[other](benchmarks/other/ops.md)" in others
    assert "![" not in others and "benchmarks/other/ops.md" in pages and "benchmarks/ops.md" not in pages
    (results_folder / "other" / ops.name).unlink()
    assert fill_of("ops", dict(Report(results_folder).files(text))["performance.md"]) == ""


def test_ratios_are_taken_against_the_fastest_peer_and_against_its_base_only():
    lines = tables.peer_ratios(peer_rows()).splitlines()
    assert lines[-1] == "| 32 requests, 128 in, 64 out, distinct | 610 | 110 (vllm) | 5.55 | 1.20 |"


def test_a_row_nobody_else_was_measured_on_has_no_ratio():
    rows = [peer_row("pomona", "base", 800.0), peer_row("pomona", "distinct", 600.0)]
    assert tables.peer_ratios(rows).splitlines()[-1].endswith("| 600 | – | – | – |")


def test_the_tax_is_taken_against_the_base_that_ran_in_turns_with_the_job():
    jobs = [{**job_row("distinct", 800.0, 1.0), "wall_s": 2.0, "base_wall_s": base_s} for base_s in (1.8, 1.9, 1.96)]
    assert tables.job_taxes(jobs, "distinct") == pytest.approx([0.1, 0.05, 0.02])
    disturbed = [*jobs[:1], *({**job, "is_clean": False} for job in jobs[1:])]
    assert tables.job_taxes(disturbed, "distinct") == pytest.approx([0.1])


def test_extra_time_is_compared_with_extra_bytes_and_then_extra_flops():
    rows = [job_row("base", 800.0, 1.0), {**job_row("distinct", 800.0, 1.0), "wall_s": 3.0, "base_wall_s": 2.0}]
    assert tables.over_formulas(rows, "distinct") == pytest.approx(1.0 / (5e9 / 2.5e10 + 1e11 / 5e11))
    assert tables.over_formulas(rows, "base") is None
    assert tables.over_formulas(rows[1:], "distinct") is None


def test_the_least_tax_is_that_of_the_extra_bytes_and_flops_beside_the_measured_base():
    rows = [job_row("base", 800.0, 1.0), {**job_row("distinct", 800.0, 1.0), "wall_s": 3.0, "base_wall_s": 2.0}]
    assert tables.least_taxes(rows, "distinct") == pytest.approx([0.4 / (2.0 + 0.4)])
    assert tables.least_taxes(rows, "base") == [0.0]
    assert tables.least_taxes(rows[1:], "distinct") == []


def test_a_step_is_held_to_the_floor_of_its_own_moment():
    moments = [step_row("base", 6.0, 5.0), step_row("base", 12.0, 10.0), step_row("base", 9.0, 5.0)]
    disturbed = {**step_row("base", 6.0, 12.0), "is_clean": False}
    line = tables.step_table([*moments, disturbed]).splitlines()[-1]
    assert line == "| decode 32 | base | 100 | 1.00 | 5.00 | 9.00 [6.00–12.00] | 1.20 |"


def test_what_a_large_rank_costs_by_the_formulas_does_not_depend_on_when_each_was_measured():
    for floor_ms in (5.0, 2.0):
        rows = [step_row(tables.ALL_SMALL, 7.0, floor_ms), step_row(tables.ONE_LARGE, 7.5)]
        assert "| +0.50 | 0.05 | 1.0 | 0.001 | 34 |" in tables.rank_table(rows)
    extra_bytes = 2 * (TINY.lora_parameters(128) - TINY.lora_parameters(4))
    assert f"{extra_bytes / 1e8 * 5.0:.2f}" == "0.05"


def test_jobs_of_each_batch_have_a_table_of_their_own(results_folder):
    longer = {**job_row("distinct", 100.0, 1.0), "cell": "b32-512-32/distinct"}
    results.append(results_folder / "2026-01-02-engine.jsonl", longer)
    jobs = fill_of("jobs", dict(Report(results_folder).files((DOCS / "performance.md").read_text()))["performance.md"])
    assert "32 requests, 128 in, 64 out:" in jobs and "| distinct | 600 |" in jobs
    assert "32 requests, 512 in, 32 out:" in jobs and "| distinct | 100 |" in jobs


def test_the_page_says_when_each_system_was_measured(results_folder):
    results.append(results_folder / "2026-01-02-peers.jsonl", {**peer_rows()[0], "utc": "2026-01-02T09:00:00+00:00"})
    page = dict(Report(results_folder).files("x"))["benchmarks/peers.md"]
    assert "| num_threads 2 | 2026-01-02 03:04, 2026-01-02 09:00 |" in page
    assert "| num_threads 2 | 2026-01-02 03:04 |" in page


def test_steps_of_earlier_programs_do_not_count(results_folder):
    results.append(results_folder / "2026-01-02-step.jsonl", {**step_row("base", 7.0), "program": "later"})
    page = dict(Report(results_folder).files("x"))["benchmarks/step.md"]
    assert "1 repetitions, 1 clean." in page
    assert "| 7.00 |" in page
    assert "| 6.00 |" not in page


def test_our_rows_of_earlier_programs_do_not_count_but_those_of_other_commits_do():
    rows = [{**peer_row("pomona", "base", 100.0), "program": "old"}, *peer_rows()]
    assert tables.of_one_program(rows) == peer_rows()
    assert tables.of_one_program([peer_row("vllm", "base", 1.0)]) == [peer_row("vllm", "base", 1.0)]
    docs_changed = [*peer_rows(), {**peer_row("pomona", "base", 100.0), "commit": "def"}]
    assert tables.of_one_program(docs_changed) == docs_changed


def test_a_cell_that_is_the_base_s_work_for_a_system_says_so():
    rows = [*peer_rows(), peer_row("pomona", "idle", 790.0), peer_row("llama.cpp", "base", 300.0)]
    lines = tables.peer_metric(rows, "output_tokens_per_s", "{:.0f}").splitlines()
    assert lines[0] == "|  | base | idle | distinct |"
    assert "| 300 | as base | – |" in lines[3]
    assert "as base" not in lines[2]


def test_disturbed_repetitions_count_only_when_there_is_no_clean_one_and_are_marked():
    rows = [peer_row("pomona", "base", 800.0), peer_row("pomona", "base", 100.0, is_clean=False)]
    found = tables.sample(rows, "output_tokens_per_s", popularity="base")
    assert found is not None
    assert found.text() == "800"
    found = tables.sample(rows[1:], "output_tokens_per_s", popularity="base")
    assert found is not None
    assert found.text() == "~100"


def test_a_cell_cannot_break_its_table():
    assert tables.table(["a", "b"], [["x | y", "z"]]).splitlines()[-1] == "| x / y | z |"


def test_only_marked_parts_of_a_text_are_replaced():
    text = "before\n<!-- generated: steps -->\nold\n<!-- end -->\nafter\n"
    assert fill(text, {"steps": "new"}) == "before\n<!-- generated: steps -->\n\nnew\n\n<!-- end -->\nafter\n"
    with pytest.raises(KeyError):
        fill(text, {})


def test_a_missing_or_changed_file_is_stale(tmp_path, results_folder):
    report = Report(results_folder)
    (tmp_path / "performance.md").write_text("x\n")
    expected = {name for name, _ in report.files("x\n")} - {"performance.md"}
    assert set(stale(tmp_path, report)) == expected


def test_another_machines_results_have_pages_of_their_own_for_what_was_measured(tmp_path, results_folder):
    (results_folder / "other").mkdir()
    [engine] = results_folder.glob("*-engine.jsonl")
    (results_folder / "other" / engine.name).write_bytes(engine.read_bytes())
    ours, other = all_reports(results_folder)
    names = {name for name, _ in other.files("")}
    assert names == {"benchmarks/other/engine.md", "benchmarks/other/engine-tiny.svg"}
    pages = dict(other.files(""))
    assert f"`benchmarks/results/other/{engine.name}`" in pages["benchmarks/other/engine.md"]
    assert not names & {name for name, _ in ours.files("")}


def test_the_newest_file_of_a_kind_counts(tmp_path):
    for date in ("2026-01-02", "2025-12-31"):
        results.append(tmp_path / f"{date}-peers.jsonl", {"date": date})
    results.append(tmp_path / "2027-01-01-step.jsonl", {})
    newest = results.latest("peers", tmp_path)
    assert newest is not None
    assert results.read(newest) == [{"date": "2026-01-02"}]
    assert results.latest("server", tmp_path) is None


def test_a_chart_is_well_formed_and_has_a_bar_per_measurement():
    series = [Series("A & B", (Bar(10, 9, 12), None)), Series("C", (Bar(5, 5, 5), Bar(7, 6, 8)))]
    root = ElementTree.fromstring(grouped_bars("<title>", "what", "tok/s", ["one", "two"], series))
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert titles == ["10 (9 to 12)", "5 (5 to 5)", "7 (6 to 8)"]
    heights = [float(element.get("height", 0)) for element in root.iter() if element.find("{*}title") is not None]
    assert heights[0] == pytest.approx(2 * heights[1], rel=0.01)


def test_charts_have_titles_labelled_axes_and_a_dark_scheme(results_folder):
    files = dict(Report(results_folder).files((DOCS / "performance.md").read_text()))
    axes = {
        "peers-tiny-b32-128-64.svg": {"popularity of adapters", "output tokens per second"},
        "step-tiny.svg": {"sequences in the step, adapters", "milliseconds"},
        "engine-tiny.svg": {"popularity of adapters", "throughput lost, % of base only"},
        "ops-tiny.svg": {"FLOPs per byte moved", "GFLOP/s"},
    }
    made = {name.removeprefix("benchmarks/"): text for name, text in files.items() if name.endswith(".svg")}
    assert made.keys() == axes.keys()
    for name, labels in axes.items():
        texts = {element.text for element in ElementTree.fromstring(made[name]).iter() if element.tag.endswith("text")}
        assert labels <= texts
        assert any(text.startswith("tiny: ") for text in texts if text)
        assert "prefers-color-scheme:dark" in made[name]
        assert any(f"]({folder}{name})" in page for page in files.values() for folder in ("", "benchmarks/")), name


def test_every_chart_that_a_page_shows_is_made(results_folder):
    files = dict(Report(results_folder).files((DOCS / "performance.md").read_text()))
    shown = [(page, name) for page, text in files.items() for name in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)]
    assert shown
    for page, name in shown:
        assert str(Path(page).parent / name) in files


def test_a_tax_below_zero_hangs_below_the_line():
    series = [Series("tax", (Bar(10.0, 10.0, 10.0), Bar(-5.0, -5.0, -5.0)))]
    root = ElementTree.fromstring(grouped_bars("t", "x", "%", ["a", "b"], series))
    above, below = [element for element in root.iter() if element.find("{*}title") is not None]
    zero = float(above.get("y", 0)) + float(above.get("height", 0))
    assert float(below.get("y", 0)) == pytest.approx(zero, abs=0.2)
    assert float(above.get("height", 0)) == pytest.approx(2 * float(below.get("height", 0)), rel=0.01)


def test_points_of_a_roofline_lie_where_the_roof_says():
    on_slope, on_top = Point("slow", 1.0, 25e9), Point("fast", 1000.0, 500e9)
    root = ElementTree.fromstring(roofline("t", 500e9, 25e9, {"op": [on_slope, on_top]}))
    (line,) = [element for element in root.iter() if element.tag.endswith("polyline")]
    corners = [tuple(map(float, pair.split(","))) for pair in (line.get("points") or "").split()]
    circles = [element for element in root.iter() if element.tag.endswith("circle")]
    slow, fast = [(float(circle.get("cx", 0)), float(circle.get("cy", 0))) for circle in circles]
    (x0, y0), (x1, y1), (_, top) = corners
    assert slow[1] == pytest.approx(y0 + (y1 - y0) * (slow[0] - x0) / (x1 - x0), abs=0.3)
    assert fast[1] == pytest.approx(top, abs=0.1)


@pytest.mark.parametrize("top", [0.03, 0.9, 1.0, 4.2, 10.0, 99.0, 512.0, 6400.0])
def test_ticks_are_round_and_reach_the_top_with_few_of_them(top):
    step = nice_step(top)
    assert 1 <= top / step <= 5.0001
    assert any(step == pytest.approx(digit * 10**power) for digit, power in itertools.product((1, 2, 5), range(-4, 5)))


def test_a_rows_setup_says_where_when_and_how_without_naming_this_machines_folders():
    row = results.setup(extra=1)
    assert {"utc", "commit", "program", "hardware", "python", "command", "extra"} <= set(row)
    assert str(results.ROOT) not in str(row)
