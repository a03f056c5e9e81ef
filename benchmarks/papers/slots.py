"""The interior optimum of adapter slots: throughput of one replica with 512 adapters against the number that fit its
memory at once, simulated beside what was measured on an H100-class GPU with vLLM.

    python -m benchmarks.papers.slots

The cost of a step and the KV room left by so many slots are fitted to ``lora_h100_fit.csv``; the error is stated on
``lora_h100_held_out.csv`` (other arrival patterns, never used for the fit). The scheduler is Pomona's own, once with
its bounded wait for adapter pages and once without, as vLLM has none. The measured runs of ten minutes had on average
some thousands of requests waiting; a simulation starts with as many, so that a minute of it is a minute of theirs.
"""

import csv
import itertools
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.papers.lines import Line, Panel, line_chart
from benchmarks.papers.published import DATA, Report, arguments
from pomona.router.autoscale import AutoscalerConfig
from pomona.sched.config import SchedulerConfig
from pomona.sim.cluster import ClusterSim
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.sim.step_work import StepWork
from pomona.workload.arrivals import PoissonArrivals
from pomona.workload.popularity import ZipfPopularity
from pomona.workload.spec import WorkloadRequest

NUM_PROMPT_TOKENS = 250
"""Not in the files; what their authors describe. A wrong value moves cost between prefill and decode, no more."""
NUM_OUTPUT_TOKENS = 231
"""Output tokens per completed request, the same in every row of the files."""
MAX_NUM_SEQS = 1056
BLOCK_TOKENS = 16
SLOTS = (8, 16, 32, 64, 128, 192, 256, 320, 384, 448)


@dataclass(frozen=True)
class MeasuredRun:
    """One row of the files: a real run of ten minutes."""

    num_slots: int
    num_adapters: int
    rate_rps: float
    tokens_per_s: float
    batch: float
    num_batch_adapters: float
    step_s: float
    num_waiting: float

    @property
    def is_saturated(self) -> bool:
        """More arrived than was served, throughout."""
        return self.num_waiting > 500

    @property
    def decode_rows(self) -> float:
        """Tokens that a step yields."""
        return self.tokens_per_s * self.step_s

    @property
    def prefill_rows(self) -> float:
        """Prompt tokens that a step computes."""
        return self.decode_rows * NUM_PROMPT_TOKENS / NUM_OUTPUT_TOKENS


def read_runs(path: Path) -> list[MeasuredRun]:
    with path.open() as file:
        return [
            MeasuredRun(
                num_slots=int(row["gpu_loras"]),
                num_adapters=int(row["cpu_loras"]),
                rate_rps=float(row["adapter_rates"]) * int(row["cpu_loras"]),
                tokens_per_s=float(row["output_throughput"]),
                batch=float(row["avg_batch_size"]),
                num_batch_adapters=float(row["mean_loras_by_batch"]),
                step_s=float(row["duration"]) / int(row["steps"]),
                num_waiting=float(row["avg_waiting_queue"]),
            )
            for row in csv.DictReader(file)
        ]


@dataclass(frozen=True)
class FittedCost:
    """Step seconds: base, decode rows, prefill rows, adapters of the batch, and rows times adapters."""

    weights: tuple[float, ...]

    def seconds(self, work: StepWork) -> float:
        features = _features(work.num_decode_rows, work.num_prefill_rows, work.num_adapters)
        return sum(weight * feature for weight, feature in zip(self.weights, features, strict=True))


def _features(decode_rows: float, prefill_rows: float, num_adapters: float) -> tuple[float, ...]:
    return (1.0, decode_rows, prefill_rows, num_adapters, num_adapters * decode_rows)


def fit_cost(runs: list[MeasuredRun]) -> FittedCost:
    """Least squares of the relative error over the runs; weights may not be negative, as work never saves time."""
    features = np.array([_features(run.decode_rows, run.prefill_rows, run.num_batch_adapters) for run in runs])
    step_s = np.array([run.step_s for run in runs])
    chosen = list(range(features.shape[1]))
    while True:
        weights, *_ = np.linalg.lstsq(features[:, chosen] / step_s[:, None], np.ones(len(runs)), rcond=None)
        if (weights >= 0.0).all():
            found = dict(zip(chosen, weights.tolist(), strict=True))
            return FittedCost(tuple(found.get(k, 0.0) for k in range(features.shape[1])))
        del chosen[int(weights.argmin())]


def fit_kv_tokens(runs: list[MeasuredRun]) -> dict[int, int]:
    """KV positions left by so many slots: what the running sequences of the fullest saturated runs held."""
    held = NUM_PROMPT_TOKENS + NUM_OUTPUT_TOKENS / 2
    return {
        slots: round(held * max(run.batch for run in runs if run.num_slots == slots and run.is_saturated))
        for slots in SLOTS
    }


@dataclass(frozen=True)
class Load:
    """What one replica is offered."""

    num_adapters: int
    rate_rps: float
    num_waiting: int = 0
    """Requests that wait when the simulation begins."""

    def requests(self, duration_s: float) -> Iterator[WorkloadRequest]:
        """Uniform adapters, fixed lengths, Poisson arrivals after what waits."""
        adapters = ZipfPopularity(self.num_adapters, 0.0).indices(random.Random("slots/adapters"))
        arrivals = PoissonArrivals(self.rate_rps).times(random.Random("slots/arrivals"))
        times = itertools.chain(itertools.repeat(0.0, self.num_waiting), arrivals)
        for arrival_s, index in zip(times, adapters, strict=False):
            if arrival_s > duration_s:
                return
            yield WorkloadRequest(arrival_s, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, index)


