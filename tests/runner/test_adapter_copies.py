"""Adapters copied beside the steps over a slow link: answers do not change, not in the last bit, whoever computes."""

import random
import threading
import time

import numpy as np
import pytest
import torch

from pomona.core.ids import AdapterId, PageId
from pomona.core.plan import AdapterLoad
from pomona.core.request import SamplingParams
from pomona.kernels.cpu import binding
from pomona.kernels.dispatch import use_backend
from pomona.kernels.lora import LoraBatch
from pomona.kernels.lora import lora as add_lora
from pomona.model import lora as model_lora
from pomona.model.adapter_weights import AdapterWeights
from pomona.model.spec import Site
from pomona.runner import adapter_copies
from pomona.runner.adapter_copies import AdapterCopies
from pomona.runner.batch import AdapterRun
from support.adapters import ALL_TARGETS, make_adapter
from support.models import make_checkpoint
from support.runner import TinyEngine

ADAPTERS = (
    {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    {"r": 32, "target_modules": ALL_TARGETS},
    {"r": 9, "target_modules": ["down_proj", "o_proj"]},
    {"r": 4, "target_modules": ALL_TARGETS, "use_dora": True},
)
BACKENDS = ("cpu", "reference") if binding.is_available() else ("reference",)


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
        if found is not None and found.late:
            pool = engine.loaded.runner._adapter_pool
            num_rows += sum(run.end - run.start for run in runs if pool.resident(run.adapter_id).copy is not None)
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


@pytest.mark.parametrize("loading", ["join", "assist"])
def test_a_copy_does_not_run_beside_the_step_that_reads_the_host_copy(base_path, adapter_paths, loading):
    engine, ids = make_engine(base_path, adapter_paths, loading)
    runner, copies = engine.loaded.runner, engine.loaded.runner._adapter_pool._copies
    seen = []
    for owner, name in ((runner, "_forward"), (copies, "begin")):
        function = getattr(owner, name)
        setattr(owner, name, lambda *args, name=name, function=function: seen.append(name) or function(*args))
    engine.add([5, 6, 7])
    engine.add([5, 6, 7], SamplingParams(max_tokens=4, temperature=0.0), ids[1])
    engine.step()
    is_apart = loading == "assist" and binding.is_available()
    assert seen == (["_forward", "begin"] if is_apart else ["begin", "_forward"])
    engine.run()


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


def test_after_a_failure_pages_may_be_given_out_anew_while_copies_run(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths, "join", copy_s=1e9)
    pool, staged = engine.loaded.runner._adapter_pool, engine.loaded.adapters.staged
    pages = tuple(PageId(index) for index in range(8))
    pool.apply((), [AdapterLoad(ids[1], pages, 1, is_awaited=False)], staged)
    assert pool.loading == {1}
    pool.apply((), [AdapterLoad(ids[0], pages[:1], 2, is_awaited=False)], staged)
    assert pool.resident_ids == {ids[0]}
    assert pool.loading == {2}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layer_is_read_where_it_is_when_the_step_is_made(base_path, adapter_paths, backend):
    """What a step must not read is no number: layers that have arrived on the host, the others on the device."""
    prompt = [3 + (7 * index) % 80 for index in range(40)]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=5, prompt_logprobs=5)
    answers = []
    with use_backend(backend):
        for loading in ("on_demand", "assist"):
            engine, ids = make_engine(base_path, adapter_paths, loading, max_prefill_chunk=8, num_threads=1)
            pool = engine.loaded.runner._adapter_pool
            if loading == "assist":
                stop_in_the_middle(pool, ids[1], engine.loaded.adapters.staged)
                slots = engine.engine._scheduler.adapters
                slots.load(ids[1], is_awaited=False)
                slots.take_loads()
            states = []
            state = pool.state
            pool.state = lambda runs, state=state, states=states: states.append(state(runs)) or states[-1]
            request_id = engine.add(prompt, sampling, ids[1])
            while not engine.tokens(request_id):
                engine.step()
            outputs = engine.outputs[request_id]
            answers.append([(output.new_token_ids, output.logprobs, output.prompt_logprobs) for output in outputs])
    assert [[late.first for late in state.late] for state in states] == [[1]] * 5
    assert answers[0] == answers[1]


