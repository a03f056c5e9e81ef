"""A benchmark on the terminal: a progress bar while it runs, a table when it is done."""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeGuard

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pomona.bench.percentiles import Percentiles
from pomona.bench.report import LATE_SEND_S, BenchReport, RunSummary
from pomona.bench.serve import BenchProgress

_NEGLIGIBLE_S = 0.002
"""The resolution of timers: lateness below it is nobody's fault."""


class ProgressBar:
    """Shows BenchProgress; pass it to ``run_serve_bench`` inside a ``with`` block."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on ``console``, or on standard error, which leaves standard output to the results."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[news]}"), console=console or Console(stderr=True))
        self._task_ids: dict[tuple[str, bool], TaskID] = {}

    def __enter__(self) -> "ProgressBar":
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing; finished bars stay visible."""
        self._progress.stop()

    def __call__(self, progress: BenchProgress) -> None:
        """Draw one step of progress."""
        key = (progress.popularity, progress.is_warmup)
        if key not in self._task_ids:
            name = f"{progress.popularity} (warm-up)" if progress.is_warmup else progress.popularity
            self._task_ids[key] = self._progress.add_task(f"{name:<20}", total=progress.num_requests, news="")
        news = f"{progress.num_output_tokens} tokens"
        if progress.num_failed:
            news += f", [red]{progress.num_failed} failed[/red]"
        self._progress.update(self._task_ids[key], completed=progress.num_done, news=news)


def render_table(report: BenchReport) -> RenderableType:
    """Return a table, one column per popularity, with what to be careful about beneath it; print with rich."""
    config = report.setup.config
    rate = "all at once" if config.request_rate_per_s == float("inf") else f"{config.request_rate_per_s:g} requests/s"
    title = f"{report.setup.base_model} at {config.base_url}, {config.num_requests} requests, {rate}"
    table = Table()
    table.add_column("client-side", no_wrap=True)
    for run in report.runs:
        table.add_column(run.summary.popularity, justify="right", no_wrap=True)
    for name, cell in _rows(report):
        table.add_row(name, *(cell(run.summary) for run in report.runs))
    return Group(
        Text(title, style="bold"), table, *(Text(f"! {caution}", style="yellow") for caution in cautions(report))
    )


def _rows(report: BenchReport) -> Iterator[tuple[str, Callable[[RunSummary], str]]]:
    yield "models asked for", lambda run: str(run.num_models)
    yield "completed", lambda run: f"{run.num_completed}/{run.num_requests}"
    yield "output tokens/s", lambda run: f"{run.output_tokens_per_s:.1f}"
    if report.base_run is not None:
        yield "  over base only", lambda run: _number(report.throughput_ratio(run), "{:.2f}x")
    yield "requests/s", lambda run: f"{run.requests_per_s:.2f}"
    latencies: tuple[tuple[str, Callable[[RunSummary], Percentiles | None]], ...] = (
        ("TTFT", lambda run: run.ttft_s),
        ("ITL", lambda run: run.itl_s),
        ("TPOT", lambda run: run.tpot_s),
        ("e2e", lambda run: run.e2e_s),
    )
    for name, latency in latencies:
        for share in ("p50", "p90", "p99"):
            yield f"{name} {share} ms", _milliseconds(latency, share)
    if report.setup.config.slo is not None:
        yield "attainment", lambda run: _number(run.attainment, "{:.1%}")
        yield "goodput/s", lambda run: _number(run.goodput_per_s, "{:.2f}")
    yield "most in flight", lambda run: str(run.max_in_flight)
    yield f"sent >{1e3 * LATE_SEND_S:.0f} ms late", lambda run: str(run.num_late_sends)


def _milliseconds(latency: Callable[[RunSummary], Percentiles | None], share: str) -> Callable[[RunSummary], str]:
    def cell(run: RunSummary) -> str:
        percentiles = latency(run)
        return "-" if percentiles is None else f"{1e3 * getattr(percentiles, share):.1f}"

    return cell


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _is_material(own_delay: Percentiles | None, latency: Percentiles | None) -> TypeGuard[Percentiles]:
    """True if the client's own delay at p99 is more than a tenth of the typical latency that it distorts."""
    if own_delay is None or own_delay.p99 <= _NEGLIGIBLE_S:
        return False
    return latency is None or own_delay.p99 > 0.1 * latency.p50


def cautions(report: BenchReport) -> list[str]:
    """Return what a reader must know before believing the numbers; empty when there is nothing."""
    notes = []
    if not report.setup.is_prompt_length_exact:
        notes.append("prompts are words (no usable /tokenize): their lengths in tokens are only near what was asked")
    for run in (run.summary for run in report.runs):
        for kind, count, message in run.errors:
            notes.append(f"{run.popularity}: {count} x {kind}: {message}")
        if _is_material(run.send_lateness_s, run.ttft_s):
            notes.append(
                f"{run.popularity}: the client sent {run.num_late_sends} of {run.num_requests} requests more than "
                f"{1e3 * LATE_SEND_S:.0f} ms late (at most {1e3 * run.send_lateness_s.max:.0f} ms); "
                "TTFT and e2e include it, the offered load is less than asked"
            )
        if _is_material(run.loop_lag_s, run.itl_s):
            notes.append(
                f"{run.popularity}: the client itself lagged by {1e3 * run.loop_lag_s.p99:.1f} ms at p99; "
                "it needs a core of its own"
            )
        if run.tokens_per_event > 1.05:
            notes.append(
                f"{run.popularity}: {run.tokens_per_event:.2f} tokens per event; ITL is 0 between tokens of one event"
            )
        if 0.0 < run.tokens_per_event < 0.95:
            notes.append(f"{run.popularity}: the server streams events without a token; TTFT may be too small")
        if run.num_cached_tokens > 0.01 * run.num_prompt_tokens:
            share = run.num_cached_tokens / run.num_prompt_tokens
            notes.append(f"{run.popularity}: {share:.0%} of the prompt tokens came from the prefix cache")
    return notes
