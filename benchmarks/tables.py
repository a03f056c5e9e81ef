"""Rows of results to Markdown tables. Pure: rows in, text out; what it shows is what the rows say.

Only clean repetitions count; where there is none, the disturbed ones are shown and marked with "~".
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.peers.systems import SYSTEMS
from benchmarks.results import Row, of_kind
from benchmarks.roofline import BF16, Ceilings, Cost
from benchmarks.shapes import SHAPES
from benchmarks.workload import POPULARITIES

POMONA = "pomona"
ALL_SMALL, ONE_LARGE = "all r4", "r128 among r4"
"""Mixes of ``benchmarks.step`` that differ in one adapter's rank."""
NONE = "–"


@dataclass(frozen=True, slots=True)
class Sample:
    """The repetitions of one measurement."""

    values: tuple[float, ...]
    is_clean: bool

    @property
    def median(self) -> float:
        """Of the repetitions."""
        return statistics.median(self.values)

    def text(self, form: str = "{:.0f}") -> str:
        """Median, range, and how many; "~" if disturbed."""
        low, high = form.format(min(self.values)), form.format(max(self.values))
        spread = f" [{low}–{high}]" if len(self.values) > 1 else ""
        return f"{'' if self.is_clean else '~'}{form.format(self.median)}{spread}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, others right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def counted(rows: Iterable[Row], **match: object) -> list[Row]:
    """The rows whose fields are as given and that nobody disturbed; if all were disturbed, all."""
    found = [row for row in rows if all(row.get(key) == value for key, value in match.items())]
    return [row for row in found if row.get("is_clean")] or found


def sample(rows: Iterable[Row], field: str, **match: object) -> Sample | None:
    """The values of a field in the ``counted`` rows; None if there are none."""
    found = counted(rows, **match)
    return Sample(tuple(float(row[field]) for row in found), bool(found[0].get("is_clean"))) if found else None


def median_of(rows: Sequence[Row], field: str) -> float:
    """Of a field in all of the rows."""
    return float(statistics.median(row[field] for row in rows))


def of_one_program(rows: Sequence[Row]) -> list[Row]:
    """Of the machine that was measured last, without our own system's rows of earlier programs than the last one's: a
    file may hold several."""
    here = [row for row in rows if row.get("hardware") == rows[-1].get("hardware")]
    ours = [row.get("program") for row in here if row["system"] == POMONA]
    return [row for row in here if row["system"] != POMONA or row.get("program") == ours[-1]]


def ordered(values: Iterable[str], order: Sequence[str]) -> list[str]:
    """Distinct values, those of ``order`` first and in its order."""
    found = list(dict.fromkeys(values))
    return [value for value in order if value in found] + [value for value in found if value not in order]


