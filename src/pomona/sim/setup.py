"""From a spec to the objects of a simulation. Everything that can be refused is refused here, before time begins."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pomona.core.errors import ConfigError
from pomona.core.ids import TenantId
from pomona.metrics.slo import Slo
from pomona.router.autoscale import AutoscalerConfig
from pomona.router.fleet import RouterConfig
from pomona.sched.config import SchedulerConfig
from pomona.sim.cluster_config import MAX_REPLICAS, ClusterConfig, LossConfig
from pomona.sim.cost_model import CostModel, LinearCost
from pomona.sim.h200 import h200_cost
from pomona.sim.hardware import MACHINES, MODELS, RooflineCost, plan_memory
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.sim.profile_file import CostProfile
from pomona.sim.prompts import RecordedPrompts
from pomona.sim.sections import build
from pomona.sim.spec import ARRIVALS, LENGTHS, POPULARITIES, ReplicaSection, SimulationSpec
from pomona.workload.popularity import BaseOnly, GroupPopularity, Popularity, RecordedPopularity
from pomona.workload.servegen import client_requests, read_lengths, read_rates
from pomona.workload.spec import WorkloadRequest, WorkloadSpec, iter_requests
from pomona.workload.traces import READERS, TraceSelection, compose, read_lora_uses, read_spot_events

ReadLines = Callable[[str], list[str]]
"""The lines of a file that a spec names.

Raises:
    ConfigError: there is no such file, or it cannot be read.
