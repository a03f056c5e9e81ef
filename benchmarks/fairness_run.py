"""One workload under one policy: in virtual time on the simulator's replica, or live on the bundled model."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pomona.bench.percentiles import percentile
from pomona.cli.build import BuildEngine
from pomona.core.errors import PomonaError
from pomona.core.ids import RequestId, TenantId
from pomona.core.output import RequestOutput
from pomona.core.request import Request, SamplingParams, ServiceLevel
from pomona.driver.loop import EngineParts
from pomona.engine.engine import Engine
from pomona.metrics.fairness import (
    Difference,
    ServiceLog,
    ServiceSpan,
    accumulated_gap,
    jain_index,
    windowed_difference,
)
from pomona.sched.config import SchedulerConfig
from pomona.sched.fairness import FairnessConfig, ServicePrices
from pomona.sim.clock import EventHeap
from pomona.sim.cost_model import CostTerm, LinearCost
from pomona.sim.executor import SimExecutor
from pomona.sim.replica import SimReplica
from pomona.workload.spec import WorkloadRequest

PRICES = ServicePrices()
"""One unit per input token, two per output token, as in the paper."""
A10G = LinearCost(
    0.0182,
    (CostTerm("num_decode_rows", 2.16e-4), CostTerm("num_prefill_rows", 2.09e-4), CostTerm("num_kv_tokens", 1.89e-6)),
)
"""Fitted to the VTC artifact's profile of Llama-2-7B on an A10G (fair_bench/cost_profile.json, 23 measurements; mean
error 3.5 %)."""
REPLICA = SchedulerConfig(
    num_kv_blocks=625,  # 10,000 tokens, as in the paper
    max_model_len=2048,
    block_size=16,
    max_num_batched_tokens=2048,
    max_num_seqs=256,
    max_waiting=100_000,
    enable_prefix_cache=False,
    min_prefix_wait_tokens=0,
    reserve_steps=128,
)
"""The reserve makes preemption rare, as the paper's replica knows none, and its throughput on the Arena trace the
paper's."""

_BASE = FairnessConfig(policy="fcfs", has_seats=False)
POLICIES: Mapping[str, FairnessConfig] = {
    "FCFS": _BASE,
    "RPM 20": replace(_BASE, policy="rpm", requests_per_minute=20),
    "LCF": replace(_BASE, policy="lcf"),
    "VTC": replace(_BASE, policy="vtc"),
    "VTC, mean": replace(_BASE, policy="vtc", prediction="mean"),
    "VTC, oracle": replace(_BASE, policy="vtc", prediction="max_tokens"),
    "WVTC": replace(_BASE, policy="wvtc"),
    "WVTC, seats": replace(_BASE, policy="wvtc", has_seats=True),
    "DRR": replace(_BASE, policy="drr", quantum=500.0),  # a twentieth of the pool, as in the artifact
}
"""Those of the paper are not preemptive for fairness's sake; with seats is how the server comes."""


@dataclass(slots=True)
class _Progress:
    request: WorkloadRequest
    first_token_s: float | None = None
    end_s: float = math.inf
    num_output: int = 0


@dataclass(slots=True)
class Outcome:
    """What happened to a workload's requests."""

    duration_s: float
    """Of the arrivals; service is compared up to here."""
    weights: Mapping[TenantId, float]
    log: ServiceLog = field(default_factory=ServiceLog)
    """Service divided by weight."""
    num_rejected: int = 0
    num_preemptions: int = 0
    end_s: float = 0.0
    _progress: dict[RequestId, _Progress] = field(default_factory=dict)

    def start(self, request_id: RequestId, request: WorkloadRequest) -> None:
        """Note an arrival."""
        self._progress[request_id] = _Progress(request)

    def take(self, outputs: Sequence[RequestOutput], now_s: float) -> None:
        """Note outputs: input counts as given with the first token, as the artifact has it."""
        for output in outputs:
            one = self._progress[output.request_id]
            tenant_id = one.request.tenant_id
            num_input = 0
            if one.first_token_s is None and output.new_token_ids:
                one.first_token_s = now_s
                num_input = one.request.num_prompt_tokens
            one.num_output += len(output.new_token_ids)
            service = PRICES.per_input_token * num_input + PRICES.per_output_token * len(output.new_token_ids)
            self.log.add(tenant_id, now_s, service / self.weights.get(tenant_id, 1.0))
            if output.finish_reason is not None:
                one.end_s = self.end_s = now_s

    @property
    def tenants(self) -> list[TenantId]:
        """Everybody who asked."""
        return list(dict.fromkeys(one.request.tenant_id for one in self._progress.values()))

    def ttfts_s(self, tenant_id: TenantId) -> list[float]:
        """Times to first token of a tenant's served requests, ascending."""
        mine = (one for one in self._progress.values() if one.request.tenant_id == tenant_id)
        return sorted(one.first_token_s - one.request.arrival_s for one in mine if one.first_token_s is not None)

    def gaps(self, step_s: float) -> list[tuple[float, float]]:
        """(time, accumulated gap), up to the last arrival."""
        times = [index * step_s for index in range(1, int(self.duration_s / step_s) + 1)]
        return [(time_s, accumulated_gap(self.log, self.tenants, time_s)) for time_s in times]

    def difference(self) -> Difference:
        """The windowed difference, in windows of a minute, or a tenth of a shorter run."""
        window_s = min(60.0, self.duration_s / 10)
        step_s = window_s / 12
        times = [window_s / 2 + index * step_s for index in range(int((self.duration_s - window_s) / step_s) + 1)]
        return windowed_difference(self._spans(), times, window_s)

    def row(self) -> dict[str, object]:
        """The numbers of a row of results."""
        gaps = [gap for _, gap in self.gaps(self.duration_s / 360)]
        difference = self.difference()
        totals = [self.log.total(tenant_id, self.duration_s) for tenant_id in self.tenants]
        served = [one for one in self._progress.values() if one.first_token_s is not None]
        num_tokens = sum(one.num_output + one.request.num_prompt_tokens for one in served)
        return {
            "num_requests": len(self._progress),
            "num_rejected": self.num_rejected,
            "num_preemptions": self.num_preemptions,
            "throughput_tokens_per_s": num_tokens / self.end_s,
            "end_s": self.end_s,
            "gap_largest": max(gaps),
            "gap_at_end": gaps[-1],
            "difference_largest": difference.largest,
            "difference_mean": difference.mean,
            "jain": jain_index(totals),
            "ttft_s": {
                str(tenant_id): {"p50": percentile(found, 0.5), "p99": percentile(found, 0.99)}
                for tenant_id in self.tenants
                if (found := self.ttfts_s(tenant_id))
            },
        }

    def _spans(self) -> list[ServiceSpan]:
        spans = []
        for one in self._progress.values():
            request = one.request
            service = request.num_prompt_tokens + 2.0 * request.num_output_tokens
            first_s = math.inf if one.first_token_s is None else one.first_token_s
            spans.append(ServiceSpan(request.tenant_id, request.arrival_s, first_s, one.end_s, service))
        return spans