def by_batch(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of cells by batch, such as b32-128-64."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["cell"].partition("/")[0], []).append(row)
    return found


def batch_title(batch: str) -> str:
    """ "32 requests, 128 in, 64 out" for b32-128-64."""
    count, prompt, output = batch.removeprefix("b").split("-")
    return f"{count} request{'' if count == '1' else 's'}, {prompt} in, {output} out"


def label_of(system: str) -> str:
    """A system's name in tables and charts."""
    return SYSTEMS[system].label if system in SYSTEMS else system


def peer_metric(rows: Sequence[Row], field: str, form: str) -> str:
    """Systems by popularities for one batch of one shape."""
    popularities = ordered((row["popularity"] for row in rows), POPULARITIES)
    lines = []
    for system in ordered((row["system"] for row in rows), list(SYSTEMS)):
        found = [sample(rows, field, system=system, popularity=popularity) for popularity in popularities]
        cells = [one.text(form) if one else NONE for one in found]
        if "idle" in popularities and system in SYSTEMS and SYSTEMS[system].is_idle_base:
            cells[popularities.index("idle")] = "as base"
        lines.append([label_of(system), *cells])
    return table(["", *popularities], lines)


def fastest_peer(rows: Sequence[Row], batch: str, popularity: str) -> tuple[str, float] | None:
    """(system, median tokens/s) of the fastest system that is not ours."""
    found: list[tuple[float, str]] = []
    for system in ordered((row["system"] for row in rows), list(SYSTEMS)):
        one = sample(rows, "output_tokens_per_s", system=system, cell=f"{batch}/{popularity}")
        if one is not None and not system.startswith(POMONA):
            found.append((one.median, system))
    return (max(found)[1], max(found)[0]) if found else None


def peer_ratios(rows: Sequence[Row]) -> str:
    """Pomona against the fastest peer on the same cell, and against the fastest peer's base-only."""
    lines = []
    for batch in sorted(by_batch(rows), key=lambda name: [-int(part) for part in name.removeprefix("b").split("-")]):
        base_peer = fastest_peer(rows, batch, "base")
        for popularity in POPULARITIES:
            ours = sample(rows, "output_tokens_per_s", system=POMONA, cell=f"{batch}/{popularity}")
            peer = fastest_peer(rows, batch, popularity)
            if ours is None:
                continue
            lines.append(
                [
                    f"{batch_title(batch)}, {popularity}",
                    f"{ours.median:.0f}",
                    f"{peer[1]:.0f} ({peer[0]})" if peer else NONE,
                    f"{ours.median / peer[1]:.2f}" if peer else NONE,
                    f"{ours.median / base_peer[1]:.2f}" if base_peer else NONE,
                ]
            )
    header = ["", "Pomona tok/s", "fastest peer", "ratio", "to fastest peer's base only"]
    return table(header, lines)


def agreement_table(rows: Sequence[Row]) -> str:
    """How far each system's greedy tokens are those of the reference."""
    found = list(of_kind(rows, "agreement"))
    lines = []
    for system in ordered((row["system"] for row in found), list(SYSTEMS)):
        mine = [row for row in found if row["system"] == system]
        first = statistics.fmean(row["same_first_token"] for row in mine)
        prefix = statistics.fmean(row["mean_common_prefix"] for row in mine)
        lines.append([label_of(system), f"{first:.1%}", f"{prefix:.1f}", str(len(mine))])
    return table(["", "same first token", "tokens until the first difference", "runs"], lines)


def noise_text(rows: Sequence[Row]) -> str:
    """How quiet the machine was."""
    clean = [row for row in rows if row.get("is_clean")]
    if not clean:
        return f"{len(rows)} repetitions, none of them on a quiet machine.\n"
    other, steal = [row["other_pct"] for row in clean], [row["steal_pct"] for row in clean]
    return (
        f"{len(rows)} repetitions, {len(clean)} clean. In the clean ones other processes took "
        f"{statistics.median(other):.1f} % of the machine (at most {max(other):.1f} %), the hypervisor "
        f"{statistics.median(steal):.1f} % (at most {max(steal):.1f} %).\n"
    )


def setup_text(rows: Sequence[Row]) -> str:
    """Hardware, commits and dates behind some rows; nothing for none."""
    if not rows:
        return ""
    lines = []
    for key, name in (("hardware", "Hardware"), ("program", "Program"), ("commit", "Commit"), ("command", "Command")):
        values = dict.fromkeys(_flat(row.get(key)) for row in rows)
        lines.append(f"- {name}: {'; '.join(values)}")
    dates = sorted({str(row["utc"])[:10] for row in rows})
    lines.append(f"- Date: {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else ""))
    return "\n".join(lines) + "\n"


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(part)}" for key, part in value.items() if part not in ([], None))
    if isinstance(value, list):
        return " ".join(str(part) for part in value)
    return str(value)


def versions_table(rows: Sequence[Row]) -> str:
    """What ran, with the settings that were not its defaults, and when each command that ran it was given."""
    lines = []
    for system in ordered((row["system"] for row in rows), list(SYSTEMS)):
        mine = [row for row in rows if row["system"] == system]
        settings = dict.fromkeys(_flat(row["settings"]) for row in mine)
        began = ", ".join(sorted({row["utc"][:16].replace("T", " ") for row in mine}))
        lines.append([label_of(system), _flat(mine[-1]["versions"]), "; ".join(settings) or NONE, began])
    return table(["", "versions", "settings", "began (UTC)"], lines)


def ceilings_table(row: Row | None) -> str:
    """The measured ceilings."""
    if row is None:
        return "No results yet.\n"
    lines = []
    for item in row["ceilings"]:
        facts = item["facts"]
        kind = f"{facts['dtype']}, {facts['method']}" if item["group"] == "gemm" else ""
        spread = f"{item['worst']:.0f} to {item['best']:.0f}"
        lines.append([f"{item['group']}: {item['name']}", kind, f"{item['median']:.0f} {item['unit']}", spread])
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in row["peaks"].items())
    return f"Floors are computed from the best medians: {peaks}.\n\n" + table(
        ["what", "kind", "median", "worst to best run"], lines
    )


