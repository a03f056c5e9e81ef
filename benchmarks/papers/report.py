"""Writes docs/benchmarks/simulator.md from the newest result rows: every number on that page comes from them. So do the
charts of single figures; those over time are drawn by the scripts, which have seen it.

python -m benchmarks.papers.report           # write
python -m benchmarks.papers.report --check   # fail if the page or a chart is stale
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.papers import caraserve as caraserve_paper
from benchmarks.papers import slora as slora_paper
from benchmarks.papers import slots as slots_paper
from benchmarks.papers.published import CHARTS
from benchmarks.results import Row

PAGE = CHARTS / "simulator.md"
INTRO = """# What the simulator shows

Written by `python -m benchmarks.papers.report` from the rows in benchmarks/results; every row names its command, commit
and machine. Replicas in all of these are Pomona's own engine and scheduler, the router is `pomona.router`; only the
seconds of a step come from a cost model, which each script states. "Published" is what the paper, or its released data,
says.
"""


def rows_of(what: str, folder: Path) -> list[Row]:
    """Rows of the newest file of a kind, of its last run: those that name the time when it was started."""
    path = results.latest(what, folder)
    rows = [] if path is None else results.read(path)
    return [row for row in rows if row["utc"] == rows[-1]["utc"]] if rows else []


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column left, the others right."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *lines)) + "\n"


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _section(title: str, chart: str | None, *parts: str) -> str:
    image = f"![{title}](paper-{chart}.svg)\n\n" if chart else ""
    return f"## {title}\n\n{image}" + "\n".join(parts)


def slots(rows: list[Row]) -> str:
    points = list(results.of_kind(rows, "slots"))
    lines = [
        [str(row["num_slots"]), *(_number(row[key]) for key in ("published", "without_limit", "with_limit"))]
        for row in points
    ]
    error = next(results.of_kind(rows, "error"))
    best = {key: max((row for row in points if row[key]), key=lambda row: row[key])["num_slots"] for key in points[0]
            if key in ("published", "without_limit")}  # fmt: skip
    held = [row for row in results.of_kind(rows, "held-out") if row["is_saturated"]]
    worst = max((abs(row["error"]) for row in held), default=0.0)
    return _section(
        "The best number of adapter slots is inside",
        "slots",
        table(["slots", "published tok/s", "no wait limit", "wait limit 1 s"], lines),
        f"512 adapters of rank 8 at 150 requests/s. The optimum measured is at {best['published']} slots, the "
        "simulated one "
        f"at {best['without_limit']}. On {error['num_runs']} runs of the held-out file the median error of "
        "throughput is "
        f"{_percent(error['median_error'])}, the worst {_percent(error['worst_error'])} "
        f"({_percent(worst)} among the saturated ones).",
        "Where it differs: a step is taken to be linear in rows and adapters, prompts as 250 tokens each (they "
        "are not in "
        "the files), and the KV that so many slots leave as what the fullest run held. The limit of 1 s on waiting for "
        "pages (vLLM has none) closes only as many adapters to newcomers as the one whose turn it "
        "is needs: that nobody starves costs no throughput.\n",
    )


def punica(rows: list[Row]) -> str:
    lines = [
        [
            row["policy"],
            _number(row["num_requests"]),
            _percent(row["busy_share_of_replica_time"]),
            _number(row["mean_batch_of_busy_replicas"], 1),
            _percent(row["busy_time_share_at_24_or_more"]),
            _number(row["num_moves"]),
            _number(row["tpot_p50_ms"], 1),
        ]
        for row in results.of_kind(rows, "ramp")
    ]
    header = ["router", "requests", "replica time in use", "requests on one in use", "time at 24 or more", "moved"]
    return _section(
        "Punica's consolidation ramp",
        "punica",
        table([*header, "TPOT p50 ms"], lines),
        f"16 replicas, load that rises and falls over {rows[-1]['duration_s'] / 60:.0f} minutes. Published is a "
        "picture: GPUs in use run near the batch "
        "limit of 32, "
        "the others are idle, and GPUs are taken into use and given back one by one. The same shape appears; "
        "with the least "
        "loaded replica chosen instead, nearly all replicas are always in use. TPOT is the price: a full batch "
        "is slower.\n",
    )


def caraserve(rows: list[Row]) -> str:
    lines = [
        [
            f"{row['policy']}, {row['form']}",
            _number(row["published_percent"]),
            _number(row["attainment_percent"], 1),
            _number(row["tpot_p50_ms"], 1),
            _number(row["tpot_p99_ms"], 1),
        ]
        for row in results.of_kind(rows, "attainment")
    ]
    return _section(
        "CaraServe: 60 servers, 40,000 adapters, 340 requests/s",
        "caraserve",
        table(["policy, kernel", "published %", "simulated %", "TPOT p50 ms", "TPOT p99 ms"], lines),
        "Rank-aware routing is what the paper says it is where kernels pad (max): ranks that do not mix keep "
        "every step "
        "short. Where kernels do not pad (sum) we do not find its advantage, and cannot: in a linear model of "
        "summed ranks a "
        "request adds the same time anywhere, so the paper's cost is the load, times one constant, and its "
        "choice the least "
        "loaded replica's until one exceeds the objective. The paper's lengths, coefficients and ranks are not "
        "published; "
        "with ours, the same coefficient for both kernels, least-loaded does better there than in the paper and "
        "worse under "
        "padding.\n",
    )


def slora(rows: list[Row]) -> str:
    lines = [
        [
            str(row["num_adapters"]),
            _number(row["published_rps"], 2),
            _number(row["throughput_rps"], 2),
            f"{100 * row['error']:+.1f} %",
            _number(row["num_loads"]),
        ]
        for row in results.of_kind(rows, "sweep")
    ]
    return _section(
        "S-LoRA's sweep over the number of adapters",
        "slora",
        table(["adapters", "published req/s", "simulated", "difference", "loads"], lines),
        "One number is fitted, to the row of one adapter. That turning adapters on costs a fifth of the "
        "throughput, and that "
        "their number then hardly matters, follows.\n",
    )


def spot(rows: list[Row]) -> str:
    lines = [
        [
            row["fleet"],
            _number(row["num_requests"]),
            _number(row["num_unfinished"]),
            _number(row["num_lost_replicas"]),
            _number(row["num_restarts"]),
            _percent(row["attainment"], 2),
            _number(row["ttft_p99_s"], 2),
            _number(row["replica_hours"], 1),
            _number(row["cost_of_on_demand_hours"], 1),
        ]
        for row in results.of_kind(rows, "day")
    ]
    header = ["fleet", "requests", "unfinished", "replicas lost", "restarts", "attainment", "TTFT p99 s"]
    return _section(
        "A day on spot instances",
        "spot",
        table([*header, "replica-hours", "cost, on-demand hours"], lines),
        f"{rows[-1]['duration_s'] / 3600:.1f} hours of a trace of 10.8. SpotServe reports 54 % less cost than "
        "on-demand at a P99 latency 2.4 to 9.1 times lower than its "
        "baselines; the "
        "saving here is the price ratio alone. No request is lost: what an interrupted replica had goes on elsewhere, "
        "computed again. SpotServe keeps KV through the interruption where it can, which we do not; recomputing "
        "costs one "
        "prefill. Staying until the end of the notice restarts fewer requests than moving at its beginning.\n",
    )


def vtc(rows: list[Row]) -> str:
    lines = [
        [
            row["policy"],
            _number(row["published_gap_at_360_s"]),
            _number(row["gap_at_360_s"]),
            _number(row["published_largest_at_marks"]),
            _number(row["largest_gap"]),
            _number(row["requests_per_s"], 2),
            _number(row["num_preemptions"]),
        ]
        for row in results.of_kind(rows, "overload")
    ]
    header = ["policy", "published gap at 360 s", "simulated", "published largest at minutes", "simulated largest"]
    return _section(
        "VTC's overload",
        "vtc",
        table([*header, "requests/s", "preemptions"], lines),
        "Difference of the service (prompt tokens + 2 output tokens) that two clients received; VTC's bound is "
        "40,000. The "
        "published server completed 1.7 requests/s. First come, first served drifts apart as published, a little "
        "faster "
        "because the simulated server is. `default` is Pomona's own policy, which also lets running requests "
        "give way.\n",
    )


def router(rows: list[Row]) -> str:
    rows = list(results.of_kind(rows, "router"))
    sizes = sorted({row["num_replicas"] for row in rows})
    found = {(row["policy"], row["num_replicas"]): row for row in rows}
    names = list(dict.fromkeys(row["policy"] for row in rows))
    lines = [
        [name, *(_number(found[name, size]["decision_us"], 1) for size in sizes),
         _number(found[name, sizes[-1]].get("request_us"), 1)]
        for name in names
    ]  # fmt: skip
    header = ["policy", *(f"{size:,} replicas" for size in sizes), f"whole request at {sizes[-1]:,}"]
    return _section(
        "What a routing decision costs",
        None,
        table(header, lines),
        "Microseconds per decision; the last column adds keeping the books when a request is sent and ends. A "
        "scan, the last "
        "line, is what a policy without an index would do.\n",
    )


def scale(rows: list[Row]) -> str:
    lines = [
        [
            f"{row['num_replicas']:,}",
            str(row["num_processes"]),
            _number(row["rate_rps"]),
            _number(row["num_requests"]),
            _number(row["requests_per_wall_s"]),
            _number(row["tokens_per_wall_s"]),
            _number(row["steps_per_wall_s"]),
            _number(row["peak_rss_gib"], 2),
            _number(row["extrapolated_hours_for_ten_minutes"], 2),
        ]
        for row in results.of_kind(rows, "scale")
    ]
    header = ["replicas", "processes", "offered req/s", "requests simulated", "req per wall s", "tokens per wall s"]
    parts = [
        table([*header, "steps per wall s", "peak GiB", "hours for ten minutes (extrapolated)"], lines),
        "A million adapters by Zipf 0.92, prompts of 128 and answers of 32 tokens on average. Only seconds were "
        "simulated; the "
        "last column is their proportion, as the load is steady. With more than one process, replicas run beside "
        "each other "
        "between reports to the router every 50 ms, with the same result wherever they run "
        "(tests/sim/test_sharded.py).\n",
    ]
    for row in results.of_kind(rows, "profile"):
        shares = {key.removeprefix("share "): value for key, value in row.items() if key.startswith("share ")}
        ordered = sorted(shares.items(), key=lambda pair: -pair[1])
        parts.append(table(["part", "share of the time"], [[name, _percent(value)] for name, value in ordered]))
    return _section("1,000 replicas, 1,000,000 adapters, 50,000 requests/s", None, *parts)


def plan(rows: list[Row]) -> str:
    row = next(results.of_kind(rows, "plan"))
    answer, fewer = row["answer"], row["one_fewer"]
    curve = [[str(count), _percent(share)] for count, share in row["curve"]]
    binding = [[name, _percent(share)] for name, share in row["binding"].items()]
    changed = [[name, _percent(share)] for name, share in row["sensitivity"]]
    return _section(
        "pomona plan: the Azure conversation trace with 1,000 adapters",
        None,
        f"{row['trace']}, {row['num_requests']:,} requests. The answer: **{answer['num_replicas']} replicas**, router "
        f"`{answer['policy']}`, {_percent(answer['adapter_share'], 0)} of the cache memory for adapters: "
        f"{answer['adapter_rank_rows']:,} rank rows each. Attainment {_percent(row['outcome']['attainment'])}, wanted "
        f"{_percent(row['wanted'])}. One replica fewer, with the best settings for that: "
        f"{_percent(fewer['attainment'])}. What binds there: {row['binds']}. {row['num_trials']} simulations in "
        f"{row['wall_s']:.0f} s.\n",
        table(["replicas", "attainment in the window"], curve),
        table(["plentiful, one replica fewer", "attainment"], binding),
        table(["changed", "attainment in the window"], changed),
    )


SECTIONS: dict[str, Callable[[list[Row]], str]] = {
    "paper-slots": slots,
    "paper-punica": punica,
    "paper-caraserve": caraserve,
    "paper-slora": slora,
    "paper-vtc": vtc,
    "paper-spot": spot,
    "plan": plan,
    "router": router,
    "scale": scale,
}


def page(folder: Path = results.RESULTS) -> str:
    """The page's content."""
    parts = [INTRO]
    for what, render in SECTIONS.items():
        rows = rows_of(what, folder) if what != "scale" else results.read(results.latest(what, folder) or Path("none"))
        if rows:
            machine = rows[-1]["hardware"]["cpu"].partition(" (")[0]
            parts.append(render(rows) + f"\n<sub>`{rows[-1]['command']}`, {rows[-1]['utc'][:10]}, {machine}</sub>\n")
    return "\n".join(parts)


def files() -> dict[Path, str]:
    """The page, and the charts that rows suffice for."""
    found = {name: rows_of(f"paper-{name}", results.RESULTS) for name in ("caraserve", "slora", "slots")}
    attained = {(row["policy"], row["form"]): row["attainment_percent"] for row in found["caraserve"]}
    rates = {row["num_adapters"]: row["throughput_rps"] for row in results.of_kind(found["slora"], "sweep")}
    return {
        PAGE: page(),
        CHARTS / "paper-caraserve.svg": caraserve_paper.chart(attained),
        CHARTS / "paper-slora.svg": slora_paper.chart(rates),
        CHARTS / "paper-slots.svg": slots_paper.chart(list(results.of_kind(found["slots"], "slots")), 512),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page or a chart is stale")
    options = parser.parse_args()
    for path, content in files().items():
        if not options.check:
            path.write_text(content)
        elif not path.exists() or path.read_text() != content:
            raise SystemExit(f"{path.relative_to(results.ROOT)} is stale: run python -m benchmarks.papers.report")


if __name__ == "__main__":
    main()
