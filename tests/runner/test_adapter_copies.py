"""Adapters copied beside the steps over a slow link: answers do not change, not in the last bit, whoever computes."""

import random

import pytest
import torch

from pomona.core.ids import AdapterId, PageId
from pomona.core.plan import AdapterLoad
from pomona.core.request import SamplingParams
from pomona.kernels.lora import LoraBatch
from pomona.model import lora as model_lora
from pomona.model.spec import Site
from support.adapters import ALL_TARGETS, make_adapter
from support.models import make_checkpoint
from support.runner import TinyEngine

ADAPTERS = (
    {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    {"r": 32, "target_modules": ALL_TARGETS},
    {"r": 9, "target_modules": ["down_proj", "o_proj"]},
    {"r": 4, "target_modules": ALL_TARGETS, "use_dora": True},
)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("copies") / "base", max_position_embeddings=512)


@pytest.fixture(scope="module")
def adapter_paths(base_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / f"{i}", base_path, seed=i, **fields) for i, fields in enumerate(ADAPTERS)]


def make_engine(base_path, adapter_paths, loading: str, *, copy_s: float = 0.02, **settings):
    """An engine whose largest adapter takes ``copy_s`` to copy, and the adapters' ids."""
    engine = TinyEngine(base_path, adapter_loading=loading, adapter_link_bytes_per_s=1.0, **settings)
    ids = [engine.load_adapter(path) for path in adapter_paths]
    largest = max(weights.pages.nbytes for weights in engine.loaded.adapters.staged.values())
    engine.loaded.runner._adapter_pool.link_bytes_per_s = largest / copy_s
    return engine, ids


