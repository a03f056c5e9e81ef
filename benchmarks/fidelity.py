"""Simulation beside reality: one workload on the live engine in real time, and on the simulator with this machine's
profile; errors of p50 and p99 TTFT, TPOT and of throughput, and beside them how far equal live runs lie apart.

    python -m benchmarks.fidelity                              # both models, three rounds; about 25 minutes
    python -m benchmarks.fidelity --model pippin --repeats 1   # a round of one
    python -m benchmarks.fidelity --report                     # docs/benchmarks/fidelity.md from the rows

The workloads were never used for the fit: the profile chooses its own batches. Loads are shares of the requests per
second that the live engine reaches when all arrive at once. Live: the engine's own loop in real time, without a server;
TTFT counts from the arrival that was planned. A machine that others share is not always equally fast, so a second
engine is profiled in turns with the live one, whose clock goes on for a while after every few points. All points of
a round make its profile; those measured beside a run say how much slower or faster than on average decodes and prompts
were meanwhile. An error is the median over rounds.
"""

import argparse
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from rich.console import Console

from benchmarks import assets, fidelity_page, meter, results, workload
from benchmarks.fidelity_live import LiveRun, figures, note
from benchmarks.shapes import SHAPES
from pomona.cli.build import engine_builder, startup_adapters
from pomona.cli.config import AppConfig, load_config
from pomona.cli.profile import build_metered, describe
from pomona.core.adapter import AdapterInfo
from pomona.core.ids import RequestId
from pomona.core.request import Request, SamplingParams
from pomona.metrics.timeline import RequestTimeline
from pomona.profiling.fit import Sample
from pomona.profiling.measure import PointMeter
from pomona.profiling.points import candidates
from pomona.profiling.profile import ProfileLimits, ProfileProgress, run_profile
from pomona.sim.clock import EventHeap
from pomona.sim.cost_model import CostModel
from pomona.sim.executor import SimExecutor
from pomona.sim.profile_file import CostProfile
from pomona.sim.replica import SimReplica
from pomona.sim.step_work import StepWork
from pomona.workload.arrivals import AllAtOnce, Arrivals, GammaArrivals, PoissonArrivals
from pomona.workload.lengths import LognormalLength, UniformLength
from pomona.workload.popularity import GroupPopularity, ZipfPopularity
from pomona.workload.spec import WorkloadRequest, WorkloadSpec, generate

LOADS = (0.3, 0.6, 0.9)
WORKLOADS = ("chat", "bursts", "documents")
_CAPACITY_REQUESTS = 32
_LIVE_PER_PROFILE = 2.0
"""Live seconds per second of profiling beside them."""
_TURN_S = 0.5
"""Of profiling, at least: what comes back finds the other's things in the caches."""
_CANDIDATES = 2000
_LONGEST_S = 3600.0
_MOST_OFF = 3.0
"""A step that took so many times what was predicted was another program's."""
_FEWEST_BESIDE = 8
"""Samples that a factor is taken of, at least."""


@dataclass(frozen=True, slots=True)
class Model:
    """What is simulated."""

    name: str
    settings: dict[str, Any]
    run_s: float
    """Length of a run at most, as arrivals go."""
    max_requests: int


def models() -> dict[str, Model]:
    """The bundled model, and the shape of the comparison with other engines."""
    root = workload.cache_dir() / "smollm2-135m"
    common: dict[str, Any] = {"max_model_len": 1024, "prefix_cache": False, "max_waiting": 100_000}
    common["adapter_loading"] = "on_demand"  # what the simulator's executor does: copies are part of a step
    small = {"kv_cache_bytes": 64 << 20, "max_num_seqs": 64}
    large = {"kv_cache_bytes": 512 << 20, "max_num_seqs": 32, "model": str(root / "model")}
    large["adapters_dir"] = (str(root / "adapters"),)
    return {
        "pippin": Model("pippin", common | small, run_s=10.0, max_requests=2000),
        "smollm2-135m": Model("smollm2-135m", common | large, run_s=25.0, max_requests=400),
    }


