"""Fairness between tenants: every policy on the VTC paper's workloads and on its Arena trace, in virtual time; and the
paper's workloads live on the bundled model, in proportion. Writes rows, charts, and docs/benchmarks/fairness.md.

    python -m benchmarks.fairness                              # in virtual time: three minutes
    python -m benchmarks.fairness --live                       # in real time: about a quarter of an hour
    python -m benchmarks.fairness --live --workload overload   # one of them
    python -m benchmarks.fairness --report            # the page from the rows there are
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import fairness_report, results
from benchmarks.fairness_run import POLICIES, REPLICA, Outcome, live, rebuilt, simulate
from benchmarks.fairness_workloads import (
    ARENA_S,
    LIVE_S,
    REPLICA_RPS,
    SYNTHETIC,
    Client,
    FairnessWorkload,
    arena,
    hastened,
    hastened_arena,
)
from pomona.cli.build import engine_builder
from pomona.cli.config import load_config
from pomona.core.ids import TenantId

LIVE_SEQS, LIVE_TOKENS = 16, 64


def row_of(workload: str, policy: str, outcome: Outcome) -> dict[str, Any]:
    """The numbers of a run, with the gap over time where it is drawn."""
    curve = {"gaps": outcome.gaps(outcome.duration_s / 90)} if "overload" in workload else {}
    return {"kind": "fairness", "workload": workload, "policy": policy, **outcome.row(), **curve}


def simulate_all(path: Path, names: Sequence[str]) -> None:
    """Every policy on every workload in virtual time."""
    setup = results.setup(bound=replace(REPLICA, fairness=POLICIES["VTC"]).service_bound, mode="simulated")
    traces = [(one.name, one.requests(), one.weights, one.duration_s) for one in SYNTHETIC]
    traces.append(("arena", arena(), {}, ARENA_S))
    for name, requests, weights, duration_s in traces:
        for policy, fairness in POLICIES.items():
            if names and name not in names:
                continue
            row = row_of(name, policy, simulate(requests, weights, duration_s, fairness))
            results.append(path, {**setup, **row})
            print(f"{name:20} {policy:14} gap {row['gap_largest']:8.0f} mean difference {row['difference_mean']:6.1f}")


def live_all(path: Path, names: Sequence[str]) -> None:
    """Every policy on the paper's workloads in real time, hastened to what the bundled model can do."""
    config = load_config({"max_num_seqs": LIVE_SEQS, "max_model_len": 1024, "prefix_cache": False})
    builder = engine_builder(config)
    # What the batch can hold is what a tenant may be ahead: the KV cache is far larger than the batch.
    max_lead = 2.0 * LIVE_SEQS * 2 * LIVE_TOKENS
    trial = FairnessWorkload("trial", (Client("a", 1000.0, LIVE_TOKENS, LIVE_TOKENS),), 2.0)
    served = live(rebuilt(builder), trial.requests(), trial.weights, trial.duration_s)
    rate = served.log.total(TenantId("a"), 2.0) / 2.0 / (3 * LIVE_TOKENS)
    setup = results.setup(mode="live", rate_per_s=rate, max_lead=max_lead)
    workloads = [hastened(one, rate) for one in SYNTHETIC]
    traces = [(one.name, one.requests(), one.weights, one.duration_s) for one in workloads]
    traces.append(("live arena", hastened_arena(rate), {}, LIVE_S * REPLICA_RPS / rate))
    for name, requests, weights, duration_s in traces:
        if names and name.removeprefix("live ") not in names:
            continue
        for policy, fairness in POLICIES.items():
            parts = rebuilt(
                builder,
                fairness=fairness.policy,
                fairness_prediction=fairness.prediction,
                fairness_seats=fairness.has_seats,
                fairness_max_lead=max_lead,
                # A run is shorter than a minute: it gets what its workload's minutes would together.
                fairness_requests_per_minute=round(fairness.requests_per_minute * LIVE_S / 60.0),
                max_waiting=1_000_000,
            )
            row = row_of(name, policy, live(parts, requests, weights, duration_s))
            bound = 2.0 * (max_lead + max(LIVE_TOKENS, 2 * LIVE_SEQS))
            results.append(path, {**setup, **row, "bound": bound})
            print(f"{name:25} {policy:14} gap {row['gap_largest']:8.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", action="store_true", help="in real time on the bundled model")
    parser.add_argument("--report", action="store_true", help="only write the page")
    names = [*(one.name for one in SYNTHETIC), "arena"]
    parser.add_argument("--workload", choices=names, action="append", default=[], help="only this one; repeatable")
    parser.add_argument("--output", type=Path, default=results.RESULTS / f"{results.today()}-fairness.jsonl")
    options = parser.parse_args()
    if options.live:
        live_all(options.output, options.workload)
    elif not options.report:
        simulate_all(options.output, options.workload)
    fairness_report.write()


if __name__ == "__main__":
    main()
