"""An adapter that cannot be copied to the device, for want of memory say: nobody else notices."""

import threading

import pytest

from pomona.core.request import FinishReason, SamplingParams
from support.adapters import ALL_TARGETS, make_adapter
from support.models import make_checkpoint
from support.runner import TinyEngine

ADAPTERS = (
    {"r": 32, "target_modules": ALL_TARGETS},
    {"r": 4, "target_modules": ALL_TARGETS, "use_dora": True},
    {"r": 9, "target_modules": ["down_proj", "o_proj"]},
)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("failed-copies") / "base")


@pytest.fixture(scope="module")
def adapter_paths(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / f"{i}", base_path, seed=i, **fields) for i, fields in enumerate(ADAPTERS)]


def make_engine(base_path, adapter_paths, loading, **settings):
    engine = TinyEngine(base_path, adapter_loading=loading, **settings)
    return engine, [engine.load_adapter(path) for path in adapter_paths]


@pytest.mark.parametrize("overlap_steps", [False, True], ids=["step by step", "overlapped"])
@pytest.mark.parametrize("loading", ["on_demand", "join", "assist"])
@pytest.mark.parametrize("adapter", [0, 1], ids=["rank rows alone", "with extras"])
def test_a_copy_that_fails_ends_the_requests_of_its_adapter_alone(
    base_path, adapter_paths, adapter, loading, overlap_steps
):
    prompt, sampling = [5, 6, 7, 8, 9], SamplingParams(max_tokens=8, temperature=0.0)
    calm, ids = make_engine(base_path, adapter_paths, loading)
    expected = [calm.generate(prompt, sampling, adapter_id) for adapter_id in (None, ids[2], ids[adapter])]
    engine, ids = make_engine(base_path, adapter_paths, loading, overlap_steps=overlap_steps, max_prefill_chunk=2)
    copies, lost = engine.loaded.runner._adapter_pool._copies, engine.loaded.adapters.staged[ids[adapter]]
    carry_out = copies._carry_out

    def lose(copy) -> None:
        if copy.weights is lost:
            raise MemoryError
        carry_out(copy)

    copies._carry_out = lose
    others = [engine.add(prompt, sampling, adapter_id) for adapter_id in (None, ids[2])]
    failing = [engine.add(prompt, sampling, ids[adapter]) for _ in range(2)]
    engine.run()
    assert [engine.tokens(request_id) for request_id in others] == expected[:2]
    assert [engine.finish_reason(request_id) for request_id in failing] == [FinishReason.FAIL] * 2
    assert "adapter could not be copied" in engine.outputs[failing[0]][-1].error
    copies._carry_out = carry_out
    assert engine.generate(prompt, sampling, ids[adapter]) == expected[2]
    stats = engine.engine.stats()
    assert (stats.num_pinned_adapters, stats.num_kv_blocks_used) == (0, 0)


@pytest.mark.parametrize("overlap_steps", [False, True], ids=["step by step", "overlapped"])
@pytest.mark.parametrize("loading", ["join", "assist"])
def test_where_no_thread_can_be_started_for_a_copy_its_adapter_fails_alone_and_is_loaded_once_one_can(
    base_path, adapter_paths, loading, overlap_steps, monkeypatch
):
    prompt, sampling = [5, 6, 7, 8, 9], SamplingParams(max_tokens=8, temperature=0.0)
    calm, ids = make_engine(base_path, adapter_paths, "on_demand")
    expected = [calm.generate(prompt, sampling, adapter_id) for adapter_id in (None, ids[0])]
    engine, ids = make_engine(base_path, adapter_paths, loading, overlap_steps=overlap_steps)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        other, failing = engine.add(prompt, sampling), engine.add(prompt, sampling, ids[0])
        engine.run()
    assert engine.tokens(other) == expected[0]
    assert engine.finish_reason(failing) is FinishReason.FAIL
    assert "adapter could not be copied" in engine.outputs[failing][-1].error
    assert engine.generate(prompt, sampling, ids[0]) == expected[1]