def spec(name: str, num_adapters: int, arrivals: Arrivals, num_requests: int) -> WorkloadSpec:
    """A workload by name: chats of many adapters, bursts over all of them evenly, documents with short answers."""
    common = {"arrivals": arrivals, "num_requests": num_requests, "seed": 7}
    match name:
        case "chat":
            return WorkloadSpec(
                prompt_lengths=LognormalLength(60, 0.8, 400, 8),
                output_lengths=LognormalLength(40, 0.6, 150, 2),
                popularity=ZipfPopularity(num_adapters, 1.0),
                **common,  # type: ignore[arg-type]
            )
        case "bursts":
            return WorkloadSpec(
                prompt_lengths=UniformLength(16, 200),
                output_lengths=UniformLength(8, 48),
                popularity=GroupPopularity("uniform", num_adapters, 16),
                **common,  # type: ignore[arg-type]
            )
        case _:
            return WorkloadSpec(
                prompt_lengths=LognormalLength(300, 0.5, 800, 60),
                output_lengths=UniformLength(2, 20),
                popularity=GroupPopularity("zipf-1.5", num_adapters, 32),
                **common,  # type: ignore[arg-type]
            )


def arrivals_of(name: str, rate_per_s: float) -> Arrivals:
    """Poisson, and Gamma of cv 3 for bursts."""
    return GammaArrivals(rate_per_s, 3.0) if name == "bursts" else PoissonArrivals(rate_per_s)


@dataclass(frozen=True, slots=True)
class ScaledCost:
    """Another cost at a time when decodes, and steps with prompts, take so many times what it says."""

    cost: CostModel
    decodes: float
    prompts: float

    def seconds(self, work: StepWork) -> float:
        """The other's times a factor."""
        return self.cost.seconds(work) * (self.decodes if work.num_prefill_rows == 0 else self.prompts)


def scaled(cost: CostModel, beside: Sequence[Sample]) -> ScaledCost:
    """The cost at the time of some samples."""
    factors = []
    for is_decodes in (True, False):
        taken = [
            sample.seconds / cost.seconds(sample.work)
            for sample in beside
            if (sample.work.num_prefill_rows == 0) == is_decodes
        ]
        own = [factor for factor in taken if factor < _MOST_OFF]
        factors.append(statistics.fmean(own) if len(own) >= _FEWEST_BESIDE else 1.0)
    return ScaledCost(cost, *factors)