def serve(base_path, adapter_paths, loading: str, **settings):
    """Requests that come at random times; the tokens of each, and how many rows used host copies."""
    pages = sum(-(-int(fields["r"]) // 4) for fields in ADAPTERS)
    engine, ids = make_engine(
        base_path,
        adapter_paths,
        loading,
        num_adapter_pages=pages - 1,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        num_kv_blocks=100,
        adapter_wait_limit_s=0.05,
        **settings,
    )
    num_rows = 0
    state = engine.loaded.runner._adapter_pool.state

    def watched(runs):
        nonlocal num_rows
        found = state(runs)
        num_rows += sum(part.end - part.start for part in found.on_host) if found is not None else 0
        return found

    engine.loaded.runner._adapter_pool.state = watched
    rng = random.Random(3)
    requests = []
    for _ in range(24):
        prompt = [rng.randrange(3, 90) for _ in range(rng.randrange(1, 60))]
        sampling = SamplingParams(max_tokens=rng.randrange(1, 10), temperature=0.0)
        requests.append(engine.add(prompt, sampling, rng.choice([None, *ids])))
        for _ in range(rng.randrange(4)):
            engine.step()
    engine.run()
    stats = engine.engine.stats()
    assert stats.num_adapter_evictions > 0
    assert (stats.num_pinned_adapters, stats.num_kv_blocks_used) == (0, 0)
    assert not engine.loaded.runner._adapter_pool.under_way, "every copy has been made or given up"
    return [engine.tokens(request_id) for request_id in requests], num_rows


@pytest.fixture(scope="module")
def expected(base_path, adapter_paths):
    answers, num_rows = serve(base_path, adapter_paths, "on_demand")
    assert num_rows == 0
    return answers


@pytest.mark.parametrize("overlap_steps", [False, True], ids=["step by step", "overlapped"])
@pytest.mark.parametrize("loading", ["join", "assist"])
def test_answers_are_those_of_copies_that_are_waited_for(base_path, adapter_paths, expected, loading, overlap_steps):
    answers, num_rows = serve(base_path, adapter_paths, loading, overlap_steps=overlap_steps)
    assert (num_rows > 0) == (loading == "assist")
    assert answers == expected


def test_decode_graphs_pass_by_steps_with_host_copies(base_path, adapter_paths, expected):
    answers, num_rows = serve(base_path, adapter_paths, "assist", decode_graphs=True, graph_batch_sizes=(2, 6))
    assert num_rows > 0
    assert answers == expected


@pytest.mark.parametrize("copy_s", [0.0, 0.01, 1.0], ids=["at once", "in the middle of the prompt", "after the prompt"])
@pytest.mark.parametrize("adapter", [0, 1, 2])
def test_a_prompt_has_the_same_logits_bit_for_bit_whoever_computes_it(base_path, adapter_paths, adapter, copy_s):
    prompt = [3 + (7 * index) % 80 for index in range(120)]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5, prompt_logprobs=5)
    answers = []
    for loading in ("on_demand", "assist"):
        engine, ids = make_engine(
            base_path, adapter_paths, loading, copy_s=max(copy_s, 1e-9), max_prefill_chunk=8, num_threads=1
        )
        request_id = engine.add(prompt, sampling, ids[adapter])
        engine.run()
        outputs = engine.outputs[request_id]
        answers.append([(output.new_token_ids, output.logprobs, output.prompt_logprobs) for output in outputs])
    assert answers[0] == answers[1]


def test_a_warm_request_gets_its_tokens_while_a_cold_one_waits(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths, "join", copy_s=1e9)
    warm = engine.add([5, 6, 7], SamplingParams(max_tokens=12, temperature=0.0))
    cold = engine.add([5, 6, 7], SamplingParams(max_tokens=4, temperature=0.0), ids[1])
    while engine.finish_reason(warm) is None:
        engine.step()
    assert engine.tokens(cold) == []
    engine.engine.abort(cold)
    engine.loaded.runner._adapter_pool.link_bytes_per_s = None
    assert engine.engine.stats().num_pinned_adapters == 0


def test_the_first_token_does_not_wait_for_the_copy(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths, "assist", copy_s=1e9)
    cold = engine.add([5, 6, 7], SamplingParams(max_tokens=4, temperature=0.0), ids[1])
    engine.step()
    engine.step()
    assert len(engine.tokens(cold)) == 1
    engine.engine.abort(cold)


def test_pages_given_to_another_adapter_in_the_middle_of_a_copy_hold_that_one(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths, "join", copy_s=0.05, num_adapter_pages=8)
    for _ in range(3):
        given_up = engine.add([5, 6, 7], SamplingParams(max_tokens=4, temperature=0.0), ids[1])
        engine.step()
        engine.engine.abort(given_up)
        asked = engine.add([9, 8, 7], SamplingParams(max_tokens=6, temperature=0.0), ids[2])
        engine.run()
        answer = engine.tokens(asked)
        calm = TinyEngine(base_path)
        adapter_id = calm.load_adapter(adapter_paths[2])
        assert answer == calm.generate([9, 8, 7], SamplingParams(max_tokens=6, temperature=0.0), adapter_id)
        engine.engine.retire_adapter(ids[2])
        engine.run()
        engine.engine.take_drained()
        engine.load_adapter(adapter_paths[2])


def serve_copies(pool) -> None:
    for _ in range(1000):
        pool.wait(0.01)
        pool.apply((), (), {})


def test_a_copy_that_fails_is_raised_by_the_step(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths, "join", copy_s=0.0001)
    pool = engine.loaded.runner._adapter_pool
    weights = engine.loaded.adapters.staged[ids[0]]
    pool.apply((), [AdapterLoad(ids[0], (PageId(10**9),), 1, is_awaited=False)], {ids[0]: weights})
    with pytest.raises(IndexError):
        serve_copies(pool)


def test_after_a_failure_pages_may_be_given_out_anew_while_copies_run(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths, "join", copy_s=1e9)
    pool, staged = engine.loaded.runner._adapter_pool, engine.loaded.adapters.staged
    pages = tuple(PageId(index) for index in range(8))
    pool.apply((), [AdapterLoad(ids[1], pages, 1, is_awaited=False)], staged)
    assert pool.loading == {1}
    pool.apply((), [AdapterLoad(ids[0], pages[:1], 2, is_awaited=False)], staged)
    assert pool.resident_ids == {ids[0]}
    assert pool.loading == {2}


def test_the_host_product_for_another_device_is_what_the_host_adds(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths, "assist", copy_s=1e9)
    pool, staged = engine.loaded.runner._adapter_pool, engine.loaded.adapters.staged
    weights = staged[ids[1]]
    pages = tuple(PageId(index) for index in range(weights.pages.shape[0]))
    pool.apply((), [AdapterLoad(AdapterId(ids[1]), pages, 1, is_awaited=False)], staged)
    host_copy = pool._read_host_copy(pool.resident(ids[1]), weights)
    rows = torch.tensor([0, 3], dtype=torch.int32)
    batch = LoraBatch(rows[:1], rows[1:], host_copy.page_table, ((0, 3),), (tuple(range(len(pages))),), 32)
    part = model_lora.HostLora(1, 4, batch, host_copy.slices, host_copy.ranks)
    state = model_lora.LoraState(
        LoraBatch(rows[:0], rows[:0], host_copy.page_table, (), (), 0), pool.slices, {}, on_host=(part,)
    )
    spec = engine.loaded.spec
    width = sum(spec.target_shape(target)[1] for target in Site.QKV.value)
    x, out = torch.randn(5, spec.hidden_size), torch.randn(5, width)
    expected = out.clone()
    expected[1:4] += model_lora.host_product(x[1:4], width, (0, Site.QKV), part)
    model_lora.adapt(out, x, 0, Site.QKV, state, None)
    torch.testing.assert_close(out, expected)
    assert not torch.equal(model_lora.host_product(x[1:4], width, (0, Site.QKV), part), torch.zeros(3, width))
