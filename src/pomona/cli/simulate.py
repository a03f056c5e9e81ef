"""``pomona simulate``: reads a spec and what it names, simulates under a progress bar, shows and writes results."""

import gzip
import importlib.resources
import json
import sys
import time
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from pomona.cli.simulation_page import render_page
from pomona.core.errors import ConfigError
from pomona.sim.cluster import ClusterSim
from pomona.sim.ledger import Percentiles
from pomona.sim.perfetto import StepTrace, trace_events
from pomona.sim.report import SimulationReport, make_report
from pomona.sim.setup import Setup, prepare
from pomona.sim.spec import SimulationSpec, parse_spec
from pomona.workload.spec import WorkloadRequest

MAX_SHOWN_TENANTS = 5
"""Columns of the table besides that of all requests."""


@dataclass(frozen=True, slots=True)
class SimulateOutputs:
    """What to write besides the table."""

    as_json: bool = False
    """One JSON object to standard output."""
    page: Path | None = None
    trace: Path | None = None
    trace_start_s: float = 0.0
    trace_end_s: float = 10.0


def run_simulate(spec_file: Path, outputs: SimulateOutputs) -> SimulationReport:
    """Simulate what a file describes.

    Raises:
        ConfigError: the file, or one that it names, is wrong; says where.
    """
    for flag, path in (("--html", outputs.page), ("--trace", outputs.trace)):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{flag} {path}: the folder does not exist")
        if path is not None and path.is_dir():
            raise ConfigError(f"{flag} {path}: is a folder; name a file in it")
    spec = load_spec(spec_file)
    named = [spec_file]

    def read(name: str) -> list[str]:
        named.append(spec_file.parent / Path(name).expanduser())
        return read_lines(name, spec_file.parent)

    try:
        setup = prepare(spec, read)
    except ConfigError as error:
        raise ConfigError(f"{spec_file}: {error}") from error
    _check_not_read(outputs, named)
    console = Console(stderr=True, emoji=False)
    warn_beyond(setup.beyond_profile, console)
    report, trace_lines = simulate(spec, setup, outputs, console)
    show(report, spec_file.stem, console)
    if outputs.page is not None:
        _write("--html", outputs.page, render_page(report, spec_file.stem))
    if outputs.trace is not None:
        _write("--trace", outputs.trace, trace_lines)
    if outputs.as_json:
        sys.stdout.write(json.dumps(report.to_json()) + "\n")
    return report


def _check_not_read(outputs: SimulateOutputs, named: Sequence[Path]) -> None:
    """What is written must not be what was read, nor one page the other."""
    for flag, path in (("--html", outputs.page), ("--trace", outputs.trace)):
        if path is not None and path.resolve() in [other.resolve() for other in named]:
            raise ConfigError(f"{flag} {path}: the simulation is read from this file; name another")
    if outputs.page is not None and outputs.trace is not None and outputs.page.resolve() == outputs.trace.resolve():
        raise ConfigError(f"--trace {outputs.trace}: is --html's file too; name another")


def warn_beyond(what: str, console: Console) -> None:
    """Say which sizes of a spec are larger than its profile saw, if any."""
    if what:
        said = f"Larger than replica.profile saw, so steps' seconds are extrapolated: {what}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)


def read_window(text: str) -> tuple[float, float]:
    """``60-70`` is from the 60th second to the 70th.

    Raises:
        ConfigError: it is no window.
    """
    start, _, end = text.partition("-")
    try:
        window = float(start), float(end)
    except ValueError:
        window = 0.0, 0.0
    if not 0.0 <= window[0] < window[1]:
        raise ConfigError(f"--trace-window {text!r}: must be START-END in seconds, such as 60-70")
    return window


def load_spec(spec_file: Path) -> SimulationSpec:
    """Read and check a spec.

    Raises:
        ConfigError: it cannot be read, or says something wrong; names the key.
    """
    return parse_spec(read_toml(spec_file), str(spec_file))


