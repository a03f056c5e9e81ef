"""The simulator makes the live engine's decisions: one workload, told to a live engine in its thread and then, at the
same moments, to the simulator, gives the same plans byte for byte.
"""

import asyncio
import random
import time
from dataclasses import replace

import msgspec
import pytest

from pomona.core.engine_info import EngineInfo
from pomona.core.ids import RequestId
from pomona.core.request import Request, SamplingParams
from pomona.driver.local_client import LocalClient
from pomona.driver.loop import EngineParts
from pomona.engine.engine import Engine
from pomona.runner.config import RunnerConfig
from pomona.runner.loading import load_runner
from pomona.sched.config import SchedulerConfig
from pomona.sim import cluster
from pomona.sim.clock import EventHeap
from pomona.sim.cluster import ClusterSim
from pomona.sim.replica import SimReplica
from pomona.sim.setup import prepare
from pomona.sim.spec import parse_spec
from support.adapters import make_adapter
from support.models import make_checkpoint
from support.recording import RecordedCost, RecordingEngine, RecordingExecutor, RecordingSimExecutor
from support.sim import make_profile, make_spec

VOCAB_SIZE = 131
NUM_REQUESTS = 40


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A loaded runner with three adapters, two of which fit the device, and a scheduler short of everything."""
    folder = tmp_path_factory.mktemp("same")
    base = make_checkpoint(folder / "base", "llama")
    loaded = load_runner(
        RunnerConfig(str(base), dtype="float32", device="cpu", block_size=4, max_num_seqs=8, num_threads=1)
    )
    adapters = [
        loaded.adapters.stage(str(make_adapter(folder / f"a{index}", base, seed=index, r=lora_rank)))
        for index, lora_rank in enumerate((4, 8, 16))
    ]
    config = SchedulerConfig(
        num_kv_blocks=46,
        num_adapter_pages=6,
        max_model_len=128,
        block_size=4,
        max_num_batched_tokens=32,
        max_num_seqs=8,
        reserve_steps=1,
        min_prefix_wait_tokens=8,
        adapter_wait_limit_s=0.02,
    )
    assert sum(adapter.num_pages for adapter in adapters) > config.num_adapter_pages
    return loaded, adapters, config


def make_requests(adapters):
    chance = random.Random(3)
    shared = [chance.randrange(VOCAB_SIZE) for _ in range(24)]
    for index in range(NUM_REQUESTS):
        own = [chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(1, 40))]
        adapter = chance.choice([None, *adapters])
        yield Request(
            RequestId(f"r{index}"),
            tuple(chance.choice([[], shared]) + own),
            SamplingParams(
                max_tokens=chance.randrange(1, 60),
                temperature=chance.choice([0.0, 1.0]),
                seed=index,
                stop_token_ids=(7, 77),
            ),
            arrival_s=0.0,
            adapter_id=adapter and adapter.adapter_id,
        )


async def run_live(client, requests):
    """Send half of the requests at once, more than there is room for, and half at irregular moments; every sixth client
    goes away early."""

    async def ask(index, request):
        stream = client.submit(replace(request, arrival_s=time.monotonic()))
        async for _ in stream:
            if index % 6 == 5:
                await stream.aclose()
                return

    chance = random.Random(4)
    asking = []
    for index, request in enumerate(requests):
        asking.append(asyncio.create_task(ask(index, request)))
        if index >= NUM_REQUESTS // 2:
            await asyncio.sleep(chance.choice([0.0, 0.0, 0.001, 0.004, 0.03]))
    await asyncio.gather(*asking)


def simulate(recording, tokens, config, adapters, overlap_steps):
    """Tell a simulated replica what the live engine was told, when it was told."""
    heap = EventHeap()
    cost = RecordedCost(recording.gaps_s()[::-1])
    executor = RecordingSimExecutor(cost, {adapter.adapter_id: adapter.lora_rank for adapter in adapters}, tokens)
    replica = SimReplica(
        config, executor, heap, lambda outputs: None, lambda request, error: None, overlap_steps=overlap_steps
    )
    by_id = {adapter.adapter_id: adapter for adapter in adapters}
    for now_s, added, aborted in recording.turns:
        for request in added:
            heap.at(now_s, lambda request=request: replica.submit(request, by_id.get(request.adapter_id)))
        for request_id in aborted:
            heap.at(now_s, lambda request_id=request_id: replica.abort(request_id))
    heap.run()
    assert replica.is_idle
    return executor.plans, replica.stats


@pytest.mark.parametrize("overlap_steps", [False, True])
async def test_the_simulator_makes_the_plans_of_the_live_engine_byte_for_byte(live, overlap_steps):
    loaded, adapters, config = live
    runner = RecordingExecutor(loaded.runner)
    recording = RecordingEngine(Engine(config, runner, overlap_steps=overlap_steps))
    for adapter in adapters:
        recording.register_adapter(adapter)
    info = EngineInfo(config.max_model_len, VOCAB_SIZE, 4, config.num_kv_blocks, 6, "float32", "cpu")
    async with LocalClient(EngineParts(recording, loaded.adapters, info)) as client:
        await run_live(client, make_requests(adapters))
        while recording.has_work:
            await asyncio.sleep(0.01)
        stats = recording.stats()
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hits > 0
    assert stats.num_adapter_loads > len(adapters)

    plans, simulated = simulate(recording, runner.next_token, config, adapters, overlap_steps)

    assert len(plans) == len(runner.plans)
    for ours, theirs in zip(plans, runner.plans, strict=True):
        assert msgspec.msgpack.encode(ours) == msgspec.msgpack.encode(theirs)
    assert simulated == stats


def turn_by_hand(setup, executor, overlap_steps):
    """The plans of an engine that is told a spec's workload, one turn after the other."""
    engine = Engine(setup.cluster.scheduler, executor, overlap_steps=overlap_steps)
    registered, now_s = set(), 0.0
    coming = list(enumerate(setup.workload))
    while coming or engine.has_work:
        if not engine.has_work:
            now_s = max(now_s, coming[0][1].arrival_s)
        while coming and coming[0][1].arrival_s <= now_s:
            number, wanted = coming.pop(0)
            adapter = setup.adapters.info(wanted.adapter_index)
            if adapter.adapter_id not in registered:
                engine.register_adapter(adapter)
                registered.add(adapter.adapter_id)
            engine.add(
                Request(
                    RequestId(str(number)),
                    (0,) * wanted.num_prompt_tokens,
                    SamplingParams(max_tokens=wanted.num_output_tokens, temperature=0.0),
                    wanted.arrival_s,
                    wanted.tenant_id,
                    adapter.adapter_id,
                )
            )
        engine.step(now_s)
        now_s += executor.last_step_s
    return executor.plans


