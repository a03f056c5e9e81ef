"""What adapters cost the whole job: time of each popularity against the base alone, in turns.

    python -m benchmarks.engine             # both shapes, 32 requests, 128 in, 64 out; 25 minutes on two cores
    python -m benchmarks.engine --quick     # a tiny model, once, to see that it works

Engines without adapters (``base``), with int8 weights (``base int8``) and with all 32 adapters loaded live in one
process. A popularity's job and the base's run step by step in turns, each on the clock of its own steps: a machine that
is slower for a minute is slower for both, so the tax, 1 - base's time / job's time, is not a difference between two
moments. ``base`` itself is measured the same way, against a second engine like it: what it shows is the method's error.
Floors are of the same minutes: now and then between steps, what memory and arithmetic give is measured (on a GPU, the
kept ceilings count). Steps that overlap (CUDA) cannot take turns; there, whole jobs do.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import assets, ceilings, meter, results, workload
from benchmarks.peers.run import summarize
from benchmarks.roofline import BF16, INT8, Ceilings, Job, job_cost, job_floor_s
from benchmarks.shapes import SHAPES, ModelShape
from benchmarks.workload import Cell
from pomona.cli.build import engine_builder
from pomona.cli.config import load_config
from pomona.core.adapter import AdapterInfo
from pomona.core.errors import ConfigError
from pomona.core.ids import RequestId
from pomona.core.request import Request, SamplingParams
from pomona.driver.loop import EngineParts

_FIRST_LOOKS, _ROUNDS_PER_LOOK = (1, 2), 12
"""Rounds with prompts are long, others short."""


@dataclass
class LoadedEngine:
    """An engine and the workload's adapters that it has loaded."""

    parts: EngineParts
    overlaps_steps: bool
    adapters: list[AdapterInfo]
    num_jobs: int = 0


def load_engine(content: dict[str, Any], num_adapters: int, settings: dict[str, Any]) -> LoadedEngine:
    """An engine for the workload's longest cell, with its first so many adapters."""
    lengths = [cell["num_prompt_tokens"] + cell["num_output_tokens"] for cell in content["cells"].values()]
    common = {"model": content["model"], "max_model_len": max(lengths), "prefix_cache": False}
    config = load_config(common | settings)
    parts = engine_builder(config)()
    adapters = []
    for adapter in content["adapters"][:num_adapters]:
        adapters.append(parts.adapter_host.stage(adapter["path"]))
        parts.engine.register_adapter(adapters[-1])
    overlaps = parts.info.device.startswith("cuda") if config.overlap_steps is None else config.overlap_steps
    return LoadedEngine(parts, overlaps, adapters)


@dataclass
class RunningJob:
    """All requests of a cell in an engine, on the clock of the job's own steps."""

    loaded: LoadedEngine
    cell: dict[str, Any]
    num_output_tokens: int
    clock_s: float = 0.0
    token_ids: dict[RequestId, list[int]] = field(default_factory=dict)
    first_token_s: dict[RequestId, float] = field(default_factory=dict)
    finish_s: dict[RequestId, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        start_s = time.perf_counter()
        self.loaded.num_jobs += 1
        for number, prompt in enumerate(self.cell["prompts"]):
            request_id = RequestId(f"{self.loaded.num_jobs}-{number}")
            index = self.cell["assignment"][number]
            request = Request(
                request_id=request_id,
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=self.num_output_tokens, temperature=0.0),
                arrival_s=time.monotonic(),
                adapter_id=None if index is None else self.loaded.adapters[index].adapter_id,
            )
            self.loaded.parts.engine.add(request)
            self.token_ids[request_id] = []
        self.clock_s = time.perf_counter() - start_s

    def step(self) -> bool:
        """One step; False if all requests had ended before."""
        if len(self.finish_s) == len(self.token_ids):
            return False
        start_s = time.perf_counter()
        outputs = self.loaded.parts.engine.step(time.monotonic())
        self.clock_s += time.perf_counter() - start_s
        for output in outputs:
            if output.new_token_ids:
                self.first_token_s.setdefault(output.request_id, self.clock_s)
                self.token_ids[output.request_id].extend(output.new_token_ids)
            if output.finish_reason is not None:
                self.finish_s[output.request_id] = self.clock_s
        return True

    def result(self) -> dict[str, Any]:
        """As ``peers.session.run_cell`` gives it."""
        assert {len(tokens) for tokens in self.token_ids.values()} == {self.num_output_tokens}
        while self.loaded.parts.engine.has_work:  # the executor is told what to forget
            self.loaded.parts.engine.step(time.monotonic())
        return {
            "wall_s": self.clock_s,
            "first_token_s": [self.first_token_s[request_id] for request_id in self.token_ids],
            "finish_s": [self.finish_s[request_id] for request_id in self.token_ids],
            "token_ids": list(self.token_ids.values()),
        }


def run_in_turns(jobs: Sequence[RunningJob], look: Callable[[], None] = lambda: None) -> None:
    """Run jobs to their ends, a step of each at a time; the first of a round is the last of the next. ``look`` is
    called before some rounds."""
    if any(job.loaded.overlaps_steps for job in jobs):
        for job in jobs:
            while job.step():
                pass
        return
    order = list(jobs)
    for number in itertools.count():
        if number in _FIRST_LOOKS or number % _ROUNDS_PER_LOOK == 0:
            look()
        if not any([job.step() for job in order]):
            return
        order.reverse()


def job_of(cell: Cell) -> Job:
    """The cell as a job for the roofline."""
    return Job(
        num_prompt_tokens=cell.num_prompt_tokens,
        num_output_tokens=cell.num_output_tokens,
        adapters=tuple(workload.assign(cell.popularity, cell.batch)),
        ranks=(workload.LORA_RANK,) * workload.NUM_ADAPTERS,
    )


