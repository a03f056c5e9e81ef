"""LLM when something comes in between: Ctrl-C in the middle of a step, an adapter replaced in the middle of a call."""

import signal
from collections import deque

import pytest

from pomona import LLM, SamplingParams
from pomona.adapters.catalogue import Catalogue
from pomona.runner.adapter_host import StagedAdapters
from pomona.runner.sequences import SequenceTable
from pomona.sched.adapter_slots import AdapterSlots
from pomona.sched.block_pool import BlockPool
from pomona.sched.fair_queue import FairQueue
from support.adapters import make_adapter
from support.models import make_checkpoint
from support.tokenizers import make_tokenizer_files

PARAMS = SamplingParams(max_tokens=12, temperature=0.0)
SHORT = SamplingParams(max_tokens=2, temperature=0.0)


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("interrupts") / "tiny", vocab_size=400, max_position_embeddings=256)
    return make_tokenizer_files(path, vocab_size=400)


@pytest.fixture(scope="module")
def engine(base_path):
    return LLM(str(base_path), dtype="float32", kv_cache_bytes="8MiB", adapter_bytes="4MiB")


@pytest.fixture
def llm(engine, base_path, tmp_path):
    engine.load_adapter("a", str(make_adapter(tmp_path / "a", base_path, seed=1)))
    return engine


@pytest.fixture
def press(monkeypatch):
    """Have Ctrl-C pressed whenever a function is left."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press_after(owner, name):
        function = getattr(owner, name)

        def pressed(*args, **kwargs):
            result = function(*args, **kwargs)
            signal.raise_signal(signal.SIGINT)
            return result

        monkeypatch.setattr(owner, name, pressed)

    yield press_after
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (AdapterSlots, "use"),
        (FairQueue, "push"),
        (AdapterSlots, "pin"),
        (BlockPool, "allocate"),
        (FairQueue, "admit"),
        (AdapterSlots, "unpin"),
        (SequenceTable, "release"),
    ],
)
def test_an_interrupted_step_leaves_nothing_held_and_streams_go_on(llm, press, monkeypatch, owner, name):
    alone = "".join(llm.stream("The quick", adapter="a", sampling=PARAMS, ignore_eos=True))
    stream = llm.stream("The quick", adapter="a", sampling=PARAMS, ignore_eos=True)
    first = next(stream)
    press(owner, name)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["Many adapters", "def add("], adapter="a", sampling=SHORT, ignore_eos=True)
    monkeypatch.undo()
    assert first + "".join(stream) == alone
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks_used, stats.num_pinned_adapters) == (0,) * 4
    assert [status.num_users for status in llm._engine.adapter_statuses()] == [0]
    llm.unload_adapter("a")
    assert llm._adapter_host.staged == {}


@pytest.mark.parametrize(("owner", "name"), [(StagedAdapters, "stage"), (Catalogue, "register")])
def test_an_interrupted_load_keeps_no_weights_without_a_name(llm, press, monkeypatch, base_path, tmp_path, owner, name):
    press(owner, name)
    with pytest.raises(KeyboardInterrupt):
        llm.load_adapter("a", str(make_adapter(tmp_path / "b", base_path, seed=2)))
    monkeypatch.undo()
    llm.unload_adapter("a")
    assert llm._adapter_host.staged == {}
    assert llm._engine.adapter_statuses() == []


def test_a_prompt_that_has_not_begun_when_its_adapter_is_replaced_is_answered_by_the_new_one(llm, base_path, tmp_path):
    old = llm.generate("The quick", adapter="a", sampling=PARAMS, ignore_eos=True)[0].text
    run = llm._run("The quick", "a", PARAMS, (), index=0, ignore_eos=True)  # as in a call with more than max_waiting
    llm.load_adapter("a", str(make_adapter(tmp_path / "b", base_path, seed=2)))
    waiting = deque([run])
    while run.completion.finish_reason is None:
        llm._step(waiting)
    assert run.completion.text == llm.generate("The quick", adapter="a", sampling=PARAMS, ignore_eos=True)[0].text
    assert run.completion.text != old