def stop_in_the_middle(pool, adapter_id: AdapterId, staged) -> None:
    """Have the first layer of an adapter arrive, and nothing more; spoil what is not to be read from now on."""
    pages = tuple(PageId(index) for index in range(staged[adapter_id].pages.shape[0]))
    pool.link_bytes_per_s = 1e-3
    pool._copies.piece_bytes = 1
    pool.apply((), [AdapterLoad(adapter_id, pages, 1, is_awaited=False)], staged)
    (_, copy), *_ = pool.under_way.values()
    wait_until(lambda: copy.num_layers > 0)
    assert copy.num_layers == 1 < pool._layout.spec.num_layers
    copy.weights.pages[:, : pool._layout.layer_elems] = float("nan")
    pool._pages[list(pages), pool._layout.layer_elems :] = float("nan")


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_that_have_come_to_different_layers_share_a_step(base_path, adapter_paths, backend):
    with use_backend(backend):
        engine, ids = make_engine(base_path, adapter_paths, "assist", copy_s=1e9)
        pool, staged = engine.loaded.runner._adapter_pool, engine.loaded.adapters.staged
        loads = [
            AdapterLoad(ids[0], (PageId(0),), 1, is_awaited=True),
            AdapterLoad(ids[1], tuple(PageId(index) for index in range(1, 9)), 2, is_awaited=False),
            AdapterLoad(ids[2], (PageId(9), PageId(10), PageId(11)), 3, is_awaited=False),
        ]
        pool.link_bytes_per_s, slow_link = None, pool.link_bytes_per_s
        pool.apply((), loads[:1], staged)
        pool.link_bytes_per_s = slow_link
        pool.apply((), loads[1:], staged)
        wait_until(lambda: pool.resident(ids[1]).copy.num_layers > 0)
        pool.resident(ids[1]).copy.num_layers = 1
        runs = [AdapterRun(ids[index], 2 * index, 2 * index + 2, index, index + 1) for index in range(3)]
        state = pool.state(runs)
        assert [late.first for late in state.late] == [0, 1]
        mixed = {late.first: [part.start for part in late.on_host] for late in state.late}
        assert mixed == ({0: [4], 1: [2, 4]} if backend == "reference" else {0: [], 1: []})
        # As if all had arrived.
        whole = pool._pages.clone()
        for load in loads:
            whole[list(load.page_ids)] = staged[load.adapter_id].pages
        spec = engine.loaded.spec
        width = sum(spec.target_shape(target)[1] for target in Site.QKV.value)
        for layer in range(spec.num_layers):
            pool._pages[1:9, : pool._layout.layer_elems] = whole[1:9, : pool._layout.layer_elems]
            key, x, out = (layer, Site.QKV), torch.randn(6, spec.hidden_size), torch.randn(6, width)
            expected = out.clone()
            add_lora(expected, x, pool._layout.slices(whole, *key), state.ranks[key], state.batch)
            batch, ranks, _ = state.at(layer)
            if batch.host_rows:
                add_lora(out, x, pool.slices[key], ranks[key], batch)
            model_lora.adapt(out, x, *key, state, None)
            assert torch.equal(out, expected)


def test_pieces_arrive_layer_by_layer_in_pages_anywhere_in_a_wider_tensor():
    source = torch.arange(4 * 12, dtype=torch.float32).view(4, 12) + 1
    whole = torch.zeros(9, 20)
    copies = AdapterCopies(whole[:, 4:16], num_layers=6, bytes_per_s=None)
    copies.piece_bytes = 2 * 4 * 2 * 4
    seen = []
    write = copies._write
    copies._write = lambda *arguments: (write(*arguments), seen.append(whole.clone()))
    copy = copies.prepare(weights_of(source), (7, 2, 3, 5))
    copies.make(copy)
    assert copy.is_done
    assert copy.num_layers == 6
    assert [int((part != 0).sum()) for part in seen] == [16, 32, 48]
    assert torch.equal(seen[0][[7, 2, 3, 5], 4:8], source[:, :4])
    assert torch.equal(whole[[7, 2, 3, 5], 4:16], source)


def test_an_adapter_without_rank_rows_is_copied_at_once():
    copies = AdapterCopies(torch.zeros(2, 8), num_layers=4, bytes_per_s=None)
    copy = copies.prepare(weights_of(torch.zeros(0, 8)), ())
    copies.make(copy)
    assert (copy.is_done, copy.num_layers) == (True, 4)


