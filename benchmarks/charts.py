"""Rows of results to charts. Pure: rows in, SVG out."""

import statistics
from collections.abc import Sequence

from benchmarks.chart import Bar, Point, Series, grouped_bars, roofline
from benchmarks.peers.systems import SYSTEMS
from benchmarks.results import Row
from benchmarks.tables import Sample, batch_title, by_batch, job_taxes, label_of, least_taxes, ordered, sample
from benchmarks.workload import BASE_INT8, POPULARITIES


def _bar(found: Sample | None, scale: float = 1.0) -> Bar | None:
    if found is None:
        return None
    values = [scale * value for value in found.values]
    return Bar(scale * found.median, min(values), max(values))


def _exact(value: float) -> Bar:
    return Bar(value, value, value)


def peer_chart(rows: Sequence[Row], shape: str, batch: str) -> str:
    """Throughput of one batch: popularities side by side, a color per system."""
    popularities = ordered((row["popularity"] for row in rows), POPULARITIES)
    series = []
    for system in ordered((row["system"] for row in rows), list(SYSTEMS)):
        bars = [_bar(sample(rows, "output_tokens_per_s", system=system, popularity=one)) for one in popularities]
        series.append(Series(label_of(system), tuple(bars)))
    return grouped_bars(
        f"{shape}: {batch_title(batch)}", "popularity of adapters", "output tokens per second", popularities, series
    )


def step_chart(rows: Sequence[Row], shape: str) -> str:
    """Decode steps beside their floors, by batch: the base, in int8, and with an adapter per sequence."""
    decodes = [row for row in rows if row["phase"] == "decode"]
    cases = [
        (batch, mix)
        for batch in sorted({row["batch"] for row in decodes})
        for mix in ("base", BASE_INT8, "identical" if batch == 1 else "distinct")
        if any(row["batch"] == batch and row["mix"] == mix for row in decodes)
    ]
    floors, steps = [], []
    for batch, mix in cases:
        here = [row for row in decodes if row["batch"] == batch and row["mix"] == mix]
        floors.append(_bar(sample(here, "floor_ms")))
        steps.append(_bar(sample(here, "step_ms")))
    groups = [f"{batch}, {mix}" for batch, mix in cases]
    series = [Series("floor", tuple(floors)), Series("measured", tuple(steps))]
    return grouped_bars(f"{shape}: decode step", "sequences in the step, adapters", "milliseconds", groups, series)


def tax_chart(rows: Sequence[Row], shape: str) -> str:
    """What adapters cost the first batch of the rows, measured and by the formulas, by popularity."""
    batch, rows = next(iter(by_batch(rows).items()))
    popularities = [
        one for one in ordered((row["popularity"] for row in rows), POPULARITIES) if not one.startswith("base")
    ]
    measured: list[Bar | None] = []
    formulas: list[Bar | None] = []
    for popularity in popularities:
        taxes = [100 * tax for tax in job_taxes(rows, popularity)]
        measured.append(Bar(statistics.median(taxes), min(taxes), max(taxes)))
        least = [100 * tax for tax in least_taxes(rows, popularity)]
        formulas.append(_exact(statistics.median(least)) if least else None)
    series = [Series("extra bytes and FLOPs alone", tuple(formulas)), Series("measured", tuple(measured))]
    title = f"{shape}: LoRA tax, {batch_title(batch)}"
    return grouped_bars(title, "popularity of adapters", "throughput lost, % of base only", popularities, series)


def op_chart(rows: Sequence[Row], shape: str) -> str:
    """The roofline of the ops that compute, by the backend that serves."""
    serving = [row for row in rows if row["backend"] != "reference" and row["flops"] and row["bytes"]]
    points = {
        op: [
            Point(f"{op}: {row['case']}", row["flops"] / row["bytes"], 1e6 * row["flops"] / row["median_us"])
            for row in serving
            if row["op"] == op
        ]
        for op in dict.fromkeys(row["op"] for row in serving)
    }
    last = rows[-1]
    limits = 1e9 * last["peak_gflop_per_s"], 1e9 * last["bandwidth_gb_per_s"]
    return roofline(f"{shape}: ops under the roof, {last['threads']} threads, {last['dtype']}", *limits, points)
