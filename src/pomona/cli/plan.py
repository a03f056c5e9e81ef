"""``pomona plan``: reads the spec and what it names, shows every simulation, prints the plan."""

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from pomona.cli.simulate import read_lines, read_toml, warn_beyond
from pomona.core.errors import ConfigError
from pomona.sim.plan_report import plan_json, plan_text
from pomona.sim.plan_search import Plan, PlanSearch, Trial, TrialOutcome
from pomona.sim.plan_spec import PlanSpec, parse_plan
from pomona.sim.plan_trial import TrialRunner
from pomona.sim.population import AdapterPages


def run_plan(spec_file: Path, *, as_json: bool) -> None:
    """Plan, and print the plan to stdout.

    Raises:
        ConfigError: the spec, or a file that it names, is wrong, or nothing it allows meets the objectives.
    """
    spec = load_plan_spec(spec_file)
    try:
        runner = TrialRunner(spec, lambda name: read_lines(name, spec_file.parent))
        console = Console(stderr=True)
        warn_beyond(runner.beyond_profile, console)
        plan = search(spec, runner, console)
    except ConfigError as error:
        raise ConfigError(f"{spec_file}: {error}") from error
    replica = runner.cluster_config(plan.settings).scheduler
    pages = AdapterPages(spec.simulation.replica.rows_per_page)
    text = plan_json(plan, replica, pages) if as_json else plan_text(plan, replica, pages, spec.plan.min_attainment)
    sys.stdout.write(text + "\n")


def load_plan_spec(spec_file: Path) -> PlanSpec:
    """Read and check a spec.

    Raises:
        ConfigError: it cannot be read, or says something wrong; names the key.
    """
    return parse_plan(read_toml(spec_file), str(spec_file))


def search(spec: PlanSpec, runner: TrialRunner, console: Console) -> Plan:
    """Search with a line per simulation on the console."""
    with Progress(SpinnerColumn(), TextColumn("simulating"), TimeElapsedColumn(), console=console) as progress:
        progress.add_task("simulating", total=None)

        def note(trial: Trial, outcome: TrialOutcome) -> None:
            progress.console.print(f"{describe(trial)}: {outcome.attainment:.1%}", highlight=False)

        return PlanSearch(spec.space, runner, note).run()


def describe(trial: Trial) -> str:
    """A trial in words."""
    settings = trial.settings
    parts = [f"replicas {settings.num_replicas:3d}", settings.policy]
    if settings.adapter_share is not None:
        parts.append(f"adapter share {settings.adapter_share:g}")
    if trial.relaxation != "none":
        parts.append(f"plentiful {trial.relaxation}")
    if trial.rate_scale != 1.0:
        parts.append(f"rate x {trial.rate_scale:g}")
    if trial.is_whole:
        parts.append("whole workload")
    return ", ".join(parts)
