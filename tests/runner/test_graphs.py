"""Replayed decode steps against the same steps run as they come: padding, static tensors and refilled plans, for
adapters that come and go. What a CUDA graph adds, two calls in ``captures``, needs a GPU (tests/gpu)."""

import pytest
import torch

from pomona.core.errors import ConfigError
from pomona.core.request import SamplingParams
from pomona.kernels.dispatch import backends_of, use_backend
from pomona.model.lora import PageLayout
from pomona.runner.captures import Recall
from pomona.runner.config import RunnerConfig
from pomona.runner.graph_inputs import GraphLimits
from pomona.runner.graphs import DecodeGraphs, default_batch_sizes, measure_graph_bytes
from pomona.runner.memory import plan_capacity
from support.adapters import ALL_TARGETS, make_adapter
from support.graphs import compare_every_step
from support.models import make_checkpoint
from support.random_work import play
from support.runner import TinyEngine

KINDS = {
    "all": {"r": 16, "target_modules": ALL_TARGETS},
    "qv": {"r": 4},
    "odd": {"r": 5, "target_modules": ["k_proj", "o_proj", "down_proj"]},
    "rank-1": {"r": 1, "target_modules": ALL_TARGETS},
    "dora": {"r": 8, "use_dora": True, "target_modules": ALL_TARGETS},
}
SETTINGS = {"max_model_len": 128, "max_num_batched_tokens": 32, "max_num_seqs": 6, "min_prefix_wait_tokens": 0}
SCARCE = {"num_kv_blocks": 45, "num_adapter_pages": 6}


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("graphs") / "base", max_position_embeddings=512)


@pytest.fixture(scope="module")
def adapter_paths(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / name, base_path, seed=i, **fields) for i, (name, fields) in enumerate(KINDS.items())]


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("sizes", [(), (1, 2, 3, 4, 5, 6), (6,), (2, 5)])
@pytest.mark.parametrize("backend", [name for name in backends_of("lora") if name != "triton"])
def test_replayed_steps_give_the_same_logits_and_every_request_the_same_tokens(
    base_path, adapter_paths, backend, sizes, overlap_steps
):
    num_evictions = 0
    with use_backend(backend):
        for seed in range(2):
            plain = play(TinyEngine(base_path, **SETTINGS, **SCARCE), adapter_paths, seed)
            engine = TinyEngine(
                base_path,
                decode_graphs=True,
                graph_batch_sizes=sizes,
                overlap_steps=overlap_steps,
                **SETTINGS,
                **SCARCE,
            )
            # The compiled kernels give a row the same bits whatever its batch; torch's products only nearly so.
            compared = compare_every_step(engine, 0.0 if backend == "cpu" else 5e-4)
            assert play(engine, adapter_paths, seed) == plain
            assert compared.num_compared > 10
            num_evictions += engine.engine.stats().num_adapter_evictions
    assert num_evictions > 0