"""

_NUM_SAMPLES = 300
_ENDLESS = 10**12
MAX_BLOCKS = 10_000_000
"""Most KV blocks, and most adapter pages, of a replica: the scheduler keeps a few numbers for each."""
_SIZES = (
    *("num_kv_blocks", "num_adapter_pages", "blocks_per_page"),
    *("max_model_len", "block_size", "max_num_batched_tokens", "max_num_seqs"),
)
_OF_MACHINES = ("num_devices", "use_tables", "adapter_share")


@dataclass(frozen=True, slots=True)
class Setup:
    """What a simulation is made of."""

    cluster: ClusterConfig
    adapters: AdapterPopulation
    prompts: RecordedPrompts | None
    workload: Iterator[WorkloadRequest]
    num_requests: int | None
    """Of the workload, if known."""
    cost_error: float | None
    """Median relative error of the profile on held-out steps; None for a machine from a data sheet."""
    beyond_profile: str
    """What may be larger than the profile saw, and is extrapolated; empty if nothing is."""


def prepare(spec: SimulationSpec, read_lines: ReadLines) -> Setup:
    """Build a simulation.

    Raises:
        ConfigError: the spec, or a file that it names, is wrong; the message begins with the key's path.
    """
    scheduler, cost_model, profile = _replica(spec, read_lines)
    pages = AdapterPages(rows_per_page=spec.replica.rows_per_page)
    adapters = AdapterPopulation(
        spec.adapters.lora_ranks, pages, extras_share=spec.adapters.extras_share, seed=spec.seed
    )
    popularity = _popularity(spec, read_lines)
    requests, num_requests, arriving_s, prompts = _workload(spec, popularity, read_lines)
    horizon_s = min(arriving_s, spec.until_s or math.inf)
    if not isinstance(popularity, BaseOnly):
        _check_ranks(spec, scheduler, pages)
        if profile is not None and not profile.adapters:
            raise ConfigError(
                "adapters.popularity: replica.profile was taken without adapters, which would cost nothing; take one "
                "with some (pomona profile --adapters-dir)"
            )
    if prompts is not None and spec.router.affinity.prefix_tokens != prompts.block_tokens:
        raise ConfigError(
            f"router.affinity.prefix_tokens is {spec.router.affinity.prefix_tokens}: must be {prompts.block_tokens}, "
            "what a hash of the trace stands for"
        )
    if spec.adapters.extras_share:
        _check_extras(spec.adapters.extras_share, cost_model, popularity)
    cluster = ClusterConfig(
        scheduler=scheduler,
        cost_model=cost_model,
        overlap_steps=spec.replica.overlap_steps,
        router=build(RouterConfig, spec.router, "router"),
        autoscaler=_autoscaler(spec),
        losses=_losses(spec, read_lines),
        slo=build(Slo, spec.slo, "slo"),
        sample_interval_s=spec.sample_interval_s or max(horizon_s, 1.0) / _NUM_SAMPLES,
        max_samples=None if spec.sample_interval_s else 2 * _NUM_SAMPLES + 1,
        seed=spec.seed,
        **spec.cluster.model_dump(),
    )
    cost_error = None if profile is None else profile.error.p50
    asked_ranks = () if isinstance(popularity, BaseOnly) else spec.adapters.lora_ranks
    beyond = "" if profile is None else _beyond(profile, scheduler, asked_ranks)
    return Setup(cluster, adapters, prompts, requests, num_requests, cost_error, beyond)


def _replica(spec: SimulationSpec, read_lines: ReadLines) -> tuple[SchedulerConfig, CostModel, CostProfile | None]:
    section: Any = spec.replica
    given = {name: getattr(section, name) for name in _SIZES if getattr(section, name) is not None}
    given |= {name: getattr(section, name) for name in ("max_waiting", "enable_prefix_cache", "adapter_wait_limit_s")}
    cost_model: CostModel
    profile: CostProfile | None = None
    if section.profile is not None:
        for name in _OF_MACHINES:
            if getattr(section, name) != ReplicaSection.model_fields[name].default:
                raise ConfigError(f"replica.{name} is {getattr(section, name)}: needs replica.machine, not a profile")
        text = "\n".join(_at("replica.profile", lambda: read_lines(str(section.profile))))
        profile = CostProfile.from_json(text, f"replica.profile: {section.profile}")
        sizes: dict[str, Any] = profile.replica.model_dump()
        cost_model = profile.cost_model
    else:
        if section.use_tables and section.machine != "H200":
            raise ConfigError(f"replica.use_tables: needs machine H200, not {section.machine}")
        machine, model = MACHINES[str(section.machine)], MODELS[str(section.model)]
        sizes = {"block_size": section.block_size or 16, "max_model_len": 8192}
        plan = _at(
            "replica.model",
            lambda: plan_memory(
                machine,
                model,
                num_devices=section.num_devices,
                block_size=sizes["block_size"],
                rows_per_page=section.rows_per_page,
                adapter_share=section.adapter_share,
            ),
        )
        sizes |= {"num_kv_blocks": plan.num_kv_blocks, "num_adapter_pages": plan.num_adapter_pages}
        cost_model = (
            _at("replica.model", lambda: h200_cost(model.name, section.num_devices, section.rows_per_page))
            if section.use_tables
            else RooflineCost(machine, model, section.rows_per_page, section.num_devices)
        )
    scheduler = _at("replica", lambda: SchedulerConfig(**(sizes | given)), joiner=".")
    num_lent = scheduler.num_adapter_pages * scheduler.blocks_per_page
    for name, number in (
        ("num_kv_blocks", scheduler.num_kv_blocks),
        ("num_adapter_pages", scheduler.num_adapter_pages),
        ("blocks_per_page", num_lent),
    ):
        if number > MAX_BLOCKS:
            raise ConfigError(f"replica.{name}: makes {number} blocks or pages: must be at most {MAX_BLOCKS}")
    num_slots = scheduler.num_kv_blocks * scheduler.block_size
    if num_slots < scheduler.max_model_len:
        # A sequence of full length must fit; a smaller context is what such a replica offers.
        if section.max_model_len is not None:
            raise ConfigError(
                f"replica.max_model_len is {scheduler.max_model_len}: the KV cache of {num_slots} tokens is smaller"
            )
        scheduler = replace(scheduler, max_model_len=num_slots)
    return scheduler, cost_model, profile


def _beyond(profile: CostProfile, scheduler: SchedulerConfig, lora_ranks: Sequence[int]) -> str:
    largest_rank = max((adapter.lora_rank for adapter in profile.adapters), default=0)
    sizes = [("adapters.lora_ranks", max(lora_ranks, default=0), largest_rank)]
    for name in ("max_model_len", "max_num_batched_tokens", "max_num_seqs"):
        sizes.append((f"replica.{name}", getattr(scheduler, name), getattr(profile.replica, name)))
    return ", ".join(f"{name} is {size} (measured: {seen})" for name, size, seen in sizes if size > seen)


def _popularity(spec: SimulationSpec, read_lines: ReadLines) -> Popularity:
    section: Any = spec.adapters.popularity
    path = "adapters.popularity"
    if section.kind == "recorded":
        uses, own_share = _at(f"{path}.file", lambda: read_lora_uses(read_lines(section.file)))
        share = section.base_share
        return RecordedPopularity(tuple(float(use) for use in uses), own_share if share is None else share)
    if section.kind == "group":
        grouped: Popularity = _at(
            path, lambda: GroupPopularity(section.groups, section.num_adapters, section.group_size), joiner="."
        )
        return grouped
    popularity: Popularity = build(POPULARITIES[section.kind], section, path)
    return popularity


def _workload(
    spec: SimulationSpec, popularity: Popularity, read_lines: ReadLines
) -> tuple[Iterator[WorkloadRequest], int | None, float, RecordedPrompts | None]:
    """The requests, how many, about how long they take to arrive, and their prompts if recorded."""
    section: Any = spec.workload
    tenants = tuple((TenantId(name), weight) for name, weight in spec.tenants.items())
    if section.kind == "trace":
        rows = _at("workload.file", lambda: READERS[section.format](read_lines(section.file)))
        selection = build(TraceSelection, section.selection, "workload.selection")
        chosen = _at("workload.selection", lambda: selection.apply(rows), joiner=".")
        hashes = [row.prefix_hashes for row in chosen]
        prompts = RecordedPrompts(hashes) if spec.replica.enable_prefix_cache and any(hashes) else None
        return compose(chosen, popularity, tenants, spec.seed), len(chosen), chosen[-1].arrival_s, prompts
    if section.kind == "clients":
        rates = _at("workload.rates_file", lambda: read_rates(read_lines(section.rates_file)))
        lengths = _at("workload.lengths_file", lambda: read_lengths(read_lines(section.lengths_file)))
        if "tenants" in spec.model_fields_set:
            raise ConfigError("tenants: leave it out; in workload.rates_file every client is a tenant of its own")
        clients = client_requests(rates, lengths, section.start_s, section.duration_s, spec.seed)
        first = next(clients, None)
        if first is None:
            span = f"{section.start_s:g} to {section.start_s + section.duration_s:g} s"
            raise ConfigError(f"workload.start_s: no client sends anything from {span}")
        composed = compose(itertools.chain((first,), clients), popularity, tenants, spec.seed)
        return composed, None, section.duration_s, None
    synthetic = WorkloadSpec(
        num_requests=section.num_requests or _ENDLESS,
        arrivals=build(ARRIVALS[section.arrivals.kind], section.arrivals, "workload.arrivals"),
        prompt_lengths=build(LENGTHS[section.prompt_lengths.kind], section.prompt_lengths, "workload.prompt_lengths"),
        output_lengths=build(LENGTHS[section.output_lengths.kind], section.output_lengths, "workload.output_lengths"),
        popularity=popularity,
        tenant_weights=tenants,
        seed=spec.seed,
    )
    requests = iter_requests(synthetic)
    rate = getattr(section.arrivals, "rate_per_s", float("inf"))
    if section.num_requests is not None:
        return requests, section.num_requests, section.num_requests / rate, None
    end_s: float = section.duration_s
    until_end = itertools.takewhile(lambda request: request.arrival_s < end_s, requests)
    return until_end, round(end_s * rate), end_s, None


def _check_ranks(spec: SimulationSpec, scheduler: SchedulerConfig, pages: AdapterPages) -> None:
    for index, lora_rank in enumerate(spec.adapters.lora_ranks):
        if pages.num_pages(lora_rank) > scheduler.num_adapter_pages:
            raise ConfigError(
                f"adapters.lora_ranks.{index} is {lora_rank}: needs {pages.num_pages(lora_rank)} adapter pages, a "
                f"replica has {scheduler.num_adapter_pages}"
            )


def _check_extras(extras_share: float, cost_model: CostModel, popularity: Popularity) -> None:
    field = f"adapters.extras_share is {extras_share:g}"
    if isinstance(popularity, BaseOnly):
        raise ConfigError(f"{field}: no request asks for an adapter; set adapters.popularity")
    if not isinstance(cost_model, LinearCost):
        raise ConfigError(f"{field}: needs replica.profile; a data sheet does not say what such adapters cost")
    if not any(term.quantity in ("has_extras", "num_extra_adapters") for term in cost_model.terms):
        raise ConfigError(
            f"{field}: in replica.profile such adapters cost nothing more than others; take one with some of them "
            "(pomona profile --adapters-dir), or leave this at 0"
        )


def _autoscaler(spec: SimulationSpec) -> AutoscalerConfig:
    config = build(AutoscalerConfig, spec.autoscaler, "autoscaler")
    if config.policy == "fixed":
        return replace(config, min_replicas=spec.cluster.num_replicas, max_replicas=spec.cluster.num_replicas)
    if config.max_replicas > MAX_REPLICAS:
        raise ConfigError(f"autoscaler.max_replicas is {config.max_replicas}: must be at most {MAX_REPLICAS}")
    if not config.min_replicas <= spec.cluster.num_replicas <= config.max_replicas:
        raise ConfigError(
            f"cluster.num_replicas is {spec.cluster.num_replicas}: must be from autoscaler.min_replicas "
            f"({config.min_replicas}) to autoscaler.max_replicas ({config.max_replicas}), between which "
            f"{config.policy} keeps the fleet"
        )
    return config


def _losses(spec: SimulationSpec, read_lines: ReadLines) -> LossConfig:
    section: Any = spec.losses
    values = {name: getattr(section, name) for name in LossConfig.__dataclass_fields__}
    if section.capacity_file is not None:
        if section.capacity:
            raise ConfigError("losses.capacity: leave it out; losses.capacity_file says what there is")
        events = _at("losses.capacity_file", lambda: read_spot_events(read_lines(section.capacity_file)))
        values["capacity"] = ((0.0, 0), *events)
    elif section.capacity_start_s:
        raise ConfigError(f"losses.capacity_start_s is {section.capacity_start_s:g}: needs losses.capacity_file")
    losses: LossConfig = _at("losses", lambda: LossConfig(**values), joiner=".")
    if section.capacity_file is not None:
        losses = losses.since(section.capacity_start_s)
    if losses.capacity and losses.capacity[-1][1] == 0 and spec.until_s is None:
        key = "capacity" if section.capacity_file is None else "capacity_file"
        raise ConfigError(f"losses.{key}: ends with no instance, and requests may wait for one for ever: set until_s")
    return losses


def _at(path: str, make: Callable[[], Any], joiner: str = ": ") -> Any:
    """What ``make`` returns; its refusal with the key's path before it."""
    try:
        return make()
    except ConfigError as error:
        raise ConfigError(f"{path}{joiner}{error}") from error
