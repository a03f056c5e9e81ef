"""The places in the network where adapters come in do nothing, to anybody, when there is nothing to do."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from pomona.core.ids import AdapterId
from pomona.kernels.linear import gather_rows, unpack
from pomona.model import lora as adapters
from pomona.model.lora import AdapterExtras, LoraState
from pomona.model.spec import Site, Target
from support.adapters import AdaptedDecoder, make_adapter
from support.models import make_checkpoint

IDS = torch.tensor([3, 9, 9, 130, 0, 7])


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> AdaptedDecoder:
    return AdaptedDecoder(make_checkpoint(tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture(scope="module")
def plain(decoder: AdaptedDecoder, tmp_path_factory: pytest.TempPathFactory) -> AdapterId:
    base: Path = next(tmp_path_factory.getbasetemp().glob("base*/base"))
    return decoder.add(make_adapter(tmp_path_factory.mktemp("plain") / "adapter", base))


def state_of(decoder: AdaptedDecoder, runs: list[tuple[int, AdapterId | None]]) -> LoraState:
    state = decoder.state(runs)
    assert state is not None
    return state


def with_extras(state: LoraState, extras: AdapterExtras, start: int, end: int) -> LoraState:
    parts = ((start, end, extras),)
    return LoraState(state.batch, state.slices, state.ranks, extras=parts, logit_extras=parts)


def test_without_extras_inputs_are_handed_back_as_they_are(decoder: AdaptedDecoder, plain: AdapterId) -> None:
    state = state_of(decoder, [(6, plain)])
    weights = decoder.decoder.weights
    hidden = torch.randn(6, 64)
    logits = torch.randn(6, 131)
    embedded = gather_rows(weights.embed, IDS)
    adapters.adapt_embeddings(embedded, IDS, state)
    assert torch.equal(embedded, functional.embedding(IDS, unpack(weights.embed)))
    assert adapters.adapt_norm(hidden, hidden, 0, "input_layernorm", state, 1e-6) is hidden
    before = logits.clone()
    assert adapters.adapt_logits(logits, hidden, state) is logits
    assert torch.equal(logits, before)


def test_only_rows_of_the_segment_change(decoder: AdaptedDecoder, plain: AdapterId) -> None:
    weights = decoder.decoder.weights
    extras = AdapterExtras(
        dora_scales={(0, Target.K): torch.full((32,), 2.0)},
        biases={(0, Target.Q): torch.ones(64)},
        weights={(0, Target.V): torch.zeros(32, 64)},
        norms={(0, "input_layernorm"): torch.zeros(64)},
        embed_rows=(torch.tensor([9]), torch.zeros(1, 64)),
        lm_head_rows=(torch.tensor([4]), torch.zeros(1, 64)),
        lm_head_bias=torch.ones(131),
    )
    state = with_extras(state_of(decoder, [(1, None), (2, plain), (3, None)]), extras, 1, 3)
    embedded = gather_rows(weights.embed, IDS)
    adapters.adapt_embeddings(embedded, IDS, state)
    assert not embedded[1:3].any()  # token 9, replaced by zeros
    assert torch.equal(embedded[[0, 3, 4, 5]], unpack(weights.embed)[IDS[[0, 3, 4, 5]]])
    hidden = torch.randn(6, 64)
    normed = adapters.adapt_norm(hidden, hidden.clone(), 0, "input_layernorm", state, 1e-6)
    assert not normed[1:3].any()
    assert torch.equal(normed[[0, 3, 4, 5]], hidden[[0, 3, 4, 5]])
    assert torch.equal(adapters.adapt_norm(hidden, hidden.clone(), 1, "input_layernorm", state, 1e-6), hidden)
    logits = adapters.adapt_logits(torch.full((6, 131), 5.0), hidden, state)
    assert (logits[1:3, 4] == 1.0).all()
    assert (logits[1:3, :4] == 6.0).all()
    assert (logits[[0, 3, 4, 5]] == 5.0).all()
    out = torch.full((6, 128), 3.0)
    adapters.adapt(out, torch.zeros(6, 64), 0, Site.QKV, state, None)
    assert (out[1:3] == torch.tensor([4.0] * 64 + [6.0] * 32 + [0.0] * 32)).all()
    assert (out[[0, 3, 4, 5]] == 3.0).all()


def test_dora_rescales_the_product_and_not_the_bias(decoder: AdaptedDecoder, plain: AdapterId) -> None:
    bias = torch.randn(128)
    extras = AdapterExtras(dora_scales={(1, Target.Q): torch.full((64,), 3.0)})
    state = with_extras(state_of(decoder, [(6, plain)]), extras, 0, 6)
    product = torch.randn(6, 128)
    out = product + bias
    adapters.adapt(out, torch.zeros(6, 64), 1, Site.QKV, state, bias)
    expected = torch.cat([product[:, :64] * 3, product[:, 64:]], dim=1) + bias
    torch.testing.assert_close(out, expected)


def test_shared_parts_are_counted_and_moved_once() -> None:
    table = torch.randn(5, 4)
    extras = AdapterExtras(embed_weight=table, lm_head_weight=table, embed_rows=(torch.tensor([1]), table[:1]))
    assert extras.num_bytes == 80 + 8 + 16
    moved = extras.to(torch.device("cpu"))
    assert moved.embed_weight is moved.lm_head_weight