def read_toml(spec_file: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(spec_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{spec_file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        # Besides its own error tomllib raises ValueError for numbers of thousands of digits.
        raise ConfigError(f"{spec_file}: is not TOML: {error}") from error


def _write(flag: str, path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be written: {error.strerror}") from error


def read_lines(name: str, folder: Path) -> list[str]:
    """Lines of a file relative to ``folder``, or of a bundled sample; unpacked if its name ends in .gz.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    bundled = importlib.resources.files("pomona").joinpath("workload", "data")
    try:
        path = folder / Path(name).expanduser()
        if not path.is_file() and "/" not in name and bundled.joinpath(f"{name}.gz").is_file():
            content = gzip.decompress(bundled.joinpath(f"{name}.gz").read_bytes())
        else:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
        return content.decode("utf-8-sig").splitlines()  # spreadsheets begin CSV files with a byte order mark
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        # ValueError: text that is not UTF-8, a name with a NUL; RuntimeError: nobody's home; the rest are damaged .gz.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        samples = sorted(entry.name.removesuffix(".gz") for entry in bundled.iterdir() if entry.name.endswith(".gz"))
        is_trace = "/" not in name and name.endswith((".csv", ".jsonl"))
        hint = f"; bundled samples are {', '.join(samples)}" if is_trace else ""
        raise ConfigError(f"{name}: cannot be read: {reason}{hint}") from error


def simulate(
    spec: SimulationSpec, setup: Setup, outputs: SimulateOutputs, console: Console
) -> tuple[SimulationReport, str]:
    """Run; returns the report and the trace's JSON, empty if none was asked for."""
    sim = ClusterSim(setup.cluster, setup.adapters, setup.prompts)
    trace = StepTrace(sim.heap, outputs.trace_start_s, outputs.trace_end_s)
    if outputs.trace is not None:
        sim.observe = trace.note
    start_s = time.monotonic()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=setup.num_requests)

        def counted() -> Iterator[WorkloadRequest]:
            for number, request in enumerate(setup.workload):
                if number % 256 == 0:
                    progress.update(task, completed=number, description=f"simulating, {sim.heap.now_s:.1f} s")
                yield request

        sim.run(counted(), float("inf") if spec.until_s is None else spec.until_s)
    report = make_report(sim, spec.model_dump(mode="json"), time.monotonic() - start_s, setup.cost_error)
    if outputs.trace is None:
        return report, ""
    if not trace.steps:
        window = f"{outputs.trace_start_s:g}-{outputs.trace_end_s:g}"
        console.print(f"--trace-window {window}: no step began in it; the simulation ended at {sim.end_s:.1f} s")
    events = list(trace_events(trace, sim.ledger))
    return report, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False)


def show(report: SimulationReport, title: str, console: Console) -> None:
    """Print the figures."""
    said = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    said(
        f"{title}: {report.simulated_s:.1f} s simulated in {report.wall_s:.2f} s, "
        f"{report.requests_per_wall_s:.0f} requests per second"
    )
    console.print(render_table(report))
    if len(report.tenants) > MAX_SHOWN_TENANTS:
        said(f"{len(report.tenants) - MAX_SHOWN_TENANTS} more tenants: --json and --html show all")
    said(
        f"{report.replica_s / 3600:.2f} replica-hours, {report.busy_share:.0%} busy; {report.num_steps} steps, "
        f"{report.num_preemptions} preemptions, {report.num_adapter_loads} adapter loads, "
        f"{report.num_lost_replicas} replicas lost"
    )
    said(f"cost model: {report.cost_model}")


def render_table(report: SimulationReport) -> Table:
    """The figures for a terminal: one column for all requests, one per tenant if there are several."""
    table = Table()
    shown = [entry for entry in report.tenants if len(report.tenants) > 1][:MAX_SHOWN_TENANTS]
    summaries = [report.all, *(entry.summary for entry in shown)]
    table.add_column("", no_wrap=True)
    for name in ("all", *(entry.tenant for entry in shown)):
        table.add_column(escape(name), justify="right", overflow="fold")
    table.add_row("requests", *(str(found.num_requests) for found in summaries))
    table.add_row("finished", *(str(found.num_finished) for found in summaries))
    table.add_row("rejected, failed", *(f"{found.num_rejected}, {found.num_failed}" for found in summaries))
    if report.all.num_open:
        table.add_row("not ended", *(str(found.num_open) for found in summaries))
    for latency in ("ttft", "tpot", "e2e"):
        for share in ("p50", "p90", "p99"):
            cells = (_milliseconds(getattr(found, f"{latency}_s"), share) for found in summaries)
            table.add_row(f"{latency.upper() if latency != 'e2e' else latency} {share} ms", *cells)
    table.add_row("attainment", *(f"{found.attainment:.1%}" if found.num_requests else "-" for found in summaries))
    table.add_row("goodput/s", *(f"{found.goodput_rps:.2f}" for found in summaries))
    table.add_row("output tokens/s", *(f"{found.output_tokens_per_s:.1f}" for found in summaries))
    return table


def _milliseconds(entry: Percentiles | None, share: str) -> str:
    return "-" if entry is None else f"{1e3 * getattr(entry, share):.1f}"