def row_of(
    shape: ModelShape, cell: Cell, run: dict[str, Any], base_wall_s: float, limits: Ceilings, *, is_int8: bool = False
) -> dict[str, Any]:
    """Measured and least possible time of a job; ``is_int8`` of the base alone with int8 weights."""
    size = INT8 if is_int8 else BF16
    cost, floor_s = job_cost(shape, job_of(cell), size), job_floor_s(shape, job_of(cell), limits, size)
    popularity = workload.BASE_INT8 if is_int8 else cell.popularity
    return {
        "kind": "job",
        "shape": shape.name,
        "cell": f"{cell.name.partition('/')[0]}/{popularity}",
        **asdict(cell),
        "popularity": popularity,
        "quantization": "int8" if is_int8 else "none",
        **summarize(run, cell),
        "base_wall_s": base_wall_s,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "floor_s": floor_s,
        "times_floor": run["wall_s"] / floor_s,
        "ceilings": asdict(limits),
    }


def run_shape(shape: ModelShape, arguments: argparse.Namespace, limits: Ceilings, console: Console) -> None:
    """Measure all popularities of one batch of a shape."""
    assets.make(shape)
    content = json.loads(workload.write(shape).read_text())
    settings = json.loads(arguments.settings)

    base, other = load_engine(content, 0, settings), load_engine(content, 0, settings)
    int8 = load_engine(content, 0, settings | {"quantization": "int8"})
    loaded = load_engine(content, workload.NUM_ADAPTERS, settings)
    cells = [cell for cell in workload.cells() if cell.name.partition("/")[0] == arguments.batch]
    [alone] = [cell for cell in cells if cell.popularity == "base"]
    todo = [(other, alone), (int8, alone), *((loaded, cell) for cell in cells if cell is not alone)]
    if arguments.popularity:
        todo = [(engine, cell) for engine, cell in todo if cell.popularity in arguments.popularity]

    probe = None if base.parts.info.device.startswith("cuda") else ceilings.Probe(is_quick=arguments.quick)
    looks: list[Ceilings] = []

    def look() -> None:
        if probe is not None:
            looks.append(probe.measure())

    def run(engine: LoadedEngine, cell: Cell, num_output_tokens: int) -> tuple[RunningJob, RunningJob]:
        ours = RunningJob(engine, content["cells"][cell.name], num_output_tokens)
        theirs = RunningJob(base, content["cells"][alone.name], num_output_tokens)
        looks.clear()
        run_in_turns((ours, theirs), look)
        return ours, theirs

    setup = results.setup(settings=settings)
    for engine, cell in todo:
        for job in run(engine, cell, 4):
            job.result()
    with Progress(console=console) as progress:
        task = progress.add_task(shape.name, total=arguments.repeats * len(todo))
        for repetition in range(arguments.repeats):
            for engine, cell in todo:
                progress.update(task, description=f"{shape.name} {cell.name}")
                if not arguments.accept_noise:
                    meter.wait_until_quiet()
                with meter.Meter() as clock:
                    ours, theirs = run(engine, cell, cell.num_output_tokens)
                noise = clock.disturbance
                base_wall_s = theirs.result()["wall_s"]
                beside = ceilings.mean(looks) if looks else limits
                row = row_of(shape, cell, ours.result(), base_wall_s, beside, is_int8=engine is int8)
                row |= {"repetition": repetition, **asdict(noise), "is_clean": noise.is_clean}
                results.append(arguments.output, {**setup, **row})
                console.print(
                    f"{'ok ' if noise.is_clean else 'BAD'} {shape.name} {row['cell']:22} "
                    f"{row['output_tokens_per_s']:8.1f} tok/s, {row['times_floor']:5.2f} times the floor, "
                    f"{1 - base_wall_s / row['wall_s']:+.1%} slower than the base",
                    highlight=False,
                )
                progress.advance(task)


def _settings(parser: argparse.ArgumentParser, text: str) -> dict[str, Any]:
    """The engine's settings; exits with a message if they are none."""
    try:
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ConfigError("must be a JSON object")
        load_config(settings)
        for name in ("dtype", "quantization"):
            if name in settings:
                raise ConfigError(f"{name} is not to be set: floors are of bfloat16 and, for `base int8`, of int8")
    except (ValueError, ConfigError) as error:
        parser.error(f"--settings {text}: {error}")
    return settings


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: the two of the comparison")
    batches = dict.fromkeys(cell.name.partition("/")[0] for cell in workload.cells())
    parser.add_argument("--batch", choices=batches, default="b32-128-64", help="of the workload; default b32-128-64")
    parser.add_argument("--popularity", choices=workload.POPULARITIES, action="append", help="only these; repeatable")
    parser.add_argument("--settings", default="{}", help="JSON object of the engine's settings")
    parser.add_argument("--graphs", choices=("on", "off"), help="replay decode steps (CUDA); default: its own choice")
    parser.add_argument("--overlap", choices=("on", "off"), help="overlap steps (CUDA); default: its own choice")
    results.add_arguments(parser, "engine")
    arguments = results.parse(parser, "engine", words)
    switches = {"decode_graphs": arguments.graphs, "overlap_steps": arguments.overlap}
    chosen = {name: choice == "on" for name, choice in switches.items() if choice is not None}
    arguments.settings = json.dumps(_settings(parser, arguments.settings) | chosen)
    console = Console(soft_wrap=True)
    limits = ceilings.current(console, is_quick=arguments.quick)
    for name in arguments.shape or ("smollm2-135m", "qwen2.5-0.5b"):
        run_shape(SHAPES[name], arguments, limits, console)


if __name__ == "__main__":
    main()
