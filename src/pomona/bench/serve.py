"""`pomona bench serve` without its command line: find out what a server serves, load it, report.

Popularities run one after another over the same arrivals and lengths. Prompts differ from run to run, so that a later
run finds nothing of an earlier one in a prefix cache.
"""

import asyncio
import datetime
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import uvloop

import pomona
from pomona.bench.client import ServedModel, ServerClient
from pomona.bench.config import BASE_ONLY, ServeBenchConfig
from pomona.bench.load import PreparedRequest, RequestRecord, run_load
from pomona.bench.machine import describe_hardware, find_commit
from pomona.bench.prompts import PromptSource, completion_body, find_prompt_source
from pomona.bench.report import BenchReport, BenchSetup, RunReport, append_json_lines, check_writable, summarise
from pomona.core.errors import ConfigError
from pomona.workload.arrivals import AllAtOnce
from pomona.workload.popularity import BaseOnly, GroupKind, GroupPopularity, Popularity
from pomona.workload.spec import WorkloadRequest, WorkloadSpec, generate


@dataclass(frozen=True, slots=True)
class BenchProgress:
    """How far a benchmark is; handed out once per ended request."""

    popularity: str
    is_warmup: bool
    num_done: int
    num_requests: int
    """Of this popularity's run, or of its warm-up."""
    num_failed: int
    num_output_tokens: int
    """Received so far in this run."""


OnProgress = Callable[[BenchProgress], None]


@dataclass(frozen=True, slots=True)
class _Target:
    """What to ask the server for."""

    base_model: str
    adapters: tuple[str, ...]
    served_models: tuple[ServedModel, ...]
    prompts: PromptSource


async def run_serve_bench(config: ServeBenchConfig, on_progress: OnProgress | None = None) -> BenchReport:
    """Load the server as configured and return the measurements; append them to ``config.output_file`` if set.

    Args:
        config: what to do.
        on_progress: called whenever a request ends, on the event loop: must be quick.

    Raises:
        ConfigError: the server cannot be reached, serves nothing that fits, or fails every request of a warm-up; or
            ``output_file`` cannot be written.
    """
    started_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if config.output_file is not None:
        check_writable(config.output_file)
    async with ServerClient(config.base_url, config.api_key, config.request_timeout_s) as client:
        target = await _find_target(client, config)
        setup = _describe_setup(config, target, started_at)
        runs: list[RunReport] = []
        try:
            for popularity in config.popularities:
                runs.append(await _run(client, config, target, popularity, on_progress))
        finally:  # what was measured is kept, whatever ended the rest
            report = BenchReport(setup, tuple(runs))
            if config.output_file is not None:
                append_json_lines(report, config.output_file, with_requests=config.is_recording_requests)
    return report


