"""``pomona plan``: reads the spec and its trace, shows progress, prints the plan."""

import gzip
import importlib.resources
import sys
import tomllib
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pomona.core.errors import ConfigError
from pomona.sim.plan_report import plan_json, plan_text
from pomona.sim.plan_search import Plan, PlanSearch, Trial, TrialOutcome
from pomona.sim.plan_spec import PlanSpec, WorkloadPart
from pomona.sim.plan_trial import TrialRunner
from pomona.workload.popularity import ZipfPopularity
from pomona.workload.spec import WorkloadRequest
from pomona.workload.traces import READERS, TraceSelection, compose


def run_plan(path: Path, *, as_json: bool) -> None:
    """Plan, and print the plan to stdout."""
    spec = read_spec(path)
    workload = read_workload(spec, path.parent)
    plan = search(spec, workload, Console(stderr=True))
    sys.stdout.write((plan_json(spec, plan) if as_json else plan_text(spec, plan)) + "\n")


def read_spec(path: Path) -> PlanSpec:
    """Read a TOML file.

    Raises:
        ConfigError: it cannot be read, or a field is wrong; names the field.
    """
    try:
        fields = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    return PlanSpec.parse(fields, str(path))


def trace_lines(part: WorkloadPart, folder: Path) -> list[str]:
    """Lines of a trace, gzipped or not: a path relative to the spec, or a sample of the package.

    Raises:
        ConfigError: there is no such file.
    """
    sample = importlib.resources.files("pomona.workload") / "data" / part.trace
    path = folder / part.trace
    try:
        content = path.read_bytes() if path.exists() else sample.read_bytes()
        return (gzip.decompress(content) if part.trace.endswith(".gz") else content).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"workload.trace is {part.trace!r}: {error}") from error


def read_workload(spec: PlanSpec, folder: Path) -> list[WorkloadRequest]:
    """The spec's requests: recorded arrivals and lengths, sampled adapters.

    Raises:
        ConfigError: the trace is missing, malformed, unsorted or empty.
    """
    part = spec.workload
    try:
        rows = READERS[part.format](trace_lines(part, folder))
        selection = TraceSelection(
            part.start_s, part.duration_s, part.speed, max_prompt_tokens=spec.replica.max_model_len - 1
        )
        chosen = selection.apply(rows)
    except ConfigError as error:
        if str(error).startswith("workload."):
            raise
        raise ConfigError(f"workload.trace {part.trace!r}: {error}") from error
    popularity = ZipfPopularity(spec.adapters.num_adapters, spec.adapters.zipf_alpha)
    return list(compose(chosen, popularity, seed=part.seed))


def search(spec: PlanSpec, workload: list[WorkloadRequest], console: Console) -> Plan:
    """Search with a line per simulation on the console."""
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("simulating", total=None)

        def note(trial: Trial, outcome: TrialOutcome) -> None:
            settings = trial.settings
            progress.console.print(
                f"replicas {settings.num_replicas:3d}, {settings.policy}, adapter share {settings.adapter_share:g}"
                f"{'' if trial.relaxation == 'none' else f', plentiful {trial.relaxation}'}"
                f"{'' if trial.rate_scale == 1.0 else f', rate x {trial.rate_scale:g}'}"
                f"{', whole workload' if trial.is_whole else ''}: {outcome.attainment:.1%}",
                highlight=False,
            )
            progress.update(task, advance=1)

        return PlanSearch(spec.space, TrialRunner(spec, workload), note).run()
