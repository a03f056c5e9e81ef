"""What a step does, counted: no timed test can say on a busy machine that the host's part of a step has grown.

Engines are real: scheduler, batch building, model, sampling. Bounds are what the step does today, so that more of it is
a decision: the message says which quantity grew and how to raise its bound.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from pomona.core.ids import AdapterId
from pomona.core.request import SamplingParams
from pomona.kernels.cpu import binding
from pomona.kernels.dispatch import use_backend
from support.adapters import ALL_TARGETS, make_adapter
from support.models import make_checkpoint
from support.runner import TinyEngine
from support.step_cost import StepCost, count_calls, count_step, counting_launches, counting_native_calls

NUM_LAYERS = 2
CHUNK = 64
GREEDY = SamplingParams(max_tokens=300, temperature=0.0)

LAYER_CALLS = {"pomona_norm": 2, "pomona_gemm": 4, "pomona_rope": 2, "pomona_attention": 1, "pomona_silu_mul": 1}
PROMPT_CALLS = {"pomona_gather": 1, "pomona_norm": 1}
DECODE_CALLS = {"pomona_replay": 1, "pomona_gemm": 1, "pomona_greedy": 1}
"""The network as it was recorded; lm_head; choice."""
LAYER_LAUNCHES = {"rms_norm_kernel": 2, "rope_kernel": 1, "write_kv_kernel": 1, "attend_kernel": 1}
LAYER_LAUNCHES |= {"silu_mul_kernel": 1}
SITES = 4

MOST = {
    "decode of 32, base only": {
        "torch_ops": 21,
        "allocations": 3,
        "copied_bytes": 3 * 32 * 8,
        "python_calls": 452,
        "builtin_calls": 395,
    },
    "decode of 32, 8 adapters": {
        "torch_ops": 29,
        "allocations": 5,
        "copied_bytes": 3 * 32 * 8,
        "python_calls": 574,
        "builtin_calls": 472,
    },
    "chunk of a prompt": {
        "torch_ops": 31,
        "allocations": 14,
        "copied_bytes": 0,
        "python_calls": 278,
        "builtin_calls": 319,
    },
}
"""Of two layers, on Python 3.11; later ones call fewer functions."""

needs_kernels = pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step-cost")
    return make_checkpoint(folder / "base", num_hidden_layers=NUM_LAYERS, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def adapter_paths(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    fields = {"r": 4, "target_modules": ALL_TARGETS}
    return [make_adapter(folder / f"{seed}", base_path, seed=seed, **fields) for seed in range(8)]


def make_engine(base_path: Path, adapter_paths: Sequence[Path] = ()) -> tuple[TinyEngine, list[AdapterId]]:
    """An engine whose blocks are larger than what is counted, so that all counted steps are alike."""
    engine = TinyEngine(base_path, block_size=32, max_num_batched_tokens=CHUNK, max_num_seqs=32)
    return engine, [engine.load_adapter(path) for path in adapter_paths]


def start_decodes(engine: TinyEngine, num_seqs: int, adapter_ids: Sequence[AdapterId | None] = (None,)) -> None:
    """Step until so many sequences, of adapters in turn, all decode."""
    for index in range(num_seqs):
        adapter_id = adapter_ids[index * len(adapter_ids) // num_seqs]
        engine.add((3 + index, 5), GREEDY, adapter_id)
    while any(not engine.outputs[request_id] for request_id in list(engine.outputs)[-num_seqs:]):
        engine.step()
    engine.step()


def decode_cost(engine: TinyEngine, num_seqs: int, adapter_ids: Sequence[AdapterId | None] = (None,)) -> StepCost:
    start_decodes(engine, num_seqs, adapter_ids)
    return count_step(engine.step)


def workload(name: str, base_path: Path, adapter_paths: Sequence[Path]) -> TinyEngine:
    """An engine whose next steps are the workload."""
    has_adapters = "adapters" in name
    engine, ids = make_engine(base_path, adapter_paths if has_adapters else ())
    if name.startswith("decode"):
        start_decodes(engine, 32, ids or [None])
    else:
        engine.add([3 + index % 100 for index in range(6 * CHUNK)], GREEDY)
        engine.step()
    return engine


@needs_kernels
def test_large_results_of_prompts_lie_in_memory_that_is_kept(tmp_path):
    num_rows, num_layers = 256, 8
    path = make_checkpoint(
        tmp_path / "wide", num_hidden_layers=num_layers, intermediate_size=512, max_position_embeddings=2048
    )
    engine = TinyEngine(path, block_size=32, max_num_batched_tokens=num_rows, max_num_seqs=1)
    engine.add([3 + index % 100 for index in range(6 * num_rows)], GREEDY)
    for _ in range(2):  # the first finds no room
        engine.step()
    gate_and_up = num_rows * 2 * 512 * 4  # bytes: as few as are large
    assert count_step(engine.step).allocated_bytes < num_layers * gate_and_up


@needs_kernels
@pytest.mark.parametrize("name", MOST)
def test_a_step_does_no_more_than_it_did(name, base_path, adapter_paths):
    cost = count_step(workload(name, base_path, adapter_paths).step)
    assert not (grown := cost.exceeding(MOST[name])), "\n".join([name, *grown])


@needs_kernels
@pytest.mark.parametrize("name", MOST)
def test_every_op_of_a_layer_is_one_call_of_a_kernel_and_a_recorded_step_one_in_all(name, base_path, adapter_paths):
    with counting_native_calls() as calls:
        workload_engine = workload(name, base_path, adapter_paths)
        calls.clear()
        workload_engine.step()
    if name.startswith("decode"):
        expected = dict(DECODE_CALLS)
        if "adapters" in name:
            expected["pomona_set_ranks"] = 1
    else:
        expected = {kernel: NUM_LAYERS * count for kernel, count in LAYER_CALLS.items()}
        for kernel, count in PROMPT_CALLS.items():
            expected[kernel] = expected.get(kernel, 0) + count
    assert dict(calls) == expected


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_adapters_that_are_resident_but_idle_cost_nothing(backend, base_path, adapter_paths):
    with use_backend(backend):
        bare, _ = make_engine(base_path)
        loaded, ids = make_engine(base_path, adapter_paths)
        used = [loaded.add((3, 5), SamplingParams(max_tokens=2, temperature=0.0), adapter_id) for adapter_id in ids]
        loaded.run()
        assert all(loaded.tokens(request_id) for request_id in used)
        assert loaded.engine.stats().num_resident_adapters == len(adapter_paths)
        assert decode_cost(loaded, 8) == decode_cost(bare, 8)


@needs_kernels
def test_operators_and_kernels_depend_neither_on_rows_nor_on_adapters(base_path, adapter_paths):
    costs = {}
    for num_seqs, num_adapters in ((8, 0), (32, 0), (8, 2), (32, 2), (32, 8)):
        engine, ids = make_engine(base_path, adapter_paths)
        costs[num_seqs, num_adapters] = decode_cost(engine, num_seqs, ids[:num_adapters] or [None])
    for of_base in ((8, 0), (32, 0)):
        assert costs[of_base].native_calls == costs[8, 0].native_calls
        assert costs[of_base].torch_ops == costs[8, 0].torch_ops
    for of_adapters in ((8, 2), (32, 2), (32, 8)):
        assert costs[of_adapters].native_calls == costs[8, 2].native_calls
        assert costs[of_adapters].torch_ops == costs[8, 2].torch_ops
    assert costs[32, 0].allocated_bytes == 4 * costs[8, 0].allocated_bytes, "memory is made for rows only"


@needs_kernels
def test_a_sequence_and_an_adapter_cost_a_few_calls_of_python_each(base_path, adapter_paths):
    """The slope matters: at 256 sequences it is most of what the host does."""
    calls = {}
    for num_seqs, num_adapters in ((8, 0), (32, 0), (32, 2), (32, 8)):
        engine, ids = make_engine(base_path, adapter_paths)
        calls[num_seqs, num_adapters] = decode_cost(engine, num_seqs, ids[:num_adapters] or [None]).python_calls
    assert (calls[32, 0] - calls[8, 0]) / 24 <= 8
    assert (calls[32, 8] - calls[32, 2]) / 6 <= 6


@needs_kernels
def test_a_layer_costs_a_bounded_number_of_calls_of_python(base_path, tmp_path):
    deeper = make_checkpoint(tmp_path / "deeper", num_hidden_layers=NUM_LAYERS + 2, max_position_embeddings=1024)
    few, many = (count_step(workload("chunk", path, ()).step) for path in (base_path, deeper))
    assert (many.python_calls - few.python_calls) / 2 <= 63
    assert (many.torch_ops - few.torch_ops) / 2 <= 11


@needs_kernels
def test_layers_of_a_recorded_step_cost_no_calls_of_python(base_path, tmp_path):
    deeper = make_checkpoint(tmp_path / "deeper", num_hidden_layers=NUM_LAYERS + 2, max_position_embeddings=1024)
    few, many = (decode_cost(make_engine(path)[0], 8) for path in (base_path, deeper))
    assert few == many


@needs_kernels
def test_a_long_context_costs_the_host_what_a_short_one_does(base_path):
    costs = []
    for num_prompt_tokens in (2, 900):
        engine, _ = make_engine(base_path)
        request_id = engine.add([3 + index % 100 for index in range(num_prompt_tokens)], GREEDY)
        while len(engine.tokens(request_id)) < 3:
            engine.step()
        costs.append(count_step(engine.step))
    assert costs[0] == costs[1]


def test_log_probabilities_of_a_prompt_cost_as_many_operators_for_any_number_of_its_tokens(base_path):
    """On a GPU each of them that brings a value to the host waits for the device."""
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2)
    costs = []
    for num_prompt_tokens in (8, 60):
        engine, _ = make_engine(base_path)

        def serve(engine: TinyEngine = engine, num_prompt_tokens: int = num_prompt_tokens) -> None:
            engine.add([3 + index for index in range(num_prompt_tokens)], params)
            engine.run()

        serve()
        costs.append(count_step(serve).torch_ops)
    assert costs[0] == costs[1]


def test_steps_of_the_same_work_are_counted_the_same(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths)
    start_decodes(engine, 8, ids)
    assert count_step(engine.step) == count_step(engine.step)


def test_weights_of_adapters_are_copied_when_they_become_resident_and_never_again(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths)
    start_decodes(engine, 16, ids)
    pool = engine.loaded.runner._adapter_pool
    copied = pool.num_bytes_copied
    assert copied > 0
    for _ in range(3):
        engine.step()
    assert pool.num_bytes_copied == copied


def test_triton_launches_the_same_kernels_for_any_rows_and_adapters(tmp_path):
    pytest.importorskip("triton")
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    base = make_checkpoint(tmp_path / "base", **sizes, num_key_value_heads=1, vocab_size=32)
    paths = [make_adapter(tmp_path / f"{rank}", base, r=rank, target_modules=ALL_TARGETS, seed=rank) for rank in (1, 2)]
    expected = dict(LAYER_LAUNCHES)
    expected["rms_norm_kernel"] += 1
    with use_backend("triton"):
        for num_seqs, num_adapters in ((1, 0), (3, 0), (2, 1), (3, 2)):
            engine, ids = make_engine(base, paths[:num_adapters])
            start_decodes(engine, num_seqs, ids or [None])
            with counting_launches() as launches:
                engine.step()
            of_lora = {"shrink_kernel": SITES, "expand_kernel": SITES} if num_adapters else {}
            assert dict(launches) == expected | of_lora


def test_what_grew_is_named_with_its_bound():
    cost = StepCost(*range(8))
    assert cost.exceeding({"torch_ops": 2, "python_calls": 6}) == []
    (line,) = cost.exceeding({"torch_ops": 1, "python_calls": 6})
    assert line.startswith("torch_ops grew to 2, the bound is 1: ")
    assert "raise the bound in this test" in line


def test_calls_are_counted_exactly():
    def outer() -> None:
        len(())
        inner()
        inner()

    def inner() -> None:
        abs(0)

    assert count_calls(outer) == (2, 3)
