"""docs/benchmarks/fairness.md and its charts, from the rows in benchmarks/results; the latest of each kind count."""

from collections.abc import Iterable
from typing import Any

from benchmarks import results, tables
from benchmarks.chart import Bar, Series, grouped_bars
from benchmarks.papers.lines import Line, Panel, line_chart

DOCS = results.ROOT / "docs" / "benchmarks"
PUBLISHED_ARENA = {"VTC, oracle": 227.5, "VTC, mean": 240.3, "VTC": 251.7, "LCF": 323.8, "FCFS": 433.5}
"""Mean difference in service in the paper's own run (table 2)."""
_DRAWN = ("FCFS", "LCF", "VTC", "VTC, mean", "VTC, oracle", "WVTC, seats", "DRR")


def _rows(kind: str) -> list[dict[str, Any]]:
    paths = sorted(results.RESULTS.glob("*-fairness.jsonl"))
    return [row for path in paths for row in results.read(path) if row["kind"] == kind]


def _latest(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Workload -> policy -> row."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["workload"], {})[row["policy"]] = row
    return found


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def _ttfts(row: dict[str, Any]) -> str:
    found = row["ttft_s"]
    if len(found) > 4:
        worst = max(found, key=lambda name: found[name]["p50"])
        return f"worst of {len(found)}: {found[worst]['p50']:.3g} / {found[worst]['p99']:.3g}"
    return ", ".join(f"{name} {one['p50']:.3g} / {one['p99']:.3g}" for name, one in found.items())


def _workload_table(of_policy: dict[str, dict[str, Any]]) -> str:
    base = of_policy.get("FCFS")
    rows = []
    for policy, row in of_policy.items():
        relative = (
            "" if base is None else f"{row['throughput_tokens_per_s'] / base['throughput_tokens_per_s'] - 1:+.1%}"
        )
        rows.append(
            [
                policy,
                f"{row['gap_largest']:,.0f}",
                f"{row['difference_largest']:,.0f} / {row['difference_mean']:,.1f}",
                f"{row['jain']:.3f}",
                f"{row['throughput_tokens_per_s']:,.0f} ({relative})",
                str(row["num_rejected"]),
                str(row["num_preemptions"]),
                _ttfts(row),
            ]
        )
    head = ["policy", "accumulated gap", "windowed difference, max / mean", "Jain", "tokens/s (to FCFS)"]
    return _table([*head, "refused", "preempted", "TTFT p50 / p99, s"], rows)


def _gap_chart(of_policy: dict[str, dict[str, Any]], title: str) -> str:
    bound = next(row["bound"] for row in of_policy.values() if "bound" in row)
    drawn = [(policy, of_policy[policy]) for policy in _DRAWN if policy in of_policy]
    lines = [Line(policy, tuple((time_s, gap) for time_s, gap in row["gaps"])) for policy, row in drawn]
    fair = [line for line in lines if line.label != "FCFS"]
    end_s = max(time_s for time_s, _ in lines[0].points)
    panels = [Panel("service", tuple(lines))]
    if fair:
        panels.append(Panel("service, without FCFS", (*fair, Line("bound", ((0.0, bound), (end_s, bound))))))
    return line_chart(title, "seconds", panels)


def _arena_chart(of_policy: dict[str, dict[str, Any]]) -> str:
    names = [name for name in PUBLISHED_ARENA if name in of_policy]
    published = Series("published (A10G)", tuple(Bar(v, v, v) for v in (PUBLISHED_ARENA[name] for name in names)))
    values = [of_policy[name]["difference_mean"] for name in names]
    ours = Series("simulated", tuple(Bar(v, v, v) for v in values))
    return grouped_bars("Arena trace: mean difference in service", "policy", "units/s", names, [published, ours])


def _noisy_section() -> str:
    rows = _rows("noisy")
    if not rows:
        return ""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        latest[row["level"], row["case"]] = row
    cells = [
        [
            level,
            case,
            *(f"{1e3 * row['ttft_s'][share]:.1f}" for share in ("p50", "p90", "p99")),
            f"{row['ttft_s']['p99'] / latest[level, 'alone']['ttft_s']['p99']:.2f}",
            f"{row['flood_tokens_per_s']:,.0f}",
        ]
        for (level, case), row in latest.items()
    ]
    head = ["measured", "case", "TTFT p50, ms", "p90, ms", "p99, ms", "p99 to alone", "flood, output tokens/s"]
    return f"""## Noisy neighbour

`python -m benchmarks.noisy_neighbour`: one tenant keeps 200 long requests over 32 adapters going; another sends one
short request a second. Bundled model, {rows[-1]["hardware"]["cpu"]}, {rows[-1]["hardware"]["cores"]} cores.

{_table(head, cells)}
"""


def write() -> None:
    """Write the page and its charts."""
    latest = _latest(_rows("fairness"))
    parts = []
    for workload, of_policy in latest.items():
        row = next(iter(of_policy.values()))
        name = workload.replace(" ", "-")
        parts.append(f"## {workload} ({row['mode']})\n")
        if "gaps" in row:
            (DOCS / f"fairness-{name}.svg").write_text(_gap_chart(of_policy, f"{workload}: accumulated gap in service"))
            parts.append(f"![accumulated gap](fairness-{name}.svg)\n")
        if workload == "arena":
            (DOCS / "fairness-arena.svg").write_text(_arena_chart(of_policy))
            parts.append("![mean difference](fairness-arena.svg)\n")
        parts.append(f"{_workload_table(of_policy)}\n")
    bound = next((row["bound"] for of in latest.values() for row in of.values() if row["mode"] == "simulated"), 0.0)
    page = f"""# Fairness between tenants

Generated by `python -m benchmarks.fairness` from benchmarks/results; nothing here is typed by hand. Policies and the
proof of the bound: docs/design/0011-fairness.md. Workloads: benchmarks/fairness_workloads.py (the VTC paper's, and its
Arena trace, Apache-2.0). Simulated: the live scheduler on the simulator's replica with the cost of Llama-2-7B on an
A10G, fitted to the paper's profile, 10,000 KV tokens. A unit of service is an input token; an output token is two.

The *accumulated gap* is between the tenants served most and least since the start, by weight; it means something where
all of them always have requests waiting (overload): there the bound is {bound:,.0f}. The *windowed difference* is the
paper's metric. It counts service that was asked for and not given, and can rank FCFS first where everybody is
overloaded; both grow with a run's length, so runs are compared over the seconds of the arrivals. With *seats* is how
the server comes; the other policies preempt nobody for fairness' sake, as in the paper.

{tables.setup_text([row for of in latest.values() for row in of.values()])}
{chr(10).join(parts)}
{_noisy_section()}"""
    (DOCS / "fairness.md").write_text(page.rstrip() + "\n")