def step_table(rows: Sequence[Row]) -> str:
    """Steps of one shape beside their floors; a ratio is of a step and the floor of its own moment."""
    lines = []
    for phase, batch, mix in dict.fromkeys((row["phase"], row["batch"], row["mix"]) for row in rows):
        here = counted(rows, phase=phase, batch=batch, mix=mix)
        one = sample(here, "step_ms")
        assert one is not None
        megabytes, gflop = median_of(here, "bytes") / 1e6, median_of(here, "flops") / 1e9
        floor, ratio = f"{median_of(here, 'floor_ms'):.2f}", f"{median_of(here, 'times_floor'):.2f}"
        measured = one.text("{:.2f}")
        lines.append([f"{phase} {batch}", mix, f"{megabytes:.0f}", f"{gflop:.2f}", floor, measured, ratio])
    return table(["", "", "MB", "GFLOP", "floor ms", "measured ms", "ratio"], lines)


def job_taxes(rows: Sequence[Row], popularity: str) -> list[float]:
    """1 - time of the base / time of the job, of each repetition; of those that nobody disturbed, if there are any."""
    return [1 - row["base_wall_s"] / row["wall_s"] for row in counted(rows, popularity=popularity)]


def _extra_s(rows: Sequence[Row], popularity: str) -> list[tuple[Row, float]]:
    """A popularity's jobs, each with what its extra bytes, then its extra FLOPs, take at the ceilings of its minutes.
    Nothing where the base was not measured."""
    base = next((row for row in rows if row["popularity"] == "base"), None)
    if base is None:
        return []
    return [
        (
            row,
            (row["bytes"] - base["bytes"]) / row["ceilings"]["bytes_per_s"]
            + (row["flops"] - base["flops"]) / row["ceilings"]["flops_per_s"],
        )
        for row in counted(rows, popularity=popularity)
    ]


def least_taxes(rows: Sequence[Row], popularity: str) -> list[float]:
    """The tax of each repetition if only the extra bytes, then the extra FLOPs, had come to the measured base."""
    return [extra_s / (row["base_wall_s"] + extra_s) for row, extra_s in _extra_s(rows, popularity)]


def over_formulas(rows: Sequence[Row], popularity: str) -> float | None:
    """Extra time of a popularity's jobs over what its extra bytes, then its extra FLOPs, take at the ceilings. None
    where there is nothing extra."""
    ratios = [
        (row["wall_s"] - row["base_wall_s"]) / extra_s for row, extra_s in _extra_s(rows, popularity) if extra_s > 0
    ]
    return statistics.median(ratios) if ratios else None


def job_table(rows: Sequence[Row]) -> str:
    """Jobs of one shape, with the tax on throughput (of `base`, against its like) and what the formulas make of it."""
    lines = []
    for popularity in ordered((row["popularity"] for row in rows), POPULARITIES):
        here = counted(rows, popularity=popularity)
        one = sample(here, "output_tokens_per_s")
        assert one is not None
        over, least = over_formulas(rows, popularity), least_taxes(rows, popularity)
        lines.append(
            [
                popularity,
                one.text(),
                f"{median_of(here, 'wall_s'):.2f}",
                f"{median_of(here, 'floor_s'):.2f}",
                f"{median_of(here, 'times_floor'):.2f}",
                f"{statistics.median(job_taxes(rows, popularity)):.1%}",
                NONE if over is None else f"{statistics.median(least):.1%}",
                NONE if over is None else f"{over:.2f}",
            ]
        )
    extra = "extra time / extra bytes and FLOPs in turn"
    header = ["", "output tok/s", "job s", "floor s", "ratio", "tax", "tax by the formulas", extra]
    return table(header, lines)