class Bench:
    """A live engine with its adapters, another like it to be profiled, and their simulation.

    Args:
        model: which.
    """

    def __init__(self, model: Model) -> None:
        if model.name in SHAPES:
            assets.make(SHAPES[model.name])
        self.config: AppConfig = load_config(model.settings)
        self.model = model
        self.parts = engine_builder(self.config)()
        staged = [self.parts.adapter_host.stage(source.source) for source in startup_adapters(self.config)]
        self.adapters = tuple({info.adapter_id: info for info in staged}.values())
        self.profiled, executor, adapters = build_metered(self.config)
        self.meter = PointMeter(self.profiled.engine, executor, adapters, self.profiled.info.vocab_size)
        self.capacities: dict[str, float] = {}
        """Requests per second of each workload; the caller fills it."""
        self._num_runs = 0
        gc.collect()
        gc.freeze()  # as an engine's process does
        # Down from a full batch, so that steps of every number of rows have been recorded.
        self.live(generate(spec("chat", len(self.adapters), AllAtOnce(), self.config.max_num_seqs)))

    def profile(self, report: Callable[[ProfileProgress], bool]) -> tuple[CostProfile, tuple[Sample, ...]]:
        """Measure until told that it is enough."""
        points = candidates(self.profiled.engine.config, self.adapters, _CANDIDATES)
        limits = ProfileLimits(max_points=_CANDIDATES, max_seconds=_LONGEST_S, min_seconds=_LONGEST_S)
        outcome = run_profile(self.meter, points, limits, report)
        return describe(self.config, self.profiled, self.adapters, outcome), outcome.samples

    def requests(self, wanted: Sequence[WorkloadRequest]) -> list[tuple[Request, AdapterInfo | None]]:
        """Requests with tokens: random prompts, answers of exactly the length asked for."""
        self._num_runs += 1
        chance = random.Random(11)
        found = []
        for number, request in enumerate(wanted):
            prompt = tuple(chance.randrange(self.parts.info.vocab_size) for _ in range(request.num_prompt_tokens))
            info = None if request.adapter_index is None else self.adapters[request.adapter_index]
            found.append(
                (
                    Request(
                        RequestId(f"{self._num_runs}-{number}"),
                        prompt,
                        SamplingParams(max_tokens=request.num_output_tokens, temperature=0.0),
                        request.arrival_s,
                        adapter_id=None if info is None else info.adapter_id,
                    ),
                    info,
                )
            )
        return found

    def start(self, wanted: Sequence[WorkloadRequest]) -> "LiveRun":
        """A run that has not begun; every adapter will be copied to the device anew."""
        engine = self.parts.engine
        for info in self.adapters:
            engine.retire_adapter(info.adapter_id)
        while engine.has_work:
            engine.step(time.monotonic())
        engine.take_drained()
        for info in self.adapters:
            engine.register_adapter(info)
        return LiveRun(engine, [request for request, _ in self.requests(wanted)])

    def live(self, wanted: Sequence[WorkloadRequest]) -> dict[str, float]:
        """Figures of a run from beginning to end."""
        run = self.start(wanted)
        run.go_on()
        return run.figures()

    def simulated(self, wanted: Sequence[WorkloadRequest], cost: CostModel) -> dict[str, float]:
        """The same figures from the simulator."""
        heap = EventHeap()
        timelines: dict[RequestId, RequestTimeline] = {}
        ranks = {info.adapter_id: info.lora_rank for info in self.adapters}
        extras = {info.adapter_id for info in self.adapters if info.has_extras}
        replica = SimReplica(
            self.parts.engine.config,
            SimExecutor(cost, ranks, with_extras=extras),
            heap,
            lambda outputs: note(timelines, outputs, heap.now_s),
            _refuse,
        )
        for request, info in self.requests(wanted):
            timelines[request.request_id] = RequestTimeline(request.arrival_s)
            heap.at(request.arrival_s, partial(replica.submit, request, info))
        heap.run()
        return figures(timelines.values())


def _refuse(request: Request, error: Exception) -> None:
    raise AssertionError(f"{request.request_id} was refused: {error}")


def capacity(bench: Bench, name: str) -> float:
    """Requests per second when all arrive at once: the median of three times, after a first."""
    wanted = generate(spec(name, len(bench.adapters), AllAtOnce(), _CAPACITY_REQUESTS))
    num_tokens = sum(request.num_output_tokens for request in wanted)
    bench.live(wanted)
    reached = statistics.median(bench.live(wanted)["output_tokens_per_s"] for _ in range(3))
    return _CAPACITY_REQUESTS * reached / num_tokens


@dataclass
class Beside:
    """A live run, and which of the profile's samples were measured beside it."""

    row: dict[str, Any]
    wanted: list[WorkloadRequest]
    live: LiveRun
    clock: meter.Meter
    first_sample: int
    last_sample: int = 0


