"""The engine's step beside its floor: decode steps of 1, 8 and 32 sequences, and a step full of prompts.

    python -m benchmarks.step                          # both shapes of the comparison; 10 minutes on two cores
    python -m benchmarks.step --quick                  # a tiny model, once, to see that it works
    python -m benchmarks.step --profile                # also where the time goes, by function

Mixes of adapters take turns, in every repetition anew. ``base`` is an engine that has no adapters; in ``idle`` all are
loaded and resident but none is asked for; ``base int8`` is ``base`` with int8 weights. Rows have FLOPs, bytes and the
floor under the machine's measured ceilings.
"""

import argparse
import cProfile
import pstats
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import assets, ceilings, meter, results, tables, workload
from benchmarks.roofline import BF16, INT8, Ceilings, SequenceWork, step_cost
from benchmarks.shapes import SHAPES, ModelShape
from pomona.cli.build import engine_builder
from pomona.cli.config import load_config
from pomona.core.ids import AdapterId, RequestId
from pomona.core.request import Request, SamplingParams
from pomona.driver.loop import EngineParts

BATCHES = (1, 8, 32)
NUM_PROMPT_TOKENS = 128
PREFILL_ROWS = 2048
MIN_BLOCK_S = 0.5
"""A repetition times at least this much decoding, unless MAX_STEPS come first."""
MAX_STEPS = 64
MIN_STEPS = 8
_MAX_OUTPUT_TOKENS = MAX_STEPS + 8


