"""What adapters cost the whole job: output tokens per second of each popularity against the base alone.

    python -m benchmarks.engine             # both shapes, 32 requests, 128 in, 64 out; 5 minutes on two cores
    python -m benchmarks.engine --quick     # a tiny model, once, to see that it works

Three engines in one process take turns in every repetition: one without adapters (``base``), the same with int8 weights
(``base int8``), and one with all 32 adapters loaded. So the tax, 1 - throughput / base throughput of the same
repetition, is not a difference between two afternoons.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import assets, ceilings, meter, results, workload
from benchmarks.peers.run import summarize
from benchmarks.peers.run_pomona import PomonaRunner
from benchmarks.peers.session import load_work, run_cell
from benchmarks.roofline import BF16, INT8, Ceilings, Job, job_cost, job_floor_s
from benchmarks.shapes import SHAPES, ModelShape
from benchmarks.workload import Cell


def job_of(cell: Cell) -> Job:
    """The cell as a job for the roofline."""
    return Job(
        num_prompt_tokens=cell.num_prompt_tokens,
        num_output_tokens=cell.num_output_tokens,
        adapters=tuple(workload.assign(cell.popularity, cell.batch)),
        ranks=(workload.LORA_RANK,) * workload.NUM_ADAPTERS,
    )


def row_of(
    shape: ModelShape, cell: Cell, run: dict[str, Any], limits: Ceilings, *, is_int8: bool = False
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

    def runner(num_adapters: int, **more: str) -> PomonaRunner:
        return PomonaRunner(load_work(content, num_adapters, settings | more))

    base, int8, loaded = runner(0), runner(0, quantization="int8"), runner(workload.NUM_ADAPTERS)
    cells = [cell for cell in workload.cells() if cell.name.partition("/")[0] == arguments.batch]
    alone = [cell for cell in cells if cell.popularity == "base"]
    todo = [(running, cell) for cell in alone for running in (base, int8)]
    todo += [(loaded, cell) for cell in cells if cell not in alone]
    setup = results.setup(settings=settings)
    for running, cell in todo:
        run_cell(running, content["cells"][cell.name], 4)
    with Progress(console=console) as progress:
        task = progress.add_task(shape.name, total=arguments.repeats * len(todo))
        for repetition in range(arguments.repeats):
            for running, cell in todo:
                progress.update(task, description=f"{shape.name} {cell.name}")
                if not arguments.accept_noise:
                    meter.wait_until_quiet()
                with meter.Meter() as clock:
                    run = run_cell(running, content["cells"][cell.name])
                noise = clock.disturbance
                row = row_of(shape, cell, run, limits, is_int8=running is int8)
                row |= {"repetition": repetition, **asdict(noise), "is_clean": noise.is_clean}
                results.append(arguments.output, {**setup, **row})
                console.print(
                    f"{'ok ' if noise.is_clean else 'BAD'} {shape.name} {row['cell']:22} "
                    f"{row['output_tokens_per_s']:8.1f} tok/s, {row['times_floor']:5.2f} times the floor",
                    highlight=False,
                )
                progress.advance(task)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: the two of the comparison")
    parser.add_argument("--batch", default="b32-128-64", help="which batch of the workload; default b32-128-64")
    parser.add_argument("--settings", default="{}", help="JSON object of settings of LLM")
    parser.add_argument("--graphs", choices=("on", "off"), help="replay decode steps (CUDA); default: LLM's own choice")
    parser.add_argument("--overlap", choices=("on", "off"), help="overlap steps (CUDA); default: LLM's own choice")
    results.add_arguments(parser, "engine")
    arguments = results.parse(parser, "engine", words)
    switches = {"decode_graphs": arguments.graphs, "overlap_steps": arguments.overlap}
    chosen = {name: choice == "on" for name, choice in switches.items() if choice is not None}
    arguments.settings = json.dumps(json.loads(arguments.settings) | chosen)
    console = Console(soft_wrap=True)
    limits = ceilings.current(console, is_quick=arguments.quick)
    for name in arguments.shape or ("smollm2-135m", "qwen2.5-0.5b"):
        run_shape(SHAPES[name], arguments, limits, console)


if __name__ == "__main__":
    main()