@pytest.mark.skipif(
    "triton" not in backends_of("lora") or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
def test_launches_as_they_were_at_capture_are_right_for_later_steps_of_other_adapters_and_contexts(tmp_path):
    """As on CUDA: nothing that the host knows of a step reaches the launches, only what was copied into tensors."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    base = make_checkpoint(
        tmp_path / "base", **sizes, num_key_value_heads=1, vocab_size=32, max_position_embeddings=640
    )
    paths = [make_adapter(tmp_path / f"{rank}", base, r=rank, target_modules=ALL_TARGETS, seed=rank) for rank in (1, 6)]
    with use_backend("triton"):
        engine = TinyEngine(
            base,
            decode_graphs=True,
            graph_batch_sizes=(2, 4),
            graph_max_lora_rank=16,
            max_num_batched_tokens=640,
            block_size=16,
        )
        compared = compare_every_step(engine, 5e-4, is_frozen=True)
        ids = [None, *(engine.load_adapter(path) for path in paths)]
        greedy = SamplingParams(max_tokens=6, temperature=0.0)
        engine.add([3 + i % 20 for i in range(520)], greedy, ids[1])  # its keys are attended to in two parts
        with use_backend("reference"):  # the interpreter is slow
            engine.step()
        for index in range(3):
            engine.add(range(3, 6 + index), greedy, ids[index])
            engine.step()
        engine.run()
        assert compared.num_compared >= 4


@pytest.mark.skipif(
    "triton" not in backends_of("lora") or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
def test_layers_of_different_windows_have_a_plan_each(tmp_path):
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    base = make_checkpoint(tmp_path / "base", "qwen2", **sizes, **windows, num_key_value_heads=1, vocab_size=32)
    with use_backend("triton"):
        engine = TinyEngine(base, decode_graphs=True, graph_batch_sizes=(2,), block_size=16)
        assert engine.loaded.spec.sliding_windows == (None, 5)
        compared = compare_every_step(engine, 5e-4, is_frozen=True)
        engine.add(range(3, 12), SamplingParams(max_tokens=4, temperature=0.0))
        engine.add(range(4, 7), SamplingParams(max_tokens=4, temperature=0.0))
        engine.run()
        assert compared.num_compared == 3


def test_steps_that_no_graph_is_made_for_run_as_they_come(base_path, adapter_paths):
    engine = TinyEngine(base_path, decode_graphs=True, graph_batch_sizes=(2,), graph_max_lora_rank=8)
    graphs = engine.loaded.runner.graphs
    assert graphs is not None
    greedy = SamplingParams(max_tokens=4, temperature=0.0)
    all_targets, query_value, dora = (engine.load_adapter(adapter_paths[i]) for i in (0, 1, 4))

    def num_replays(*adapter_ids) -> int:
        before = graphs.num_replays
        for adapter_id in adapter_ids:
            engine.add(range(3, 9), greedy, adapter_id)
        engine.run()
        return graphs.num_replays - before

    assert num_replays(None) == num_replays(None, query_value) == 3, "the prompt's step is not replayed"
    assert num_replays(None, None, None) == 0, "more rows than the largest graph"
    assert num_replays(all_targets) == 0, "rank 16"
    assert num_replays(dora, None) == 0
    assert num_replays(query_value) == 3


def test_logits_of_all_graphs_are_in_one_place(base_path, adapter_paths):
    """A result for each would be gigabytes: two for every number of rows, of the whole vocabulary."""
    engine = TinyEngine(base_path, decode_graphs=True, graph_batch_sizes=(1, 2))
    graphs = engine.loaded.runner.graphs
    assert graphs is not None
    found: list[torch.Tensor] = []
    logits = graphs.logits
    graphs.logits = lambda batch, latest: found.append(logits(batch, latest)) or found[-1]  # type: ignore[method-assign]
    greedy = SamplingParams(max_tokens=3, temperature=0.0)
    for adapter_ids in ((None,), (None, engine.load_adapter(adapter_paths[1]))):
        for adapter_id in adapter_ids:
            engine.add(range(3, 9), greedy, adapter_id)
        engine.run()
    replayed = [rows for rows in found if rows is not None]
    assert {len(rows) for rows in replayed} == {1, 2}
    assert len({rows.untyped_storage().data_ptr() for rows in replayed}) == 1


def test_contexts_that_share_more_tokens_than_there_is_memory_run_as_they_come(base_path):
    memory = {"kv_cache_bytes": 2**14, "max_model_len": 32, "min_prefix_wait_tokens": 4}
    engine = TinyEngine(base_path, decode_graphs=True, graph_batch_sizes=(8,), **memory)
    graphs = engine.loaded.runner.graphs
    assert graphs is not None
    num_slots = 4 * engine.loaded.capacity.num_kv_blocks
    names = [engine.add([*range(3, 27), 30 + i], SamplingParams(max_tokens=3, temperature=0.0)) for i in range(8)]
    engine.run()
    assert engine.engine.stats().num_prefix_hits > 0
    assert num_slots < 8 * 25, "the test must have more context tokens than slots"
    plain = TinyEngine(base_path, **memory)
    for name in names:
        plain.add([*range(3, 27), 30 + int(name.partition("-")[2])], SamplingParams(max_tokens=3, temperature=0.0))
    plain.run()
    assert [engine.tokens(name) for name in names] == [plain.tokens(name) for name in names]


def test_padding_has_a_scrap_block_per_row_and_no_more():
    limits = GraphLimits((1, 2, 4, 16), 64, num_kv_blocks=10, block_size=4, max_model_len=20)
    assert limits.num_scrap_blocks == 11
    assert limits.max_kv_tokens(1) == 20 + 1
    assert limits.max_kv_tokens(16) == 40 + 16
    assert GraphLimits((8,), 64, 10, 4, 20).num_scrap_blocks == 7


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"), [(1, (1,)), (3, (1, 2, 3)), (12, (1, 2, 4, 8, 12)), (64, (1, 2, 4, *range(8, 65, 8)))]
)
def test_default_sizes_reach_every_number_of_sequences(max_num_seqs, sizes):
    assert default_batch_sizes(max_num_seqs) == sizes


def test_default_sizes_end_where_padding_and_launches_weigh_little():
    assert default_batch_sizes(4096)[-1] == 512


@pytest.mark.parametrize("sizes", [(0, 1), (4, 2), (2, 2)])
def test_sizes_must_be_positive_and_ascending(sizes):
    with pytest.raises(ConfigError, match="graph_batch_sizes"):
        RunnerConfig(model_path="x", graph_batch_sizes=sizes)


def test_memory_of_graphs_is_measured_on_the_two_largest(base_path):
    runner = TinyEngine(base_path, decode_graphs=True, graph_batch_sizes=(1, 2, 4, 8)).loaded.runner
    trials: list[DecodeGraphs] = []

    def make_graphs() -> DecodeGraphs:
        limits = GraphLimits((1, 2, 4, 8), 16, num_kv_blocks=8, block_size=4, max_model_len=64)
        trials.append(DecodeGraphs(runner._decoder, runner._kv_cache, runner._adapter_pool, limits, Recall()))
        return trials[-1]

    free = iter((10_000, 9_000, 8_900))
    assert measure_graph_bytes(make_graphs, (1, 2, 4, 8), lambda: next(free)) == 1_000 + 3 * 100
    assert sorted(trials[0]._buckets) == [4, 8]
    free = iter((10_000, 9_000))
    assert measure_graph_bytes(make_graphs, (8,), lambda: next(free)) == 1_000


def test_what_graphs_take_is_missing_from_the_kv_cache(base_path):
    engine = TinyEngine(base_path)
    layout = PageLayout(engine.loaded.spec, 4)
    config = RunnerConfig(model_path="x", dtype="float32", device="cpu", max_num_seqs=10**6)
    sizes = {"max_model_len": 64, "device": torch.device("cpu")}
    plain = plan_capacity(config, engine.loaded.spec, layout, **sizes)
    reserved = plan_capacity(config, engine.loaded.spec, layout, **sizes, reserved_bytes=2**28)
    assert reserved.num_kv_blocks < plain.num_kv_blocks


def test_graphs_are_off_on_a_cpu_unless_asked_for(base_path):
    assert TinyEngine(base_path).loaded.runner.graphs is None
