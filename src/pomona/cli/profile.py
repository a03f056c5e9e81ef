"""``pomona profile``: measures what steps cost on the real engine, and writes it down for ``pomona simulate``."""

import datetime
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import pomona
from pomona.bench.machine import describe_hardware, find_commit
from pomona.cli.build import engine_builder, load_all
from pomona.cli.config import AppConfig
from pomona.cli.hub import model_name
from pomona.core.adapter import AdapterInfo
from pomona.core.errors import ConfigError
from pomona.core.interfaces import Executor
from pomona.driver.loop import EngineParts
from pomona.profiling.fit import FormError
from pomona.profiling.measure import MeteredExecutor, PointMeter
from pomona.profiling.points import candidates
from pomona.profiling.profile import ProfileLimits, ProfileOutcome, ProfileProgress, run_profile
from pomona.sim.profile_file import AdapterSize, CostProfile, ErrorEntry, ReplicaSize, TermEntry


def run_profile_command(config: AppConfig, limits: ProfileLimits, output: Path) -> None:
    """Measure, show what was found, write the file."""
    if output.suffix != ".json" or not output.parent.is_dir():
        raise ConfigError(f"--output {output}: must be a .json file in a folder that exists")
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        raise ConfigError(f"--output {output}: cannot be written; name another file")
    console = Console(stderr=True, emoji=False)
    parts, executor, adapters = build_metered(config)
    outcome = measure(parts, executor, adapters, limits, console)
    profile = describe(config, parts, adapters, outcome)
    output.write_text(profile.to_json())
    console.print(render(profile))
    stopped = f"Stopped after {outcome.num_points} points: {outcome.reason}. Written to {output}."
    console.print(stopped, soft_wrap=True, markup=False)


def build_metered(config: AppConfig) -> tuple[EngineParts, MeteredExecutor, tuple[AdapterInfo, ...]]:
    """The engine of these settings, its executor, and all its adapters, registered. It steps as simulated engines do,
    which wait for copies of adapters, and takes every batch that is measured."""
    config = config.model_copy(
        update={
            "adapter_loading": "on_demand",
            "fairness": "fcfs",
            "max_step_s": None,
            "max_waiting": max(config.max_waiting, config.max_num_seqs),
        }
    )
    metered: list[MeteredExecutor] = []

    def wrap(executor: Executor) -> Executor:
        metered.append(MeteredExecutor(executor))
        return metered[0]

    parts = replace(engine_builder(config), wrap=wrap)()
    adapters: dict[str, AdapterInfo] = {}

    def load(name: str, folder: str) -> None:
        info = parts.adapter_host.stage(folder)
        parts.engine.register_adapter(info)
        adapters[info.adapter_id] = info

    load_all(config, load)
    return parts, metered[0], tuple(adapters.values())


def measure(
    parts: EngineParts,
    executor: MeteredExecutor,
    adapters: tuple[AdapterInfo, ...],
    limits: ProfileLimits,
    console: Console,
) -> ProfileOutcome:
    """Run the profile under a progress bar."""
    meter = PointMeter(parts.engine, executor, adapters, parts.info.vocab_size)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[news]}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("profile", total=limits.max_points, news="warming up")

        def report(progress: ProfileProgress) -> bool:
            point = progress.point
            news = (
                f"expected error {progress.expected_error or 0:.1%}; {point.num_decodes} decodes at "
                f"{point.num_context_tokens}, {point.num_prompts} x {point.num_prompt_tokens}, "
                f"{len(point.adapters)} adapters"
            )
            bar.update(task, completed=progress.num_points, news=news)
            return False

        return run_profile(meter, candidates(parts.engine.config, adapters), limits, report)


def describe(
    config: AppConfig, parts: EngineParts, adapters: tuple[AdapterInfo, ...], outcome: ProfileOutcome
) -> CostProfile:
    """The outcome as a file's content."""
    fitted, engine = outcome.fit, parts.engine.config
    sizes = {(info.lora_rank, info.num_pages, info.num_host_bytes) for info in adapters}
    return CostProfile(
        model=model_name(config.model),
        dtype=parts.info.precision,
        device=parts.info.device,
        hardware=describe_hardware(),
        commit=find_commit(),
        pomona_version=pomona.__version__,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        replica=ReplicaSize(**{name: getattr(engine, name) for name in ReplicaSize.model_fields}),
        adapters=tuple(
            AdapterSize(lora_rank=lora_rank, num_pages=num_pages, num_host_bytes=num_bytes)
            for lora_rank, num_pages, num_bytes in sorted(sizes)
        ),
        step_s=fitted.cost.step_s,
        terms=tuple(
            TermEntry(
                quantity=term.quantity,
                seconds_each=term.seconds_each,
                above=term.above,
                up_to=None if term.up_to == math.inf else term.up_to,
                beside_rows=None if term.beside_rows == math.inf else term.beside_rows,
            )
            for term in fitted.cost.terms
        ),
        error=_entry(fitted.error),
        tried=tuple(_entry(error) for error in fitted.tried),
        num_points=outcome.num_points,
        num_samples=len(outcome.samples),
        measuring_s=round(outcome.elapsed_s, 3),
    )


def _entry(error: FormError) -> ErrorEntry:
    return ErrorEntry(**asdict(error))


def render(profile: CostProfile) -> Table:
    """The fitted model for people: microseconds per unit."""
    error = profile.error
    table = Table(
        title=f"{escape(profile.model)} on {escape(profile.hardware)}: {error.dense}, adapters by {error.adapters}\n"
        f"held-out error p50 {error.p50:.1%}, p90 {error.p90:.1%}, max {error.max:.1%}"
    )
    table.add_column("quantity")
    table.add_column("counts between")
    table.add_column("µs each", justify="right")
    table.add_row("step", "", f"{1e6 * profile.step_s:.1f}")
    for term in profile.terms:
        bounds = "" if not term.above and term.up_to is None else f"{term.above:g} and {term.up_to or 'any'}"
        if term.beside_rows is not None:
            bounds = f"in steps of up to {term.beside_rows:g} rows"
        table.add_row(term.quantity, bounds, f"{1e6 * term.seconds_each:.3f}")
    return table