def test_overlap_in_a_spec_makes_the_plans_of_an_engine_that_overlaps(monkeypatch):
    executors = []

    class KeptExecutor(RecordingSimExecutor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            executors.append(self)

    monkeypatch.setattr(cluster, "SimExecutor", KeptExecutor)
    encoded = {}
    for overlap_steps in (False, True):

        def prepared(overlap_steps=overlap_steps):
            sizes = {"num_kv_blocks": 20, "max_num_seqs": 6, "num_adapter_pages": 6, "max_num_batched_tokens": 64}
            values = make_spec(
                replica={"profile": "p.json", "overlap_steps": overlap_steps, **sizes},
                adapters={"lora_ranks": [8, 16], "popularity": {"kind": "zipf", "num_adapters": 5, "alpha": 1.0}},
            )
            values["workload"]["arrivals"]["rate_per_s"] = 400.0
            return prepare(parse_spec(values, "x"), lambda name: make_profile().to_json().splitlines())

        setup = prepared()
        assert setup.cluster.overlap_steps is overlap_steps
        sim = ClusterSim(setup.cluster, setup.adapters)
        sim.run(setup.workload)
        (ours,) = executors
        executors.clear()
        setup = prepared()
        theirs = RecordingSimExecutor(setup.cluster.cost_model, setup.adapters.lora_rank_of, lambda *_: 0)
        plans = turn_by_hand(setup, theirs, overlap_steps)
        encoded[overlap_steps] = [msgspec.msgpack.encode(plan) for plan in ours.plans]
        assert encoded[overlap_steps] == [msgspec.msgpack.encode(plan) for plan in plans]
        assert sum(record.num_preemptions for record in sim.replicas.values()) > 0
        assert sum(record.num_adapter_loads for record in sim.replicas.values()) > 5
    assert encoded[False] != encoded[True]
