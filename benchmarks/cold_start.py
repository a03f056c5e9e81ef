"""What a cold adapter costs, its own request and others: every way of loading against an oracle with all resident.

    python -m benchmarks.cold_start                    # ranks, loads, contention on the bundled model; about 8 minutes
    python -m benchmarks.cold_start --shape smollm2-135m --repeats 2   # the same on a model of that shape; 10 minutes
    python -m benchmarks.cold_start --quick            # one rank, one load, few requests: to see that it works
    python -m benchmarks.cold_start --report           # the page from the rows there are

One runner in one process; in every repetition the ways take turns. Arrivals are open loop (Poisson), in real time. The
link to the device is held to a speed at which copying rank 64 takes ``--copy-prefills`` times a prompt's computation.
Adapters are of random weights and share one host copy per rank; their pages and copies are their own.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from benchmarks import assets, cold_start_report, results
from benchmarks.shapes import SHAPES
from pomona.cli.config import BUNDLED_MODEL
from pomona.cli.hub import checkpoint_dir
from pomona.core.adapter import AdapterInfo
from pomona.core.ids import AdapterId, RequestId, TenantId
from pomona.core.request import Request, SamplingParams
from pomona.engine.engine import Engine
from pomona.model.adapter_weights import AdapterWeights
from pomona.model.spec import Target
from pomona.runner.config import RunnerConfig
from pomona.runner.loading import LoadedRunner, load_runner
from pomona.sched.adapter_arrivals import AdapterLoading
from pomona.sched.config import SchedulerConfig

WAYS: dict[str, AdapterLoading] = {"oracle": "on_demand", "on demand": "on_demand", "join": "join", "assist": "assist"}
RANKS = (8, 32, 64, 128)
LOADS = (0.3, 0.5, 0.7)
COUNTS = (8, 16, 64)
RULES = {"strict order": 0.0, "limit": 0.5, "no limit": 1e9}
"""Rule under contention -> seconds that a request lets others overtake it."""
NUM_PROMPT, NUM_OUTPUT, ROWS_FOR = 64, 24, 8
WARM = AdapterId("warm")


@dataclass(frozen=True)
class Arrival:
    """One request of a run."""

    at_s: float
    adapter_id: AdapterId
    is_cold: bool


@dataclass
class Outcome:
    """Times of a run's requests."""

    tokens_s: dict[RequestId, list[float]] = field(default_factory=dict)
    arrivals: dict[RequestId, Arrival] = field(default_factory=dict)

    def ttfts_ms(self, *, is_cold: bool | None = None) -> list[float]:
        """Of all requests, or of those whose adapter was cold, or was not."""
        return [
            1e3 * (self.tokens_s[name][0] - arrival.at_s)
            for name, arrival in self.arrivals.items()
            if is_cold is None or arrival.is_cold is is_cold
        ]

    def warm_itls_ms(self) -> list[float]:
        """Gaps between tokens of the requests whose adapter is resident throughout."""
        warm = [self.tokens_s[name] for name, arrival in self.arrivals.items() if not arrival.is_cold]
        return [1e3 * float(gap) for times in warm for gap in np.diff(times)]


