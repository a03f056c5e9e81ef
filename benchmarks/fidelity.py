"""Simulation beside reality: one workload on the live engine in real time, and on the simulator with this machine's
profile; errors of p50 and p99 TTFT, TPOT and of throughput, and beside them how far equal live runs lie apart.

    python -m benchmarks.fidelity                              # both models, three rounds; about 25 minutes
    python -m benchmarks.fidelity --model pippin --repeats 1   # a round of one
    python -m benchmarks.fidelity --report                     # docs/benchmarks/fidelity.md from the rows

The workloads were never used for the fit: the profile chooses its own batches. Loads are shares of the requests per
second that the live engine reaches when all arrive at once. Live: the engine's own loop without a server. TTFT counts
from the arrival that was planned. A machine that others share is not always equally fast: every round takes a profile
anew, stops it for a while to run each workload once, and simulates them with it; medians over rounds are compared.
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

from benchmarks import assets, meter, results, workload
from benchmarks.shapes import SHAPES
from pomona.bench.percentiles import percentile
from pomona.cli.build import startup_adapters
from pomona.cli.config import AppConfig, load_config
from pomona.cli.profile import build_metered, describe, measure
from pomona.core.adapter import AdapterInfo
from pomona.core.ids import RequestId
from pomona.core.output import RequestOutput
from pomona.core.request import Request, SamplingParams
from pomona.engine.engine import Engine
from pomona.metrics.timeline import RequestTimeline
from pomona.profiling.profile import ProfileLimits, ProfileProgress
from pomona.sim.clock import EventHeap
from pomona.sim.cost_model import CostModel
from pomona.sim.executor import SimExecutor
from pomona.sim.profile_file import CostProfile
from pomona.sim.replica import SimReplica
from pomona.workload.arrivals import AllAtOnce, Arrivals, GammaArrivals, PoissonArrivals
from pomona.workload.lengths import LognormalLength, UniformLength
from pomona.workload.popularity import GroupPopularity, ZipfPopularity
from pomona.workload.spec import WorkloadRequest, WorkloadSpec, generate

LOADS = (0.3, 0.6, 0.9)
WORKLOADS = ("chat", "bursts", "documents")
METRICS = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "output_tokens_per_s")
PAGE = results.ROOT / "docs" / "benchmarks" / "fidelity.md"
_CAPACITY_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class Model:
    """What is simulated."""

    name: str
    settings: dict[str, Any]
    profile_s: float
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
        "pippin": Model("pippin", common | small, profile_s=60.0, run_s=10.0, max_requests=2000),
        "smollm2-135m": Model("smollm2-135m", common | large, profile_s=75.0, run_s=25.0, max_requests=400),
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


class Bench:
    """A live engine with its adapters, and its simulation.

    Args:
        model: which.
    """

    def __init__(self, model: Model) -> None:
        if model.name in SHAPES:
            assets.make(SHAPES[model.name])
        self.config: AppConfig = load_config(model.settings)
        self.model = model
        self.parts, self.executor, self.adapters = build_metered(self.config)
        assert len(self.adapters) == len(startup_adapters(self.config))
        self.capacities: dict[str, float] = {}
        """Requests per second of each workload; the caller fills it."""
        self._num_runs = 0
        self.executor.lora_ranks.update({info.adapter_id: info.lora_rank for info in self.adapters})
        gc.collect()
        gc.freeze()  # as an engine's process does
        # Down from a full batch, so that steps of every number of rows have been recorded.
        self.live(generate(spec("chat", len(self.adapters), AllAtOnce(), self.config.max_num_seqs)))

    def profile(self, console: Console, on_progress: Callable[[ProfileProgress], None]) -> CostProfile:
        """Measure, for so long that it is not over before all runs beside it are."""
        limits = ProfileLimits(max_points=400, max_seconds=self.model.profile_s, min_seconds=self.model.profile_s)
        outcome = measure(self.parts, self.executor, self.adapters, limits, console, on_progress)
        return describe(self.config, self.parts, self.adapters, outcome)

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

    def live(self, wanted: Sequence[WorkloadRequest]) -> dict[str, float]:
        """Figures of the live engine; every adapter is copied to the device anew."""
        engine = self.parts.engine
        for info in self.adapters:
            engine.retire_adapter(info.adapter_id)
        while engine.has_work:
            engine.step(time.monotonic())
        engine.take_drained()
        for info in self.adapters:
            engine.register_adapter(info)
        self.executor.is_metering = False
        found = run_live(engine, [request for request, _ in self.requests(wanted)])
        self.executor.is_metering = True
        return found

    def simulated(self, wanted: Sequence[WorkloadRequest], cost: CostModel) -> dict[str, float]:
        """The same figures from the simulator."""
        heap = EventHeap()
        timelines: dict[RequestId, RequestTimeline] = {}
        ranks = {info.adapter_id: info.lora_rank for info in self.adapters}
        replica = SimReplica(
            self.parts.engine.config,
            SimExecutor(cost, ranks, with_extras=self.executor.with_extras),
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


def note(timelines: dict[RequestId, RequestTimeline], outputs: Sequence[RequestOutput], now_s: float) -> None:
    """Write a step's outputs into the requests' timelines."""
    for output in outputs:
        timeline = timelines[output.request_id]
        if output.new_token_ids:
            timeline.add_tokens(len(output.new_token_ids), now_s)
        if output.finish_reason is not None:
            timeline.end(now_s, output.finish_reason)


def run_live(engine: Engine, requests: Sequence[Request]) -> dict[str, float]:
    """Turn the engine in real time as the driver does: what has arrived, then a step. What came out is looked at when
    all is over."""
    timelines = {request.request_id: RequestTimeline(request.arrival_s) for request in requests}
    coming = iter(requests)
    following = next(coming, None)
    came_out: list[tuple[list[RequestOutput], float]] = []
    start_s = time.perf_counter()
    while following is not None or engine.has_work:
        now_s = time.perf_counter() - start_s
        while following is not None and following.arrival_s <= now_s:
            engine.add(following)
            following = next(coming, None)
        if engine.has_work:
            outputs = engine.step(start_s + now_s)
            came_out.append((outputs, time.perf_counter() - start_s))
        elif following is not None:
            time.sleep(max(0.0, following.arrival_s - now_s - 1e-4))
    for outputs, out_s in came_out:
        note(timelines, outputs, out_s)
    return figures(timelines.values())


def figures(timelines: Any) -> dict[str, float]:
    """p50 and p99 of TTFT and TPOT in seconds, output tokens per second from the first arrival to the last token."""
    found = list(timelines)
    ttft = sorted(timeline.ttft_s for timeline in found)
    tpot = sorted(timeline.tpot_s for timeline in found if timeline.tpot_s is not None)
    end_s = max(timeline.end_s for timeline in found)
    return {
        "ttft_p50_s": percentile(ttft, 0.5),
        "ttft_p99_s": percentile(ttft, 0.99),
        "tpot_p50_s": percentile(tpot, 0.5),
        "tpot_p99_s": percentile(tpot, 0.99),
        "output_tokens_per_s": sum(timeline.num_output_tokens for timeline in found) / end_s,
    }


def capacity(bench: Bench, name: str) -> float:
    """Requests per second when all arrive at once: the median of three times, after a first."""
    wanted = generate(spec(name, len(bench.adapters), AllAtOnce(), _CAPACITY_REQUESTS))
    num_tokens = sum(request.num_output_tokens for request in wanted)
    bench.live(wanted)
    reached = statistics.median(bench.live(wanted)["output_tokens_per_s"] for _ in range(3))
    return _CAPACITY_REQUESTS * reached / num_tokens


def run_round(bench: Bench, console: Console, *, accept_noise: bool) -> Iterator[dict[str, Any]]:
    """A round's rows: the profile, and of every workload at every load a live run and its simulation."""
    model = bench.model
    todo = list(itertools.product(WORKLOADS, LOADS))
    runs: list[tuple[list[WorkloadRequest], dict[str, Any]]] = []

    def run_next() -> None:
        name, load = todo[len(runs)]
        rate = load * bench.capacities[name]
        num_requests = max(20, min(model.max_requests, round(rate * model.run_s)))
        wanted = generate(spec(name, len(bench.adapters), arrivals_of(name, rate), num_requests))
        if not accept_noise:
            meter.wait_until_quiet()
        with meter.Meter() as clock:
            live = bench.live(wanted)
        noise = clock.disturbance
        row = {"kind": "fidelity", "workload": name, "load": load, "rate_rps": rate, "num_requests": num_requests}
        runs.append((wanted, row | {"live": live, **asdict(noise), "is_clean": noise.is_clean}))

    def on_progress(progress: ProfileProgress) -> None:
        if len(runs) < len(todo) and progress.elapsed_s > (len(runs) + 0.5) / len(todo) * model.profile_s:
            run_next()

    profile = bench.profile(console, on_progress)
    while len(runs) < len(todo):
        run_next()
    yield {"kind": "profile", "profile": profile.to_json()}
    console.print(f"{model.name}: held-out error of steps p50 {profile.error.p50:.1%}, p90 {profile.error.p90:.1%}")
    for wanted, row in runs:
        simulated = bench.simulated(wanted, profile.cost_model)
        errors = ", ".join(f"{metric} {simulated[metric] / row['live'][metric] - 1:+.1%}" for metric in METRICS)
        console.print(f"{model.name} {row['workload']} {row['load']:.0%}: {errors}", highlight=False)
        yield row | {"simulated": simulated}


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