def server_table(rows: Sequence[Row]) -> str:
    """Streams through the server: what the client saw beside what the engine did."""
    lines = []
    for num_streams, popularity in dict.fromkeys((row["num_streams"], row["popularity"]) for row in rows):
        here = counted(rows, num_streams=num_streams, popularity=popularity)
        mark = "" if here[0]["is_clean"] else "~"

        def median(value: Callable[[Row], float], here: Sequence[Row] = here) -> float:
            return statistics.median(value(row) for row in here)

        lines.append(
            [
                f"{mark}{num_streams} streams, {popularity}",
                f"{median(lambda row: row['output_tokens_per_s']):.0f}",
                f"{median(lambda row: row['engine_itl_ms']['p50']):.1f}",
                f"{median(lambda row: row['client_itl_ms']['p50']):.1f}",
                f"{median(lambda row: row['engine_itl_ms']['p99']):.1f}",
                f"{median(lambda row: row['client_itl_ms']['p99']):.1f}",
                f"{median(lambda row: row['itl_p99_ratio']):.2f}",
                f"{median(lambda row: row['server_cpu_us_per_token']):.0f}",
                f"{median(lambda row: row['engine_host_cpu_us_per_token']):.1f}",
            ]
        )
    header = [
        "",
        "output tok/s",
        "ITL p50 ms, engine",
        "client",
        "p99 ms, engine",
        "client",
        "ratio",
        "server CPU µs/token",
        "engine's host part",
    ]
    return table(header, lines)


def profile_table(row: Row, num_lines: int = 12) -> str:
    """Where a step's time goes."""
    lines = [
        [f"`{one['function']}`", f"{one['calls_per_step']:.0f}", f"{one['own_ms_per_step']:.2f}"]
        for one in row["functions"][:num_lines]
    ]
    return table(["function", "calls per step", "own ms per step"], lines)


def op_table(rows: Sequence[Row]) -> str:
    """Ops of one shape beside their floors, a column per backend."""
    backends = ordered((row["backend"] for row in rows), ("cpu", "triton", "reference"))
    lines = []
    for op, case in dict.fromkeys((row["op"], row["case"]) for row in rows):
        here = [row for row in rows if (row["op"], row["case"]) == (op, case)]
        floor_us = here[-1]["floor_us"]
        found = [sample(here, "median_us", backend=backend) for backend in backends]
        served = next((one for one in found if one is not None), None)
        ratio = f"{served.median / floor_us:.2f}" if served and floor_us else NONE
        cells = [one.text("{:.1f}") if one else NONE for one in found]
        lines.append([f"{op}: {case}", f"{floor_us:.1f}" if floor_us else NONE, *cells, ratio])
    return table(["op", "floor µs", *(f"{name} µs" for name in backends), "ratio"], lines)


def rank_table(rows: Sequence[Row]) -> str:
    """One adapter of rank 128 beside others of rank 4: what it adds to a decode step, measured and by the formulas,
    under the same ceilings with and without. Nothing where that was not measured."""
    lines = []
    for batch in sorted({row["batch"] for row in rows if row["mix"] == ALL_SMALL}):
        here = [row for row in rows if row["batch"] == batch and row["phase"] == "decode"]
        small, mixed = (sample(here, "step_ms", mix=mix) for mix in (ALL_SMALL, ONE_LARGE))
        if small is None or mixed is None:
            continue
        shape = SHAPES[here[0]["shape"]]
        num_extra = shape.lora_parameters(128) - shape.lora_parameters(4)
        extra = Cost(flops=2.0 * num_extra, bytes=BF16.adapter * num_extra)  # one row has the adapter
        least_s = []
        for row in counted(here, mix=ONE_LARGE):
            limits, cost = Ceilings(**row["ceilings"]), Cost(flops=row["flops"], bytes=row["bytes"])
            least_s.append(limits.floor_s(cost) - limits.floor_s(cost - extra))
        lines.append(
            [
                f"{batch} sequences",
                f"{small.text('{:.2f}')}",
                f"{mixed.text('{:.2f}')}",
                f"{mixed.median - small.median:+.2f}",
                f"{1e3 * statistics.median(least_s):.2f}",
                f"{extra.bytes / 1e6:.1f}",
                f"{extra.flops / 1e9:.3f}",
                f"{batch * BF16.adapter * shape.lora_parameters(128) / 1e6:.0f}",
            ]
        )
    if not lines:
        return ""
    header = ["", "all rank 4, ms", "one of rank 128, ms", "difference, ms", "by the formulas, ms"]
    return table([*header, "extra MB", "extra GFLOP", "MB if all were padded to 128"], lines)