class Stand:
    """A runner whose adapters are made up, and an engine per run."""

    def __init__(self, model: str, max_rank: int, max_cold: int) -> None:
        rank_pages = -(-max_rank // 4)
        trial = RunnerConfig(model_path=model, device="cpu", adapter_bytes=2**30, max_num_seqs=32, max_model_len=256)
        probe = load_runner(trial)
        pages = probe.runner._adapter_pool._pages
        num_bytes = pages.stride(0) * pages.element_size() * rank_pages * (max_cold + 2)
        self.loaded: LoadedRunner = load_runner(replace(trial, adapter_bytes=num_bytes))
        self.pool = self.loaded.runner._adapter_pool
        self._weights: dict[int, AdapterWeights] = {}

    def weights(self, lora_rank: int) -> AdapterWeights:
        """Random ones of all projections."""
        if lora_rank not in self._weights:
            shape = (-(-lora_rank // 4), self.pool._pages.shape[1])
            sizes = (self.loaded.spec.num_layers, len(Target))
            self._weights[lora_rank] = AdapterWeights(
                pages=(0.01 * torch.randn(shape)).to(self.loaded.dtype),
                ranks=np.full(sizes, lora_rank, dtype=np.int32),
                scalings=np.ones(sizes, dtype=np.float32),
                extras=None,
                lora_rank=lora_rank,
                modules=(),
                features=(),
            )
        return self._weights[lora_rank]

    def engine(self, loading: AdapterLoading, lora_rank: int, num_adapters: int, **limits: float) -> Engine:
        """A fresh engine with registered adapters of one rank: WARM, and "0", "1" and so on."""
        weights = self.weights(lora_rank)
        config = SchedulerConfig(
            num_kv_blocks=self.loaded.capacity.num_kv_blocks,
            max_model_len=self.loaded.max_model_len,
            num_adapter_pages=int(limits.pop("num_adapter_pages", self.loaded.capacity.num_adapter_pages)),
            max_num_seqs=32,
            enable_prefix_cache=False,
            adapter_loading=loading,
            **limits,  # type: ignore[arg-type]
        )
        engine = Engine(config, self.loaded.runner)
        for name in (WARM, *(AdapterId(str(index)) for index in range(num_adapters))):
            self.loaded.adapters.staged[name] = weights
            engine.register_adapter(AdapterInfo(name, lora_rank, weights.pages.shape[0], weights.num_bytes))
        return engine


def request_of(name: str, adapter_id: AdapterId, seed: int, num_output: int = NUM_OUTPUT) -> Request:
    """A prompt unlike any other."""
    chance = random.Random(seed)
    prompt = tuple(chance.randrange(1, 60) for _ in range(NUM_PROMPT))
    sampling = SamplingParams(max_tokens=num_output, temperature=0.0)
    return Request(RequestId(name), prompt, sampling, 0.0, TenantId("t"), adapter_id)


def make_resident(engine: Engine, names: Sequence[AdapterId]) -> None:
    """Have every named adapter used once."""
    for name in names:
        engine.add(request_of(f"warm-up {name}", name, 0, num_output=1))
        while engine.has_work:
            engine.step(0.0)


def play(engine: Engine, arrivals: Sequence[Arrival]) -> Outcome:
    """Turn the engine in real time until every request has ended."""
    outcome, waiting = Outcome(), list(reversed(arrivals))
    start_s = time.perf_counter()
    while waiting or engine.has_work:
        now_s = time.perf_counter() - start_s
        while waiting and waiting[-1].at_s <= now_s:
            arrival = waiting.pop()
            request = request_of(str(len(outcome.arrivals)), arrival.adapter_id, len(outcome.arrivals))
            outcome.arrivals[request.request_id] = arrival
            engine.add(request)
        if not engine.has_work:
            time.sleep(max(0.0, waiting[-1].at_s - now_s))
            continue
        outputs = engine.step(now_s)
        now_s = time.perf_counter() - start_s
        for output in outputs:
            outcome.tokens_s.setdefault(output.request_id, []).extend([now_s] * len(output.new_token_ids))
    return outcome


def arrivals_of(rate_per_s: float, count: int, seed: int, choose: Callable[[int, random.Random], str]) -> list[Arrival]:
    """Poisson arrivals; ``choose`` names an adapter."""
    chance, at_s, found = random.Random(seed), 0.0, []
    for index in range(count):
        at_s += chance.expovariate(rate_per_s)
        name = AdapterId(choose(index, chance))
        found.append(Arrival(at_s, name, is_cold=name != WARM))
    return found


def calibrate(stand: Stand, options: argparse.Namespace) -> float:
    """Set the link's speed; returns requests per second that the engine can do at most with all adapters resident."""
    stand.pool.link_bytes_per_s = None
    engine = stand.engine("on_demand", 64, 0)
    make_resident(engine, [WARM])
    alone = [play(engine, [Arrival(0.0, WARM, is_cold=False)]).ttfts_ms()[0] for _ in range(5)]
    begin_s = time.perf_counter()
    play(engine, [Arrival(0.0, WARM, is_cold=False)] * 32)
    rate = 32 / (time.perf_counter() - begin_s)
    copy_s = options.copy_prefills * min(alone) / 1e3
    options.link_bytes_per_s = stand.weights(64).num_bytes / copy_s
    return rate


def cold_starts(stand: Stand, rate: float, options: argparse.Namespace) -> None:
    """Half of the requests are of adapters never used before; the others' is resident."""
    setup = results.setup(model=options.model, link_bytes_per_s=options.link_bytes_per_s)
    for lora_rank in options.ranks:
        for load in options.loads:
            for repeat in range(options.repeats):
                arrivals = arrivals_of(
                    load * rate, options.requests, repeat, lambda index, chance: str(index) if index % 2 else WARM
                )
                cold = [arrival.adapter_id for arrival in arrivals if arrival.is_cold]
                for way, loading in WAYS.items():
                    stand.pool.link_bytes_per_s = None
                    engine = stand.engine(loading, lora_rank, options.requests)
                    make_resident(engine, [WARM, *cold] if way == "oracle" else [WARM])
                    stand.pool.link_bytes_per_s = options.link_bytes_per_s
                    outcome = play(engine, arrivals)
                    row = {"kind": "cold_start", "way": way, "rank": lora_rank, "load": load, "repeat": repeat}
                    row["ttft_ms"] = [round(value, 3) for value in outcome.ttfts_ms(is_cold=True)]
                    row["itl_ms"] = [round(value, 3) for value in outcome.warm_itls_ms()]
                    results.append(options.output, {**setup, **row})
                    print(f"rank {lora_rank:3} load {load} {way:10} TTFT {np.mean(row['ttft_ms']):7.1f} ms")


def contention(stand: Stand, rate: float, options: argparse.Namespace) -> None:
    """Rows for eight adapters, more in use: every way under the limit, and every rule with the last way."""
    lora_rank = options.ranks[0]
    num_pages = ROWS_FOR * stand.weights(lora_rank).pages.shape[0]
    cases = [(way, "limit") for way in WAYS if way != "oracle"]
    cases += [("assist", rule) for rule in RULES if rule != "limit"]
    setup = results.setup(model=options.model, link_bytes_per_s=options.link_bytes_per_s)
    for count in options.counts:
        for repeat in range(options.repeats):
            arrivals = arrivals_of(
                0.5 * rate, options.requests, repeat, lambda index, chance, n=count: str(chance.randrange(n))
            )
            for way, rule in cases:
                engine = stand.engine(
                    WAYS[way], lora_rank, count, num_adapter_pages=num_pages, adapter_wait_limit_s=RULES[rule]
                )
                stand.pool.link_bytes_per_s = options.link_bytes_per_s
                found = play(engine, arrivals).ttfts_ms()
                row = {"kind": "contention", "way": way, "rule": rule, "count": count, "rank": lora_rank}
                results.append(options.output, {**setup, **row, "repeat": repeat, "ttft_ms": found})
                print(
                    f"{count:3} adapters {way:10} {rule:13} TTFT {np.median(found):7.1f}, at most {max(found):7.1f} ms"
                )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", dest="model", choices=SHAPES, default=BUNDLED_MODEL, help="of random weights; default: %(default)s"
    )
    parser.add_argument("--requests", type=results.positive, default=60, help="of one run")
    parser.add_argument("--copy-prefills", type=float, default=1.0, help="copies of rank 64 take so many prompts' time")
    parser.add_argument("--report", action="store_true", help="only write the page")
    results.add_arguments(parser, "cold-start", repeats=3)
    options = results.parse(parser, "cold-start", words)
    if not options.report:
        is_bundled = options.model == BUNDLED_MODEL
        path = checkpoint_dir(BUNDLED_MODEL) if is_bundled else assets.make(SHAPES[options.model]) / "model"
        options.ranks, options.loads, options.counts = RANKS, LOADS, COUNTS
        if options.quick:
            options.ranks, options.loads, options.counts, options.requests = (8,), (0.5,), (8, 16), 12
        stand = Stand(str(path), max(options.ranks), max(options.requests, *options.counts))
        rate = calibrate(stand, options)
        cold_starts(stand, rate, options)
        contention(stand, rate, options)
    cold_start_report.write(results.quick_folder() if options.quick else None)


if __name__ == "__main__":
    main()
