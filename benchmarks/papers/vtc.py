"""VTC's overload (Sheng et al., OSDI 2024): two clients of 1.5 and 3 requests/s on one A10G that serves 1.7, for
360 s; how far apart the service is that they received. First come, first served gives twice the requests twice the
service; fair scheduling gives both the same.

    python -m benchmarks.papers.vtc

The step's cost is fitted to the authors' profile of the card; the scheduler is Pomona's, with first come first served,
with VTC as published, and with its own default, which also bounds how far running requests may get ahead.
"""

import json

import numpy as np

from benchmarks.papers.lines import Line, Panel, line_chart
from benchmarks.papers.published import DATA, Report, arguments
from pomona.core.ids import TenantId
from pomona.router.autoscale import AutoscalerConfig
from pomona.sched.config import SchedulerConfig
from pomona.sched.fairness import FairnessConfig
from pomona.sim.cluster import ClusterSim
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.cost_model import CostTerm, LinearCost
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.workload.spec import WorkloadRequest

DURATION_S, NUM_TOKENS, POOL_TOKENS = 360.0, 256, 10_000
RATES_RPS = (1.5, 3.0)
PUBLISHED = {
    "fcfs": {60: 25141, 120: 52404, 180: 79102, 240: 105187, 300: 131187, 360: 157458},
    "vtc": {60: 4916, 120: 1545, 180: 3029, 240: 7357, 300: 81, 360: 1405},
}
"""Seconds -> difference of the service so far (prompt tokens + 2 output tokens), computed from the artifact's result
files (Ying1123/VTC-artifact @ 192c2e2, all_results_overload.jsonl), outputs spread evenly over their request."""
FAIRNESS = {
    "fcfs": FairnessConfig("fcfs"),
    "vtc": FairnessConfig("vtc", max_lead=1e12, has_seats=False),
    "default": FairnessConfig(),
}


def fit_cost() -> LinearCost:
    """Decode seconds per row and KV token, and prefill seconds per token, from the profile: input length -> output
    length -> (batch that fits, prefill seconds per request, decode seconds per request)."""
    profile = json.loads((DATA / "vtc_a10g_llama7b.json").read_text())
    features, step_s, token_s = [], [], []
    for prompt, outputs in profile.items():
        for output, (batch, prefill_s, decode_s) in outputs.items():
            num_prompt, num_output = int(prompt), int(output)
            if num_prompt >= 64:
                token_s.append(prefill_s / num_prompt)
            if num_output >= 64:
                features.append((1.0, batch, batch * (num_prompt + num_output / 2)))
                step_s.append(decode_s * batch / num_output)
    matrix, wanted = np.array(features), np.array(step_s)
    weights, *_ = np.linalg.lstsq(matrix / wanted[:, None], np.ones(len(wanted)), rcond=None)
    base_s, row_s, kv_s = weights.tolist()
    assert min(weights) >= 0.0
    prefill = CostTerm("num_prefill_rows", float(np.median(token_s)))
    return LinearCost(base_s, (CostTerm("num_decode_rows", row_s), CostTerm("num_kv_tokens", kv_s), prefill))


def requests() -> list[WorkloadRequest]:
    """Both clients at even gaps."""
    found = [
        WorkloadRequest((k + 1) / rate, NUM_TOKENS, NUM_TOKENS, None, TenantId(f"client-{rate:g}"))
        for rate in RATES_RPS
        for k in range(int(DURATION_S * rate))
    ]
    return sorted(found, key=lambda request: (request.arrival_s, request.tenant_id))


def simulate(policy: str, duration_s: float = DURATION_S) -> ClusterSim:
    scheduler = SchedulerConfig(
        num_kv_blocks=POOL_TOKENS // 16,
        max_model_len=1024,
        max_waiting=100_000,
        enable_prefix_cache=False,
        min_prefix_wait_tokens=0,
        # VTC's test reserves what running requests may still need, so nothing it admits is preempted.
        reserve_steps=NUM_TOKENS,
        fairness=FAIRNESS[policy],
    )
    config = ClusterConfig(scheduler, fit_cost(), autoscaler=AutoscalerConfig(interval_s=1e4), sample_interval_s=1.0)
    sim = ClusterSim(config, AdapterPopulation((8,), AdapterPages()))
    sim.run(requests(), duration_s)
    return sim


def gaps(sim: ClusterSim) -> list[tuple[float, float]]:
    """(seconds, difference of service so far)."""
    names = [TenantId(f"client-{rate:g}") for rate in RATES_RPS]
    found = []
    for sample in sim.samples:
        served = [sample.service.get(name, 0.0) for name in names]
        found.append((sample.now_s, max(served) - min(served)))
    return found


def main() -> None:
    options = arguments(__doc__, "vtc").parse_args()
    report = Report("vtc", options.output)
    found = {}
    for policy in FAIRNESS:
        sim = simulate(policy)
        found[policy] = gaps(sim)
        at = dict(found[policy])
        service = sim.samples[-1].service
        report.add(
            "overload",
            {
                "policy": policy,
                "gap_at_360_s": found[policy][-1][1],
                "published_gap_at_360_s": PUBLISHED.get(policy, {}).get(360),
                "largest_gap": max(gap for _, gap in found[policy]),
                "published_largest_at_marks": max(PUBLISHED[policy].values()) if policy in PUBLISHED else None,
                "gap_by_minute": {second: at.get(float(second)) for second in (60, 120, 180, 240, 300)},
                "requests_per_s": sum(service.values()) / (3 * NUM_TOKENS) / DURATION_S,
                "num_preemptions": sum(record.num_preemptions for record in sim.replicas.values()),
            },
        )
    report.draw(chart(found))


def chart(found: dict[str, list[tuple[float, float]]]) -> str:
    def lines(policies: tuple[str, ...]) -> tuple[Line, ...]:
        published = [
            Line(f"published {policy}", tuple(PUBLISHED[policy].items()), is_dots=True)
            for policy in policies
            if policy in PUBLISHED
        ]
        return (*published, *(Line(policy, tuple(found[policy])) for policy in policies))

    panels = [
        Panel("difference of service, first come first served", lines(("fcfs",))),
        Panel("difference of service, fair", lines(("vtc", "default"))),
    ]
    return line_chart("VTC's overload: two clients, one replica", "seconds", panels)


if __name__ == "__main__":
    main()