@dataclass(frozen=True, slots=True)
class Mix:
    """Which adapters the sequences of a batch use."""

    name: str
    adapters: tuple[str | None, ...]
    """Folder name of each sequence's adapter."""

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by adapter, read from the names: r16-03 has 16."""
        return {name: int(name[1:].partition("-")[0]) for name in self.adapters if name is not None}


def mixes(batch: int) -> list[Mix]:
    """The mixes of a batch size."""
    found = []
    for popularity in workload.POPULARITIES:
        assigned = workload.assign(popularity, batch)
        names = tuple(None if index is None else workload.adapter_name(index) for index in assigned)
        if batch > 1 or popularity in ("base", "idle", "identical"):
            found.append(Mix(popularity, names))
    found.insert(1, Mix(workload.BASE_INT8, (None,) * batch))
    if batch > 1:
        small = [workload.adapter_name(index, 4) for index in range(batch)]
        found.append(Mix(tables.ALL_SMALL, tuple(small)))
        found.append(Mix(tables.ONE_LARGE, (workload.adapter_name(0, 128), *small[1:])))
    return found


class Bench:
    """An engine of a shape with its adapters, and batches run through it.

    Args:
        shape: which model; its assets are there.
        adapters: names of the adapter folders to load.
        quantization: of the base's weights, none or int8.
    """

    def __init__(self, shape: ModelShape, adapters: Sequence[str], quantization: str = "none") -> None:
        root = workload.cache_dir() / shape.name
        settings: dict[str, Any] = {"model": str(root / "model"), "max_model_len": 1024, "kv_cache_bytes": 2 << 30}
        settings["quantization"] = quantization
        self._parts: EngineParts = engine_builder(load_config(settings))()
        self._shape = shape
        self._num_requests = 0
        self._rng = random.Random(workload.SEED)
        self._prompts = workload.prompts(shape, max(BATCHES), NUM_PROMPT_TOKENS)
        self._ids: dict[str | None, AdapterId | None] = {None: None}
        for name in adapters:
            info = self._parts.adapter_host.stage(str(root / "adapters" / name))
            self._parts.engine.register_adapter(info)
            self._ids[name] = info.adapter_id

    @property
    def dtype(self) -> str:
        """What the engine computes in."""
        return self._parts.info.dtype

    def _add(self, adapters: Sequence[str | None], prompts: Sequence[Sequence[int]]) -> list[RequestId]:
        """Add one request per adapter."""
        request_ids = []
        for adapter, prompt in zip(adapters, prompts, strict=True):
            self._num_requests += 1
            request = Request(
                request_id=RequestId(f"step-{self._num_requests}"),
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=_MAX_OUTPUT_TOKENS, temperature=0.0),
                arrival_s=time.monotonic(),
                adapter_id=self._ids[adapter],
            )
            self._parts.engine.add(request)
            request_ids.append(request.request_id)
        return request_ids

    def _start(self, mix: Mix) -> list[RequestId]:
        """Add the mix's requests and step until all of them decode."""
        request_ids = self._add(mix.adapters, self._prompts[: len(mix.adapters)])
        starting = set(request_ids)
        while starting:
            outputs = self._parts.engine.step(time.monotonic())
            starting -= {output.request_id for output in outputs if output.new_token_ids}
        for _ in range(2):
            self._parts.engine.step(time.monotonic())
        return request_ids

    def _end(self, request_ids: Sequence[RequestId]) -> None:
        for request_id in request_ids:
            self._parts.engine.abort(request_id)
        while self._parts.engine.has_work:  # the executor is told what to forget
            self._parts.engine.step(time.monotonic())

    def decode(self, mix: Mix) -> tuple[list[float], float]:
        """Times of decode steps, seconds; and the mean context of a sequence in them. Prompts are found in the prefix
        cache from the second time on."""
        request_ids = self._start(mix)
        first_context = NUM_PROMPT_TOKENS + 3  # two tokens of _start's own steps, and this step's
        times_s: list[float] = []
        while len(times_s) < MIN_STEPS or (sum(times_s) < MIN_BLOCK_S and len(times_s) < MAX_STEPS):
            start_s = time.perf_counter()
            self._parts.engine.step(time.monotonic())
            times_s.append(time.perf_counter() - start_s)
        self._end(request_ids)
        return times_s, first_context + (len(times_s) - 1) / 2

    def prefill(self, mix: Mix) -> list[float]:
        """The time of one step that computes all prompts, each new to the prefix cache."""
        tokens = range(256, self._shape.vocab_size)
        prompts = [self._rng.choices(tokens, k=NUM_PROMPT_TOKENS) for _ in mix.adapters]
        request_ids = self._add(mix.adapters, prompts)
        start_s = time.perf_counter()
        self._parts.engine.step(time.monotonic())
        elapsed_s = time.perf_counter() - start_s
        self._end(request_ids)
        return [elapsed_s]

    def profile(self, mix: Mix, num_steps: int = 20) -> list[dict[str, Any]]:
        """Where decode steps spend their time: functions by own time per step."""
        request_ids = self._start(mix)
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(num_steps):
            self._parts.engine.step(time.monotonic())
        profiler.disable()
        self._end(request_ids)
        rows: list[dict[str, Any]] = []
        stats: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
        for (file, _, function), (_, num_calls, own_s, total_s, _) in stats.items():
            module = file.rpartition("/pomona/")[2].removesuffix(".py").replace("/", ".") if "/" in file else "builtin"
            rows.append(
                {
                    "function": f"{module}.{function}",
                    "calls_per_step": num_calls / num_steps,
                    "own_ms_per_step": 1e3 * own_s / num_steps,
                    "total_ms_per_step": 1e3 * total_s / num_steps,
                }
            )
        return sorted(rows, key=lambda row: -float(row["own_ms_per_step"]))[:25]


def work_of(mix: Mix, num_new_tokens: int, context: float) -> tuple[list[SequenceWork], list[int]]:
    """The step's sequences for the roofline, and the ranks of their adapters."""
    names = list(mix.ranks)
    sequences = [
        SequenceWork(num_new_tokens, round(context), None if name is None else names.index(name))
        for name in mix.adapters
    ]
    return sequences, list(mix.ranks.values())


def row_of(
    shape: ModelShape, phase: str, mix: Mix, times_s: list[float], context: float, limits: Ceilings
) -> dict[str, Any]:
    """Measured and least possible time of a step."""
    sequences, ranks = work_of(mix, NUM_PROMPT_TOKENS if phase == "prefill" else 1, context)
    is_int8 = mix.name == workload.BASE_INT8
    cost = step_cost(shape, sequences, ranks, INT8 if is_int8 else BF16)
    median_s = statistics.median(times_s)
    return {
        "kind": "step",
        "shape": shape.name,
        "phase": phase,
        "batch": len(mix.adapters),
        "mix": mix.name,
        "quantization": "int8" if is_int8 else "none",
        "num_steps": len(times_s),
        "mean_context": context,
        "step_ms": 1e3 * median_s,
        "step_ms_min": 1e3 * min(times_s),
        "flops": cost.flops,
        "bytes": cost.bytes,
        "floor_ms": 1e3 * limits.floor_s(cost),
        "bound": limits.bound(cost),
        "times_floor": median_s / limits.floor_s(cost),
        "ceilings": asdict(limits),
    }