def engine_request(
    index: int, request: WorkloadRequest, weights: Mapping[TenantId, float], arrival_s: float, vocab: int = 300
) -> Request:
    """A prompt of its own, and exactly as much output as asked."""
    tokens = tuple((index * 7919 + position * 31) % vocab for position in range(request.num_prompt_tokens))
    return Request(
        request_id=RequestId(f"r{index}"),
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=request.num_output_tokens, temperature=0.0),
        arrival_s=arrival_s,
        tenant_id=request.tenant_id,
        service_level=ServiceLevel(weight=weights.get(request.tenant_id, 1.0)),
    )


def simulate(
    requests: Sequence[WorkloadRequest],
    weights: Mapping[TenantId, float],
    duration_s: float,
    fairness: FairnessConfig,
    config: SchedulerConfig = REPLICA,
) -> Outcome:
    """Run a workload in virtual time, to the end of its last request."""
    heap = EventHeap()
    outcome = Outcome(duration_s, weights)

    def reject(request: Request, error: PomonaError) -> None:
        outcome.num_rejected += 1

    replica = SimReplica(
        replace(config, fairness=fairness),
        SimExecutor(A10G, {}),
        heap,
        lambda outputs: outcome.take(outputs, heap.now_s),
        reject,
    )

    def arrive(index: int) -> None:
        request = engine_request(index, requests[index], weights, heap.now_s)
        outcome.start(request.request_id, requests[index])
        replica.submit(request)

    for index, request in enumerate(requests):
        heap.at(request.arrival_s, lambda index=index: arrive(index))
    heap.run()
    outcome.num_preemptions = replica.stats.num_preemptions
    return outcome


def live(
    parts: EngineParts,
    requests: Sequence[WorkloadRequest],
    weights: Mapping[TenantId, float],
    duration_s: float,
    *,
    drains: bool = False,
) -> Outcome:
    """Run a workload on an engine in real time, as its loop would; what has not ended with the arrivals is aborted,
    unless ``drains``."""
    engine: Engine = parts.engine
    outcome = Outcome(duration_s, weights)
    start_s = time.monotonic()
    index = 0
    while index < len(requests) or engine.has_work:
        now_s = time.monotonic() - start_s
        while index < len(requests) and requests[index].arrival_s <= now_s:
            request = engine_request(index, requests[index], weights, start_s + requests[index].arrival_s)
            outcome.start(request.request_id, requests[index])
            index += 1
            try:
                engine.add(request)
            except PomonaError:
                outcome.num_rejected += 1
        if engine.has_work:
            outputs = engine.step(time.monotonic())
            outcome.take(outputs, time.monotonic() - start_s)
        else:
            time.sleep(0.0005)
        if not drains and now_s > duration_s:
            break
    outcome.num_preemptions = engine.stats().num_preemptions
    for number in range(index):
        engine.abort(RequestId(f"r{number}"))
    while engine.has_work:
        engine.step(time.monotonic())
    outcome.end_s = time.monotonic() - start_s
    return outcome


def rebuilt(builder: BuildEngine, **changes: object) -> EngineParts:
    """An engine with other settings."""
    return replace(builder, config=builder.config.model_copy(update=changes))()