def run_round(bench: Bench, console: Console, *, accept_noise: bool) -> Iterator[dict[str, Any]]:
    """A round's rows: the profile, and of every workload at every load a live run and its simulation."""
    todo = list(itertools.product(WORKLOADS, LOADS))
    runs: list[Beside] = []
    last_s = 0.0

    def begin(first_sample: int) -> None:
        name, load = todo[len(runs)]
        rate = load * bench.capacities[name]
        num_requests = max(20, min(bench.model.max_requests, round(rate * bench.model.run_s)))
        wanted = generate(spec(name, len(bench.adapters), arrivals_of(name, rate), num_requests))
        if not accept_noise:
            meter.wait_until_quiet()
        row = {"kind": "fidelity", "workload": name, "load": load, "rate_rps": rate, "num_requests": num_requests}
        runs.append(Beside(row, wanted, bench.start(wanted), meter.Meter(), first_sample))
        runs[-1].clock.__enter__()

    def report(progress: ProfileProgress) -> bool:
        nonlocal last_s
        if not runs:
            begin(progress.num_samples)
        if progress.elapsed_s - last_s < _TURN_S:
            return False
        run = runs[-1]
        run.live.go_on(_LIVE_PER_PROFILE * (progress.elapsed_s - last_s))
        last_s = progress.elapsed_s
        if run.live.is_over:
            run.clock.__exit__(None, None, None)
            run.last_sample = progress.num_samples
            if len(runs) == len(todo):
                return True
            begin(progress.num_samples)
        return False

    profile, samples = bench.profile(report)
    yield {"kind": "profile", "profile": profile.to_json()}
    console.print(
        f"{bench.model.name}: error of held-out steps p50 {profile.error.p50:.1%}, p90 {profile.error.p90:.1%}"
    )
    for run in runs:
        cost = scaled(profile.cost_model, samples[run.first_sample : run.last_sample])
        live, simulated = run.live.figures(), bench.simulated(run.wanted, cost)
        errors = ", ".join(f"{metric} {simulated[metric] / live[metric] - 1:+.1%}" for metric in fidelity_page.METRICS)
        console.print(
            f"{bench.model.name} {run.row['workload']} {run.row['load']:.0%}, decodes x {cost.decodes:.2f}, prompts x "
            f"{cost.prompts:.2f}: {errors}",
            highlight=False,
        )
        noise = run.clock.disturbance
        factors = {"decodes_factor": cost.decodes, "prompts_factor": cost.prompts}
        yield run.row | factors | {"live": live, "simulated": simulated, **asdict(noise), "is_clean": noise.is_clean}


def run_model(model: Model, arguments: argparse.Namespace, console: Console) -> None:
    """The rounds of a model that the rows do not have yet."""
    setup = results.setup(model=model.name)
    done = [
        row
        for row in results.read(arguments.output)
        if (row["model"], row["program"]) == (model.name, setup["program"])
    ]
    bench = Bench(model)
    for row in results.of_kind(done, "capacity"):
        bench.capacities[row["workload"]] = row["capacity_rps"]
    for name in WORKLOADS:
        if name not in bench.capacities:
            if not arguments.accept_noise:
                meter.wait_until_quiet()
            found = bench.capacities[name] = capacity(bench, name)
            results.append(arguments.output, {**setup, "kind": "capacity", "workload": name, "capacity_rps": found})
    num_done = len(list(results.of_kind(done, "profile")))
    for number in range(num_done, arguments.repeats):
        for row in run_round(bench, console, accept_noise=arguments.accept_noise):
            results.append(arguments.output, {**setup, **row, "round": number})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models(), action="append", help="repeatable; default: both")
    parser.add_argument("--report", action="store_true", help="only write the page from the newest rows")
    results.add_arguments(parser, "fidelity", repeats=3)
    arguments = results.parse(parser, "fidelity")
    console = Console(soft_wrap=True)
    if not arguments.report:
        chosen = [models()[name] for name in arguments.model or models()]
        if arguments.quick:
            chosen = [replace(models()["pippin"], run_s=1.0)]
        for model in chosen:
            run_model(model, arguments, console)
        return
    newest = results.latest("fidelity")
    fidelity_page.PAGE.write_text(fidelity_page.render(results.of_last_program(results.read(newest)) if newest else []))


if __name__ == "__main__":
    main()