def cells(rows: Sequence[results.Row]) -> Iterator[dict[str, Any]]:
    """One entry per model, workload, load and metric: medians over rounds, and how far rounds lie from them at most.
    Runs that other programs disturbed count only where there are no others."""
    found = list(results.of_kind(rows, "fidelity"))
    keys = dict.fromkeys((row["model"], row["workload"], row["load"]) for row in found)
    for model, name, load in keys:
        same = [row for row in found if (row["model"], row["workload"], row["load"]) == (model, name, load)]
        same = [row for row in same if row.get("is_clean", True)] or same
        for metric in METRICS:
            live, live_spread = _median_and_spread([row["live"][metric] for row in same])
            simulated, simulated_spread = _median_and_spread([row["simulated"][metric] for row in same])
            yield {
                "model": model,
                "workload": name,
                "load": load,
                "metric": metric,
                "num_runs": len(same),
                "live": live,
                "simulated": simulated,
                "error": simulated / live - 1.0,
                "live_spread": live_spread,
                "simulated_spread": simulated_spread,
            }


def _median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    typical = statistics.median(values)
    return typical, max(abs(value / typical - 1.0) for value in values)


def render(rows: Sequence[results.Row]) -> str:
    """The page."""
    found = list(cells(rows))
    lines = ["# Fidelity of the simulator", "", "<!-- Generated by `python -m benchmarks.fidelity --report`. -->", ""]
    if not found:
        return "\n".join([*lines, "No rows yet.", ""])
    errors = sorted(abs(cell["error"]) for cell in found)
    spreads = sorted(cell["live_spread"] for cell in found)
    setup = rows[-1]
    lines += [
        "The same workloads on the live engine in real time and on the simulator with this machine's profile; none of",
        "them was used for the fit. Every round takes a profile anew and stops it now and then to run each workload",
        "once; *live* and *simulated* are medians over rounds, *error* is simulated over live, minus one. *Spreads*:",
        "the round farthest from the median, of live runs and of simulations with each round's profile. This machine",
        "is shared with others: where equal runs or equal profiles lie far apart, no simulator can be exact.",
        "",
        f"{setup['hardware']['cpu']}, {setup['hardware']['cores']} cores; commit {setup['commit'][:12]}, "
        f"{setup['utc']}.",
        "",
        "| figures | median error | worst error | within 5 % | within 15 % | median live spread | worst live spread |",
        "|---|---|---|---|---|---|---|",
        f"| {len(found)} | {statistics.median(errors):.1%} | {errors[-1]:.1%} | {sum(e <= 0.05 for e in errors)} | "
        f"{sum(e <= 0.15 for e in errors)} | {statistics.median(spreads):.1%} | {spreads[-1]:.1%} |",
        "",
    ]
    for model in dict.fromkeys(cell["model"] for cell in found):
        lines += _model_section(model, rows, [cell for cell in found if cell["model"] == model])
    return "\n".join(lines)


