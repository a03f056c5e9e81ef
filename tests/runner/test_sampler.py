"""The sampler against slow, obvious computations, and the independence of a row from its neighbours."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pomona.core.errors import InvalidRequestError
from pomona.core.ids import RequestId
from pomona.core.plan import ScheduledSeq, SeqStart
from pomona.core.request import SamplingParams
from pomona.runner import sampler
from pomona.runner.config import RunnerConfig
from pomona.runner.memory import _activation_bytes
from pomona.runner.sampler import PROMPT_LOGITS_ROWS, Sampled, choose, token_logprobs, uniform
from pomona.runner.sequences import SequenceTable

VOCAB = 50


def make_table(*sampling: SamplingParams, prompt=(1, 2, 3), output=()):
    table = SequenceTable(max_num_seqs=max(len(sampling), 1), max_model_len=64, block_size=4)
    rows = []
    for index, params in enumerate(sampling):
        start = SeqStart((*prompt, *output), len(prompt), params, None)
        rows.append(table.update(ScheduledSeq(RequestId(str(index)), 0, 1, True, (), start)))
    return table, np.array(rows)


def sample(logits: torch.Tensor, rows: np.ndarray, table: SequenceTable) -> Sampled:
    return choose(logits, rows, table).sampled()


def make_logits(num_rows=1, seed=0):
    return 3 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def draw_many(params, logits, num=4000):
    """Token counts over many seeds."""
    from dataclasses import replace

    table, rows = make_table(*(replace(params, seed=seed) for seed in range(num)))
    result = sample(logits.repeat(num, 1), rows, table)
    return np.bincount(result.token_ids, minlength=VOCAB) / num


def test_greedy_takes_the_most_likely_token_and_the_lowest_id_on_ties():
    logits = make_logits(2)
    logits[1, 7] = logits[1, 30] = 99.0
    table, rows = make_table(SamplingParams(temperature=0.0), SamplingParams(temperature=0.0))
    expected = [int(logits[0].argmax()), 7]
    assert sample(logits, rows, table).token_ids.tolist() == expected


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=9e-6),
        SamplingParams(temperature=1e-38),
        SamplingParams(temperature=1e-46),
        SamplingParams(temperature=1e-5),
        SamplingParams(top_p=1e-38),
        SamplingParams(top_p=1e-46),
        SamplingParams(top_p=5e-324, temperature=100.0),
        SamplingParams(min_p=1.0),
    ],
)
def test_parameters_at_the_edge_of_their_ranges_take_the_most_likely_token(params):
    """In float32 some of them are 0, and what is divided by them is infinite."""
    logits = 1000 * make_logits(seed=5)
    best = int(logits[0].argmax())
    assert best != VOCAB - 1
    assert np.flatnonzero(draw_many(params, logits, num=20)).tolist() == [best]


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_repetition_penalty_keeps_large_logits_finite(penalty):
    logits = torch.full((1, VOCAB), -1e30)
    logits[0, :4] = 1e30  # 1, 2, 3 are in the prompt
    table, rows = make_table(SamplingParams(temperature=0.0, repetition_penalty=penalty))
    assert sample(logits, rows, table).token_ids[0] == (1 if penalty < 1 else 0)
    assert logits.isfinite().all()


@pytest.mark.parametrize("penalty", [0.0, 1e-40, 0.009, 100.1, math.nan])
def test_repetition_penalties_out_of_range_are_refused(penalty):
    with pytest.raises(InvalidRequestError, match=f"repetition_penalty is {penalty}: must be between 0.01 and 100"):
        SamplingParams(repetition_penalty=penalty)


def test_a_top_k_that_no_table_holds_is_refused():
    table, rows = make_table(SamplingParams(top_k=2**63 - 1, min_p=1.0))
    logits = make_logits()
    assert sample(logits.clone(), rows, table).token_ids[0] == logits.argmax()
    with pytest.raises(InvalidRequestError, match="top_k"):
        SamplingParams(top_k=2**63)


def test_random_draws_follow_the_softmax_at_the_asked_temperature():
    logits = make_logits()
    frequencies = draw_many(SamplingParams(temperature=1.7), logits)
    expected = torch.softmax(logits[0] / 1.7, dim=-1).numpy()
    assert np.abs(frequencies - expected).max() < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.6),
        SamplingParams(min_p=0.2),
        SamplingParams(top_k=5, top_p=0.7, min_p=0.1, temperature=1.3),
        SamplingParams(top_k=1000),
        SamplingParams(top_p=1e-6),
    ],
)
def test_filters_keep_exactly_the_tokens_that_their_definitions_keep(params):
    logits = make_logits(seed=3)
    probs = torch.softmax(logits[0].double() / params.temperature, dim=-1)
    order = sorted(range(VOCAB), key=lambda token: (-probs[token], token))
    kept = order[: params.top_k or VOCAB]
    total, mass, nucleus = sum(probs[token] for token in kept), 0.0, []
    for token in kept:
        if mass >= params.top_p * total:
            break
        nucleus.append(token)
        mass += probs[token]
    kept = {token for token in nucleus if probs[token] >= params.min_p * probs.max()}
    frequencies = draw_many(params, logits)
    assert set(np.flatnonzero(frequencies)) <= kept
    expected = np.array([float(probs[token]) if token in kept else 0.0 for token in range(VOCAB)])
    assert np.abs(frequencies - expected / expected.sum()).max() < 0.04


@given(
    st.lists(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 0.5, 1.0]),
            top_k=st.sampled_from([0, 1, 5]),
            top_p=st.sampled_from([0.3, 1.0]),
            min_p=st.sampled_from([0.0, 0.1]),
            seed=st.integers(0, 2**63 - 1),
            presence_penalty=st.sampled_from([0.0, 1.5]),
            logprobs=st.sampled_from([None, 2]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_a_row_draws_the_same_token_alone_and_in_any_company(params, seed):
    logits = make_logits(len(params), seed)
    table, rows = make_table(*params, output=(4, 4))
    together = sample(logits.clone(), rows, table)
    for index, own in enumerate(params):
        alone_table, alone_rows = make_table(own, output=(4, 4))
        alone = sample(logits[index : index + 1].clone(), alone_rows, alone_table)
        assert alone.token_ids[0] == together.token_ids[index]
        assert alone.logprobs.get(0) == together.logprobs.get(index)


def test_penalties_follow_their_formulas():
    params = SamplingParams(
        temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, logit_bias=((9, 1.5),)
    )
    logits = torch.zeros(1, VOCAB)
    logits[0, :12] = torch.tensor([1.0, -1.0, 2.0, 3.0, 4.0, 5.0, -2.0, 0.5, 0.0, 1.0, 2.0, 3.0])
    expected = logits[0].clone()
    for token in (1, 2, 4, 6):  # prompt and output
        expected[token] = expected[token] / 2 if expected[token] > 0 else expected[token] * 2
    expected[4] -= 0.5 + 0.25 * 2  # output only, twice
    expected[6] -= 0.5 + 0.25
    expected[9] += 1.5
    table, rows = make_table(params, prompt=(1, 2), output=(4, 6, 4))
    sample(logits, rows, table)
    torch.testing.assert_close(logits[0], expected)


def test_penalties_count_on_the_host_because_a_device_would_have_to_be_waited_for(monkeypatch):
    monkeypatch.delattr(torch, "unique")
    params = SamplingParams(temperature=0.0, frequency_penalty=0.25, repetition_penalty=2.0)
    table, rows = make_table(params, output=(4, 6, 4))
    sample(make_logits(), rows, table)


def test_stop_tokens_are_not_chosen_before_min_tokens():
    params = SamplingParams(temperature=0.0, max_tokens=9, min_tokens=2, stop_token_ids=(5,))
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 10.0, 9.0
    table, rows = make_table(params, output=(1,))
    assert sample(logits.clone(), rows, table).token_ids[0] == 6
    table, rows = make_table(params, output=(1, 1))
    assert sample(logits.clone(), rows, table).token_ids[0] == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_reported_and_do_not_disturb_others(bad):
    logits = make_logits(2)
    logits[0, 3] = bad
    table, rows = make_table(SamplingParams(logprobs=1), SamplingParams(temperature=0.0))
    expected = int(logits[1].argmax())
    result = sample(logits, rows, table)
    assert result.is_finite.tolist() == [False, True]
    assert result.token_ids[1] == expected
    assert 0 not in result.logprobs


def test_logprobs_are_those_of_the_raw_logits_with_rank_and_top():
    logits = make_logits()
    raw = torch.log_softmax(logits[0], dim=-1)
    order = raw.argsort(descending=True)
    (entry,) = token_logprobs(logits, order[2:3].numpy(), 3)
    assert entry.rank == 3
    assert entry.logprob == pytest.approx(float(raw[order[2]]))
    assert [token for token, _ in entry.top] == order[:3].tolist()
    biased = SamplingParams(temperature=0.0, logprobs=1, logit_bias=((int(order[9]), 100.0),))
    table, rows = make_table(biased)
    result = sample(logits, rows, table)
    assert result.token_ids[0] == order[9]
    assert result.logprobs[0].logprob == pytest.approx(float(raw[order[9]]))


def test_log_probabilities_are_on_their_way_before_anybody_waits_for_them():
    """On a GPU the next step has been launched by then: what is asked for after it would wait for all of it."""

    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is torch.ops.aten.detach.default, f"{func} after the step was launched"  # what numpy() calls
            return func(*args, **(kwargs or {}))

    params = (SamplingParams(logprobs=3), SamplingParams(temperature=0.0), SamplingParams(logprobs=0, seed=4))
    table, rows = make_table(*params)
    raw = make_logits(3)
    choice = choose(raw.clone(), rows, table)
    with Refusing():
        result = choice.sampled()
    assert set(result.logprobs) == {0, 2}
    for row, num_top in ((0, 3), (2, 0)):
        (expected,) = token_logprobs(raw[row : row + 1], result.token_ids[row : row + 1], num_top)
        assert result.logprobs[row] == expected
        assert len(expected.top) == num_top


class PeakMemory(TorchDispatchMode):
    """Most bytes that tensors made by operators held together."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0
        self._live = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                del storage
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.num_bytes = max(self.num_bytes, sum(num_bytes for _, num_bytes in self._live.values()))
        return result


