"""A plan in words and as JSON: the answer, the check with one replica fewer, what binds, the curve around it."""

import json
from dataclasses import asdict

from pomona.sched.config import SchedulerConfig
from pomona.sim.plan_search import Plan, PlanSettings, TrialOutcome
from pomona.sim.population import AdapterPages

BINDING_WORDS = {
    "compute": "compute: step times halved",
    "kv": "KV memory: four times the blocks",
    "adapter memory": "adapter memory: four times the pages",
    "cold starts": "cold starts: copies of adapters free",
}
"""Resource -> how it was made plentiful."""


def plan_fields(plan: Plan, replica: SchedulerConfig, pages: AdapterPages) -> dict[str, object]:
    """The plan as values for JSON.

    Args:
        plan: the answer.
        replica: a replica of the answer.
        pages: of the adapters.
    """
    return {
        "answer": asdict(plan.settings)
        | {
            "num_kv_blocks": replica.num_kv_blocks,
            "num_adapter_pages": replica.num_adapter_pages,
            "adapter_rank_rows": replica.num_adapter_pages * pages.rows_per_page,
        },
        "outcome": asdict(plan.outcome),
        "one_fewer": None if plan.one_fewer is None else asdict(plan.one_fewer),
        "one_fewer_settings": None if plan.one_fewer_settings is None else asdict(plan.one_fewer_settings),
        "binds": plan.binds,
        "binding": plan.binding,
        "curve": plan.curve,
        "sensitivity": plan.sensitivity,
        "num_trials": plan.num_trials,
    }


def plan_json(plan: Plan, replica: SchedulerConfig, pages: AdapterPages) -> str:
    """One line of JSON."""
    return json.dumps(plan_fields(plan, replica, pages))


def plan_text(plan: Plan, replica: SchedulerConfig, pages: AdapterPages, wanted: float) -> str:
    """The plan for people.

    Args:
        plan: the answer.
        replica: a replica of the answer.
        pages: of the adapters.
        wanted: the attainment that was asked for.
    """
    settings = plan.settings
    num_rows, num_tokens = replica.num_adapter_pages * pages.rows_per_page, replica.num_kv_blocks * replica.block_size
    lines = [
        f"{_replicas(settings.num_replicas)}, {_settings(settings)}: each {num_rows} rank rows of adapters and "
        f"{num_tokens} KV tokens",
        f"  whole workload: {_outcome(plan.outcome)}; wanted {wanted:.1%}",
    ]
    if plan.one_fewer is not None and plan.one_fewer_settings is not None:
        lines.append(f"  one replica fewer, best settings ({_settings(plan.one_fewer_settings)}): misses it")
        lines.append(f"    {_outcome(plan.one_fewer)}")
    if plan.one_fewer is None:
        lines.append(f"What binds at twice the rate: {plan.binds}. Attainment there when it is plentiful:")
    else:
        lines.append(f"What binds below that: {plan.binds}. Attainment with one replica fewer when it is plentiful:")
    lines.append(f"  as it is                                  {plan.binding['none']:7.1%}")
    for name, words in BINDING_WORDS.items():
        lines.append(f"  {words:<40}  {plan.binding[name]:7.1%}")  # type: ignore[index]
    lines.append("Attainment in the search window by replicas:")
    lines += [f"  {count:4d}  {share:7.1%}" for count, share in plan.curve]
    lines.append("and with the answer changed in one thing:")
    lines += [f"  {what:<24}  {share:7.1%}" for what, share in plan.sensitivity]
    lines.append(f"{plan.num_trials} simulations.")
    return "\n".join(lines)


def _replicas(num_replicas: int) -> str:
    return "1 replica" if num_replicas == 1 else f"{num_replicas} replicas"


def _settings(settings: PlanSettings) -> str:
    share = "" if settings.adapter_share is None else f", adapter share {settings.adapter_share:g}"
    return f"router {settings.policy}{share}"


def _outcome(outcome: TrialOutcome) -> str:
    ttft = "-" if outcome.ttft_p99_s is None else f"{outcome.ttft_p99_s:.2f} s"
    tpot = "-" if outcome.tpot_p99_s is None else f"{1e3 * outcome.tpot_p99_s:.0f} ms"
    return (
        f"attainment {outcome.attainment:.1%}, TTFT p99 {ttft}, TPOT p99 {tpot}, replicas busy {outcome.busy_share:.0%}"
    )