def _model_section(model: str, rows: Sequence[results.Row], found: Sequence[dict[str, Any]]) -> list[str]:
    profiles = [row for row in results.of_kind(rows, "profile") if row["model"] == model]
    lines = [f"## {model}", ""]
    for number, row in enumerate(profiles, 1):
        profile = CostProfile.from_json(row["profile"], model)
        error = profile.error
        lines += [
            f"Profile {number}: {profile.num_points} batches in {profile.measuring_s:.0f} s; {error.dense}, adapters "
            f"by {error.adapters}; error on held-out steps p50 {error.p50:.1%}, p90 {error.p90:.1%}.",
            "",
        ]
    lines += [
        "| workload | load | rounds | figure | live | simulated | error | live spread | simulated spread |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in found:
        is_time = cell["metric"].endswith("_s") and not cell["metric"].endswith("per_s")
        factor, unit = (1e3, "ms") if is_time else (1.0, "tokens/s")
        name = cell["metric"].removesuffix("_s").replace("_", " ") if is_time else "throughput"
        lines.append(
            f"| {cell['workload']} | {cell['load']:.0%} | {cell['num_runs']} | {name} | "
            f"{factor * cell['live']:.1f} {unit} | {factor * cell['simulated']:.1f} {unit} | "
            f"{cell['error']:+.1%} | {cell['live_spread']:.1%} | {cell['simulated_spread']:.1%} |"
        )
    return [*lines, ""]


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
            chosen = [replace(models()["pippin"], profile_s=5.0, run_s=1.0)]
        for model in chosen:
            run_model(model, arguments, console)
        return
    newest = results.latest("fidelity")
    PAGE.write_text(render(results.of_last_program(results.read(newest)) if newest else []))


if __name__ == "__main__":
    main()