def _set_aside(vocab_size: int, **limits: int) -> int:
    """What a GPU's memory plan has for a step of a model that is only a vocabulary."""
    sizes = {"hidden_size": 0, "intermediate_size": 0, "q_size": 0, "kv_size": 0, "vocab_size": vocab_size}
    return _activation_bytes(RunnerConfig(model_path="x", **limits), SimpleNamespace(**sizes))


@pytest.mark.parametrize("num_at_once", [None, 8], ids=["all rows at once", "eight at once"])
def test_drawing_stays_within_the_memory_that_is_set_aside_for_it(num_at_once, monkeypatch):
    num_rows, vocab_size = 64, 1000
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(top_p=0.9, top_k=500, min_p=0.01, logprobs=2, seed=seed) for seed in range(num_rows)]
    table, rows = make_table(*params)
    expected = sample(logits.clone(), rows, table).token_ids
    if num_at_once is not None:
        monkeypatch.setattr(sampler, "_MOST_DRAWN", num_at_once * vocab_size)
    set_aside = _set_aside(vocab_size, max_num_seqs=num_rows, max_num_batched_tokens=num_rows)
    with PeakMemory() as peak:
        token_ids = choose(logits.clone(), rows, table).token_ids
    assert token_ids.tolist() == expected.tolist()
    assert logits.nbytes < peak.num_bytes <= set_aside
    assert set_aside == num_rows * vocab_size * 16 + (num_at_once or num_rows) * vocab_size * 64


