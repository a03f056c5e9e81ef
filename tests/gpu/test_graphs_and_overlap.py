"""Captured decode steps and overlapped steps on a GPU: the two CUDA calls, and that nobody waits."""

import pytest
import torch

from pomona.core.request import SamplingParams
from pomona.runner.graphs import DecodeGraphs
from support.adapters import ALL_TARGETS, make_adapter
from support.graphs import compare_every_step
from support.models import make_checkpoint
from support.random_work import play
from support.runner import TinyEngine

pytestmark = pytest.mark.gpu

KINDS = {
    "all": {"r": 16, "target_modules": ALL_TARGETS},
    "qv": {"r": 4},
    "odd": {"r": 5, "target_modules": ["k_proj", "o_proj", "down_proj"]},
    "dora": {"r": 8, "use_dora": True, "target_modules": ALL_TARGETS},
}
SETTINGS = {
    "device": "cuda",
    "max_model_len": 128,
    "max_num_batched_tokens": 32,
    "max_num_seqs": 6,
    "min_prefix_wait_tokens": 0,
    "block_size": 16,
}
SCARCE = {"num_kv_blocks": 20, "num_adapter_pages": 9}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("gpu") / "base", max_position_embeddings=512)


@pytest.fixture(scope="module")
def adapter_paths(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / name, base_path, seed=i, **fields) for i, (name, fields) in enumerate(KINDS.items())]


def graphs_of(engine: TinyEngine) -> DecodeGraphs:
    graphs = engine.loaded.runner.graphs
    assert graphs is not None
    return graphs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(), (6,), (2, 5)])
def test_replayed_steps_give_the_logits_of_the_same_steps_run_as_they_come(base_path, adapter_paths, sizes, dtype):
    engine = TinyEngine(
        base_path, **(SETTINGS | {"dtype": dtype}), **(SCARCE | {"num_adapter_pages": 5}), graph_batch_sizes=sizes
    )
    compared = compare_every_step(engine, 2e-3 if dtype == "float32" else 0.2)
    for seed in range(3):
        play(engine, adapter_paths[:3], seed)
    assert compared.num_compared > 20
    assert engine.engine.stats().num_adapter_evictions > 0


def test_graphs_captured_before_any_adapter_serve_adapters_that_come_and_go(base_path, adapter_paths):
    engine = TinyEngine(base_path, **SETTINGS)
    plain = TinyEngine(base_path, **SETTINGS, decode_graphs=False)
    for path in (*adapter_paths[:3], *adapter_paths[:3]):
        before = graphs_of(engine).num_replays
        adapter_id = engine.load_adapter(path)
        assert engine.generate(range(3, 20), GREEDY, adapter_id) == plain.generate(
            range(3, 20), GREEDY, plain.load_adapter(path)
        )
        assert graphs_of(engine).num_replays - before >= 11
        engine.engine.retire_adapter(adapter_id)
        engine.run()


@pytest.mark.parametrize("decode_graphs", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_overlapped_steps_give_every_request_the_tokens_it_gets_without(base_path, adapter_paths, seed, decode_graphs):
    answers = []
    for overlap_steps in (False, True):
        engine = TinyEngine(base_path, **SETTINGS, **SCARCE, overlap_steps=overlap_steps, decode_graphs=decode_graphs)
        answers.append(play(engine, adapter_paths, seed))
    assert answers[0] == answers[1]


def test_a_chunk_of_a_prompt_has_been_computed_when_its_step_ends(base_path):
    engine = TinyEngine(base_path, **SETTINGS)
    engine.add(range(3, 103), GREEDY)
    for _ in range(3):
        engine.step()
        assert torch.cuda.current_stream().query()


def test_launching_a_replayed_step_never_waits_for_the_device(base_path, adapter_paths):
    engine = TinyEngine(base_path, **SETTINGS, overlap_steps=True)
    adapter_ids = [None, *(engine.load_adapter(path) for path in adapter_paths[:2])]
    for index, adapter_id in enumerate(adapter_ids):
        engine.add(range(3, 9 + index), SamplingParams(max_tokens=60, temperature=0.0), adapter_id)
    for _ in range(6):
        engine.step()
    runner, replays = engine.loaded.runner, graphs_of(engine).num_replays
    launch = runner.launch

    def launch_without_waiting(plan):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    runner.launch = launch_without_waiting
    for _ in range(6):
        engine.step()
    assert graphs_of(engine).num_replays == replays + 6


def test_weights_kv_adapters_and_graphs_stay_within_their_share_of_memory(base_path):
    engine = TinyEngine(
        base_path,
        **(SETTINGS | {"max_num_seqs": 64, "max_model_len": 512}),
        kv_cache_bytes=None,
        adapter_bytes=2**28,
        gpu_memory_fraction=0.5,
    )
    assert engine.loaded.runner.graphs is not None
    free, total = torch.cuda.mem_get_info()
    assert total - free <= 0.5 * total