def simulate(
    num_slots: int, load: Load, cost: FittedCost, kv_tokens: int, wait_limit_s: float, duration_s: float
) -> float:
    """Output tokens per second of one replica of that many slots, over the last two thirds of the time."""
    scheduler = SchedulerConfig(
        num_kv_blocks=kv_tokens // BLOCK_TOKENS,
        max_model_len=2048,
        num_adapter_pages=num_slots,
        max_num_batched_tokens=4096,
        max_num_seqs=MAX_NUM_SEQS,
        max_waiting=1_000_000,
        enable_prefix_cache=False,
        min_prefix_wait_tokens=0,
        adapter_wait_limit_s=wait_limit_s,
    )
    config = ClusterConfig(scheduler, cost, autoscaler=AutoscalerConfig(interval_s=duration_s), sample_interval_s=1.0)
    sim = ClusterSim(config, AdapterPopulation((8,), AdapterPages(rows_per_page=8)))
    sim.run(load.requests(duration_s), duration_s)
    service = [(sample.now_s, sum(sample.service.values())) for sample in sim.samples]
    begin_s, begin = next(pair for pair in service if pair[0] >= duration_s / 3)
    end_s, end = service[-1]
    # Service counts prompt tokens once and output tokens twice.
    per_request = NUM_PROMPT_TOKENS + 2 * NUM_OUTPUT_TOKENS
    return (end - begin) / (end_s - begin_s) * NUM_OUTPUT_TOKENS / per_request


def settling_s(num_slots: int, duration_s: float) -> float:
    """Where KV binds, what began together stays together for a few generations: longer runs, which are cheap."""
    return duration_s if num_slots <= 32 else 4 * duration_s


def held_out_error(cost: FittedCost, kv_tokens: dict[int, int], duration_s: float) -> list[dict[str, float]]:
    """Simulated and measured throughput of held-out runs: all that were saturated, and as many that were not."""
    runs = [run for run in read_runs(DATA / "lora_h100_held_out.csv") if run.num_adapters >= 32]
    saturated = [run for run in runs if run.is_saturated]
    others = [run for run in runs if not run.is_saturated and run.rate_rps >= 3.0]
    chosen = saturated[:: max(1, len(saturated) // 12)] + others[:: max(1, len(others) // 12)]
    rows = []
    for run in chosen:
        load = Load(run.num_adapters, run.rate_rps, round(run.num_waiting) if run.is_saturated else 0)
        # A few requests per second need minutes for a rate; they cost little.
        long_s = settling_s(run.num_slots, duration_s) if run.is_saturated else 10 * duration_s
        found = simulate(run.num_slots, load, cost, kv_tokens[run.num_slots], 1e6, long_s)
        rows.append(
            {
                "num_slots": run.num_slots,
                "num_adapters": run.num_adapters,
                "rate_rps": run.rate_rps,
                "is_saturated": run.is_saturated,
                "measured_tokens_per_s": run.tokens_per_s,
                "simulated_tokens_per_s": found,
                "error": found / run.tokens_per_s - 1.0,
            }
        )
    return rows


def main() -> None:
    parser = arguments(__doc__, "slots")
    parser.add_argument("--duration", type=float, default=60.0, help="simulated seconds per point")
    parser.add_argument("--num-adapters", type=int, default=512)
    parser.add_argument("--rate", type=float, default=150.0)
    options = parser.parse_args()
    report = Report("slots", options.output, duration_s=options.duration)
    runs = read_runs(DATA / "lora_h100_fit.csv")
    cost = fit_cost([run for run in runs if run.is_saturated])
    kv_tokens = fit_kv_tokens(runs)
    report.add("fit", {"weights": cost.weights, "kv_tokens": kv_tokens})
    measured = {
        run.num_slots: run
        for run in runs
        if run.num_adapters == options.num_adapters and abs(run.rate_rps - options.rate) < 1.0
    }
    rows = []
    for num_slots in SLOTS:
        run = measured.get(num_slots)
        row: dict[str, float | None] = {"num_slots": num_slots, "published": run.tokens_per_s if run else None}
        load = Load(options.num_adapters, options.rate, round(run.num_waiting if run else 300 * options.rate))
        for name, wait_limit_s in (("without_limit", 1e6), ("with_limit", 1.0)):
            duration_s = settling_s(num_slots, options.duration)
            row[name] = simulate(num_slots, load, cost, kv_tokens[num_slots], wait_limit_s, duration_s)
        rows.append(row)
        report.add("slots", row)
    held_out = held_out_error(cost, kv_tokens, options.duration)
    for row in held_out:
        report.add("held-out", row)
    errors = [abs(row["error"]) for row in held_out]
    summary = {"median_error": statistics.median(errors), "worst_error": max(errors), "num_runs": len(errors)}
    report.add("error", summary)
    report.draw(chart(rows, options.num_adapters))


def chart(rows: list[dict[str, float | None]], num_adapters: int) -> str:
    def line(label: str, key: str, *, is_dots: bool = False) -> Line:
        points = tuple((row["num_slots"], row[key]) for row in rows if row[key] is not None)
        return Line(label, points, is_dots)  # type: ignore[arg-type]

    lines = (
        line("measured (vLLM, H100)", "published", is_dots=True),
        line("simulated, no wait limit", "without_limit"),
        line("simulated, wait limit 1 s", "with_limit"),
    )
    title = f"Adapter slots of one replica, {num_adapters} adapters of rank 8"
    return line_chart(title, "adapter slots", [Panel("output tokens/s", lines)], is_log_x=True)


if __name__ == "__main__":
    main()