def test_log_probabilities_of_a_prompt_stay_within_the_memory_that_is_set_aside():
    num_rows, vocab_size = PROMPT_LOGITS_ROWS, 1000
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(1))
    with PeakMemory() as peak:
        token_logprobs(logits.clone(), np.arange(num_rows), 5)
    assert logits.nbytes < peak.num_bytes <= _set_aside(vocab_size, max_num_seqs=2)


def test_random_numbers_are_uniform_and_uncorrelated_between_neighbouring_seeds_and_indices():
    seeds, indices = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64))
    draws = uniform(seeds.ravel(), indices.ravel()).reshape(200, 200)
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(np.histogram(draws, 20, (0, 1))[0] / draws.size - 0.05).max() < 0.005
    for shifted in (draws[1:] - 0.5, (draws[:, 1:] - 0.5).T):
        base = (draws[:-1] if shifted.shape == draws[1:].shape else draws[:, :-1]).reshape(shifted.shape) - 0.5
        assert abs((shifted * base).mean()) < 0.002


def test_a_row_of_a_large_vocabulary_keeps_the_same_tokens_alone_and_in_company_on_several_threads():
    """A likely token has about top_p: whether it is enough must not depend on how others' probabilities are added."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = torch.randn(60_000, generator=torch.Generator().manual_seed(0))
        logits[:2] = torch.logsumexp(logits[2:], dim=0) - math.log(2)  # a quarter each
        top_ps = [0.25 * (1 + step * 2**-23) for step in range(8)]
        params = [SamplingParams(top_p=top_p, seed=seed) for top_p in top_ps for seed in range(5)]
        table, rows = make_table(*params)
        together = sample(logits.repeat(len(params), 1), rows, table).token_ids
        alone = [sample(logits.clone().unsqueeze(0), rows[row : row + 1], table).token_ids[0] for row in rows]
    finally:
        torch.set_num_threads(num_threads)
    assert together.tolist() == alone
    assert 0 < together.sum() < len(params), "some kept one token, some two"