def serve_bench(config: ServeBenchConfig, on_progress: OnProgress | None = None) -> BenchReport:
    """``run_serve_bench`` on an event loop of its own: uvloop's, which takes a third off the client's CPU time.

    Raises:
        ConfigError: as ``run_serve_bench``.
        KeyboardInterrupt: after Ctrl-C, once every stream is closed.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run_serve_bench(config, on_progress))


async def _find_target(client: ServerClient, config: ServeBenchConfig) -> _Target:
    served = await client.list_models()
    base_model = config.model or next((model.name for model in served if model.parent is None), None)
    if base_model is None:
        raise ConfigError(f"model: {config.base_url} lists no base model; name one")
    adapters = config.adapters or tuple(model.name for model in served if model.parent is not None)
    if not adapters and set(config.popularities) != {BASE_ONLY}:
        raise ConfigError(
            f"adapters: {config.base_url} lists none; load some, name some, or run popularity {BASE_ONLY}"
        )
    return _Target(base_model, adapters, served, await find_prompt_source(client, base_model))


def _describe_setup(config: ServeBenchConfig, target: _Target, started_at: str) -> BenchSetup:
    return BenchSetup(
        config=config,
        base_model=target.base_model,
        adapters=target.adapters,
        served_models=tuple(model.name for model in target.served_models),
        is_prompt_length_exact=target.prompts.is_exact,
        pomona_version=pomona.__version__,
        commit=find_commit(),
        client_hardware=describe_hardware(),
        started_at=started_at,
    )


def _workload(config: ServeBenchConfig, target: _Target, popularity: str) -> list[WorkloadRequest]:
    adapters: Popularity = BaseOnly()
    if popularity != BASE_ONLY:
        kind: GroupKind = popularity  # type: ignore[assignment]  # ServeBenchConfig has checked it
        adapters = GroupPopularity(kind, len(target.adapters), min(config.group_size, config.num_requests))
    return generate(
        WorkloadSpec(
            num_requests=config.num_requests,
            arrivals=config.arrivals,
            prompt_lengths=config.prompt_lengths,
            output_lengths=config.output_lengths,
            popularity=adapters,
            seed=config.seed,
        )
    )


def _prepare(
    config: ServeBenchConfig, target: _Target, workload: Sequence[WorkloadRequest], stream: str
) -> list[PreparedRequest]:
    """Encode every request. ``stream`` names the random stream of the prompts' contents."""
    rng = random.Random(f"{config.seed}/{stream}")
    options: dict[str, object] = {"temperature": config.temperature}
    if config.ignore_eos:
        options["ignore_eos"] = True
    prepared = []
    for request in workload:
        model = target.base_model if request.adapter_index is None else target.adapters[request.adapter_index]
        prompt = target.prompts.draw(rng, request.num_prompt_tokens)
        body = completion_body(model, prompt, request.num_output_tokens, **options)
        prepared.append(PreparedRequest(request.arrival_s, model, body))
    return prepared


class _ProgressCount:
    """Turns ended requests into BenchProgress."""

    def __init__(self, popularity: str, num_requests: int, on_progress: OnProgress | None, *, is_warmup: bool) -> None:
        self._progress = BenchProgress(popularity, is_warmup, 0, num_requests, 0, 0)
        self._on_progress = on_progress or (lambda progress: None)
        self._on_progress(self._progress)

    def add(self, record: RequestRecord) -> None:
        """Count one ended request and tell."""
        before = self._progress
        self._progress = replace(
            before,
            num_done=before.num_done + 1,
            num_failed=before.num_failed + (record.error is not None),
            num_output_tokens=before.num_output_tokens + (record.num_output_tokens or 0),
        )
        self._on_progress(self._progress)


def _choose_warmup(config: ServeBenchConfig, workload: Sequence[WorkloadRequest]) -> list[WorkloadRequest]:
    """The first request of each adapter; fewer, or the same again, if a number of requests is set. All at once."""
    first_of_each = {request.adapter_index: replace(request, arrival_s=0.0) for request in reversed(workload)}
    ordered = sorted(first_of_each.values(), key=lambda request: request.adapter_index or 0)
    num_requests = len(ordered) if config.num_warmup_requests is None else config.num_warmup_requests
    return list(itertools.islice(itertools.cycle(ordered), num_requests))


async def _warm_up(
    client: ServerClient, config: ServeBenchConfig, requests: list[PreparedRequest], count: _ProgressCount
) -> None:
    load = await run_load(client, requests, config.max_concurrency, count.add)
    failed = [record for record in load.records if record.error is not None]
    if failed and len(failed) == len(load.records):
        raise ConfigError(
            f"base_url: {config.base_url} failed all {len(failed)} warm-up requests; "
            f"{failed[0].model}: {failed[0].error}: {failed[0].error_message}"
        )


async def _run(
    client: ServerClient,
    config: ServeBenchConfig,
    target: _Target,
    popularity: str,
    on_progress: OnProgress | None,
) -> RunReport:
    workload = _workload(config, target, popularity)
    warmup = _prepare(config, target, _choose_warmup(config, workload), f"warm-up/{popularity}")
    await _warm_up(client, config, warmup, _ProgressCount(popularity, len(warmup), on_progress, is_warmup=True))
    requests = _prepare(config, target, workload, f"prompts/{popularity}")
    count = _ProgressCount(popularity, len(requests), on_progress, is_warmup=False)
    if config.arrivals == AllAtOnce():
        await client.open_connections(min(len(requests), config.max_concurrency or len(requests)))
    load = await run_load(client, requests, config.max_concurrency, count.add)
    return RunReport(summarise(popularity, load, config.slo), load.records)