def cases(batches: Sequence[int], prefill_rows: int) -> list[tuple[str, Mix]]:
    """(phase, mix) of everything to time."""
    found = [("decode", mix) for batch in batches for mix in mixes(batch)]
    num_prompts = prefill_rows // NUM_PROMPT_TOKENS
    chosen = ("base", workload.BASE_INT8, "idle", "identical", "distinct")
    return found + [("prefill", mix) for mix in mixes(num_prompts) if mix.name in chosen]


def run_shape(shape: ModelShape, arguments: argparse.Namespace, console: Console) -> None:
    """Time all cases of a shape."""
    assets.make(shape)
    bare = {"base": Bench(shape, ()), workload.BASE_INT8: Bench(shape, (), "int8")}
    todo = cases(arguments.batch or BATCHES, PREFILL_ROWS)
    todo = [(phase, mix) for phase, mix in todo if mix.name in (arguments.mix or [mix.name])]
    todo = [(phase, mix) for phase, mix in todo if phase in (arguments.phase or phase)]
    loaded = bare["base"]
    if any(mix.name not in bare for _, mix in todo):
        loaded = Bench(shape, [folder.name for folder, _, _ in assets.adapter_folders(shape)])
    setup = results.setup(dtype=bare["base"].dtype)
    probe = ceilings.Probe(is_quick=arguments.quick)
    for _, mix in todo:  # warm up: adapters become resident, prompts cached, kernels and buffers made
        bare.get(mix.name, loaded).decode(mix)
    with Progress(console=console) as progress:
        task = progress.add_task(shape.name, total=arguments.repeats * len(todo))
        for repeat in range(arguments.repeats):
            for phase, mix in todo:
                progress.update(task, description=f"{shape.name} {phase} {len(mix.adapters)} {mix.name}")
                bench = bare.get(mix.name, loaded)
                if not arguments.accept_noise:
                    meter.wait_until_quiet()
                before = probe.measure()
                with meter.Meter() as clock:
                    if phase == "decode":
                        times_s, context = bench.decode(mix)
                    else:
                        times_s, context = bench.prefill(mix), float(NUM_PROMPT_TOKENS)
                noise = clock.disturbance
                limits = ceilings.mean((before, probe.measure()))
                row = row_of(shape, phase, mix, times_s, context, limits)
                row |= {"repetition": repeat, **asdict(noise), "is_clean": noise.is_clean}
                results.append(arguments.output, {**setup, **row})
                console.print(
                    f"{'ok ' if noise.is_clean else 'BAD'} {shape.name} {phase} {len(mix.adapters):3} {mix.name:14} "
                    f"{row['step_ms']:8.2f} ms, floor {row['floor_ms']:7.2f} ms, {row['times_floor']:5.2f} times",
                    highlight=False,
                )
                progress.advance(task)
    if arguments.profile:
        for mix in mixes(32):
            if mix.name in ("base", "distinct"):
                functions = bare.get(mix.name, loaded).profile(mix)
                profile = {"kind": "step_profile", "shape": shape.name, "batch": 32, "mix": mix.name}
                results.append(arguments.output, {**setup, **profile, "functions": functions})


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: the two of the comparison")
    sizes = range(1, max(BATCHES) + 1)
    parser.add_argument(
        "--batch", type=int, choices=sizes, metavar="N", action="append", help="up to 32; repeatable; default: 1, 8, 32"
    )
    parser.add_argument("--phase", choices=("decode", "prefill"), help="default: both")
    names = [mix.name for mix in mixes(max(BATCHES))]
    parser.add_argument("--mix", choices=names, action="append", help="repeatable; default: all")
    results.add_arguments(parser, "step")
    parser.add_argument("--profile", action="store_true", help="also where decode steps of 32 spend their time")
    arguments = results.parse(parser, "step", words)
    console = Console(soft_wrap=True)
    for name in arguments.shape or ("smollm2-135m", "qwen2.5-0.5b"):
        run_shape(SHAPES[name], arguments, console)


if __name__ == "__main__":
    main()