def test_a_copy_given_up_writes_nothing_once_that_is_said():
    whole = torch.zeros(2, 8)
    copies = AdapterCopies(whole, num_layers=4, bytes_per_s=None)
    copies.piece_bytes = 1
    is_writing, may_go_on, is_given_up = threading.Event(), threading.Event(), threading.Event()
    write = copies._write

    def slow_write(*arguments) -> None:
        is_writing.set()
        assert may_go_on.wait(30)
        write(*arguments)

    copies._write = slow_write
    copy = copies.prepare(weights_of(torch.ones(2, 8)), (0, 1))
    copies.begin(copy)
    assert is_writing.wait(30)
    giving_up = threading.Thread(target=lambda: (copies.cancel(copy), is_given_up.set()))
    giving_up.start()
    assert not is_given_up.wait(0.05), "a piece is being copied"
    may_go_on.set()
    giving_up.join(30)
    assert int(whole.sum()) == 4, "the piece that was being copied"
    other = copies.prepare(weights_of(torch.zeros(2, 8)), (0, 1))
    copies.begin(other)
    copies.finish(other)
    assert int(whole.sum()) == 0
    assert (copy.is_done, copy.num_layers) == (False, 1)


def test_giving_up_does_not_wait_for_the_link():
    copies = AdapterCopies(torch.zeros(2, 8), num_layers=4, bytes_per_s=1e-3)
    copies.piece_bytes = 1
    copy = copies.prepare(weights_of(torch.ones(2, 8)), (0, 1))
    copies.begin(copy)
    wait_until(lambda: copy.num_layers > 0)
    copies.cancel(copy)
    assert copy.num_layers == 1


def test_the_thread_ends_when_nothing_is_left_to_copy(monkeypatch):
    monkeypatch.setattr(adapter_copies, "_LINGER_S", 0.01)
    copies = AdapterCopies(torch.zeros(2, 8), num_layers=4, bytes_per_s=None)
    for value in (1.0, 2.0):
        copy = copies.prepare(weights_of(torch.full((2, 8), value)), (0, 1))
        copies.begin(copy)
        thread = copies._thread
        copies.finish(copy)
        thread.join(30)
        assert not thread.is_alive()
        assert copies._pages.unique().tolist() == [value]


def wait_until(is_so) -> None:
    """Wait for another thread, but not for ever."""
    deadline_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def weights_of(pages: torch.Tensor) -> AdapterWeights:
    """Of pages alone."""
    nothing = np.zeros((1, 7))
    return AdapterWeights(pages, nothing.astype(np.int32), nothing.astype(np.float32), None, 1, (), ())


def test_the_host_product_for_another_device_is_what_the_host_adds(base_path, adapter_paths):
    engine, ids = make_engine(base_path, adapter_paths, "assist", copy_s=1e9)
    pool, staged = engine.loaded.runner._adapter_pool, engine.loaded.adapters.staged
    weights = staged[ids[1]]
    pages = tuple(PageId(index) for index in range(weights.pages.shape[0]))
    pool.apply((), [AdapterLoad(AdapterId(ids[1]), pages, 1, is_awaited=False)], staged)
    part = pool._host_lora(AdapterRun(ids[1], 1, 4, 0, 0), pool.resident(ids[1]).copy)
    nothing = torch.empty(0, dtype=torch.int32)
    empty = LoraBatch(nothing, nothing, nothing.view(0, 1), (), (), 0)
    state = model_lora.LoraState(
        empty, pool.slices, {}, late=(model_lora.LateLayers(0, batch=empty, ranks={}, on_host=(part,)),)
    )
    spec = engine.loaded.spec
    width = sum(spec.target_shape(target)[1] for target in Site.QKV.value)
    x, out = torch.randn(5, spec.hidden_size), torch.randn(5, width)
    expected = out.clone()
    expected[1:4] += model_lora.host_product(x[1:4], width, (0, Site.QKV), part)
    model_lora.adapt(out, x, 0, Site.QKV, state, None)
    torch.testing.assert_close(out, expected)
    assert not torch.equal(model_lora.host_product(x[1:4], width, (0, Site.QKV), part), torch.zeros(3, width))
