"""A simulation's report as one HTML page that needs nothing else: figures in tables, series as drawings (SVG)."""

import json
import math
from collections.abc import Sequence
from html import escape

from pomona.sim.ledger import LedgerSummary, Percentiles
from pomona.sim.report import Series, SimulationReport

_WIDTH, _HEIGHT = 560.0, 210.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 10.0, 10.0, 26.0
_COLORS = ("#3b6fd4", "#d9822b", "#2a9d64", "#b0413e", "#7b52ab", "#4aa3a2", "#8a6d3b", "#c2528b")
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #777; --line: #ddd; --ground: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #999; --line: #444; --ground: #1b1b1b; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 1200px;
  margin: 2rem auto; padding: 0 1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .2rem; }
svg { width: 100%; height: auto; } text { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--line); stroke-width: 1; } polyline { fill: none; stroke-width: 1.6; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .15rem .8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead { border-bottom: 1px solid var(--line); }
.legend span { margin-right: 1rem; color: var(--soft); font-size: 12px; } .legend i { display: inline-block;
  width: .8em; height: .8em; margin-right: .3em; border-radius: 2px; } pre { overflow: auto; font-size: 12px; }
"""

_CHARTS = (
    ("Time to first token", ("TTFT p50", "TTFT p90", "TTFT p99")),
    ("Time per output token", ("TPOT p50", "TPOT p90", "TPOT p99")),
    ("Attainment", ("attainment",)),
    ("Arrivals and goodput", ("arrivals", "goodput")),
    ("Throughput", ("throughput",)),
    ("Queue", ("requests on replicas", "waiting for a replica")),
    ("Memory", ("KV memory used", "adapter memory used")),
    ("Replicas", ("replicas serving", "replicas starting")),
)


def render_page(report: SimulationReport, title: str) -> str:
    """The page."""
    by_name = {series.name: series for series in report.series}
    charts = [(caption, [by_name[name] for name in names if name in by_name]) for caption, names in _CHARTS]
    charts.append(("Service by tenant", [s for s in report.series if s.name.startswith("service of ")]))
    figures = "".join(_figure(caption, series) for caption, series in charts if series)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{_summary(report)}"
        f'<div class="charts">{figures}</div><h2>By tenant</h2>{_tenants(report)}'
        f"<h2>Spec</h2><pre>{escape(json.dumps(report.to_json()['spec'], indent=1))}</pre></body></html>\n"
    )


def _summary(report: SimulationReport) -> str:
    found = report.all
    lines = [
        ("simulated", f"{report.simulated_s:.1f} s in {report.wall_s:.1f} s of wall clock"),
        ("requests", f"{found.num_requests}; finished {found.num_finished}, rejected {found.num_rejected}, "
         f"failed {found.num_failed}" + (f", not ended {found.num_open}" if found.num_open else "")),
        ("attainment, goodput", f"{_percent(found.attainment)}, {found.goodput_rps:.2f} requests/s"),
        ("throughput", f"{found.output_tokens_per_s:.1f} output tokens/s"),
        ("replica-hours, busy", f"{report.replica_s / 3600:.2f}, {_percent(report.busy_share)}"),
        ("preemptions, adapter loads", f"{report.num_preemptions}, {report.num_adapter_loads}"),
        ("cost model", report.cost_model),
    ]  # fmt: skip
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in lines)
    return f"<table>{rows}</table>{_latencies(found)}"


def _latencies(found: LedgerSummary) -> str:
    rows = "".join(
        f"<tr><td>{name}</td>{_cells(entry)}</tr>"
        for name, entry in (("TTFT", found.ttft_s), ("TPOT", found.tpot_s), ("e2e", found.e2e_s))
    )
    return (
        "<table><thead><tr><th>ms</th><th>mean</th><th>p50</th><th>p90</th><th>p99</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _cells(entry: Percentiles | None) -> str:
    values = ("-",) * 4 if entry is None else [f"{1e3 * getattr(entry, n):.1f}" for n in ("mean", "p50", "p90", "p99")]
    return "".join(f"<td>{value}</td>" for value in values)


def _tenants(report: SimulationReport) -> str:
    rows = "".join(
        f"<tr><td>{escape(entry.tenant)}</td><td>{entry.summary.num_requests}</td>"
        f"<td>{_percent(entry.summary.attainment)}</td><td>{entry.service:.0f}</td>{_cells(entry.summary.ttft_s)}</tr>"
        for entry in report.tenants
    )
    return (
        "<table><thead><tr><th>tenant</th><th>requests</th><th>attainment</th><th>service</th><th>TTFT mean ms</th>"
        f"<th>p50</th><th>p90</th><th>p99</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "-"


def _figure(caption: str, series: Sequence[Series]) -> str:
    legend = "".join(
        f'<span><i style="background:{_COLORS[index % len(_COLORS)]}"></i>{escape(entry.name)}</span>'
        for index, entry in enumerate(series)
    )
    unit = f", {series[0].unit}" if series[0].unit else ""
    return (
        f"<figure><figcaption>{escape(caption + unit)}</figcaption>{draw(series)}"
        f'<div class="legend">{legend}</div></figure>'
    )


def draw(series: Sequence[Series]) -> str:
    """Lines over time as SVG; gaps where a value is undefined."""
    values = [value for entry in series for value in entry.values if value is not None]
    top = _round_up(max(values, default=0.0))
    end_s = max((time_s for entry in series for time_s in entry.times_s), default=1.0) or 1.0

    def x(time_s: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * time_s / end_s

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / top

    parts = []
    for tick in range(5):
        value, time_s = top * tick / 4, end_s * tick / 4
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
            f'<text x="{x(time_s):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{time_s:.4g} s</text>'
        )
    for index, entry in enumerate(series):
        color = _COLORS[index % len(_COLORS)]
        for run in _runs(entry):
            points = " ".join(f"{x(time_s):.1f},{y(value):.1f}" for time_s, value in run)
            parts.append(f'<polyline stroke="{color}" points="{points}"><title>{escape(entry.name)}</title></polyline>')
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img">{"".join(parts)}</svg>'


def _runs(series: Series) -> list[list[tuple[float, float]]]:
    """Stretches of defined values."""
    runs: list[list[tuple[float, float]]] = [[]]
    for time_s, value in zip(series.times_s, series.values, strict=True):
        if value is not None:
            runs[-1].append((time_s, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 10 times a power of ten."""
    if value <= 0.0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 4, 5, 10) if step * power >= value * (1 - 1e-12))
