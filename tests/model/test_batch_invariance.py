"""With the compiled CPU kernels a token's logits are the same, bit for bit, whatever shares its step."""

import pytest
import torch

from pomona.kernels.cpu import binding
from support.adapters import ALL_TARGETS, AdaptedDecoder, make_adapter
from support.models import make_checkpoint

pytestmark = pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("invariance")
    base = make_checkpoint(folder / "base", storage_dtype=torch.float32)
    kinds = {"small": {"r": 4}, "large": {"r": 20}, "dora": {"r": 8, "use_dora": True}}
    adapters = [make_adapter(folder / name, base, target_modules=ALL_TARGETS, **kind) for name, kind in kinds.items()]
    return base, adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_s_logits_do_not_depend_on_its_company(paths, dtype):
    base, adapters = paths
    decoder = AdaptedDecoder(base, dtype)
    small, large, dora = (decoder.add(path) for path in adapters)
    prompt = list(range(3, 60))
    for adapter_id in (None, small, large, dora):
        [alone] = decoder.logits([(prompt, adapter_id)])
        company = [([5, 9, 70], large), (prompt, adapter_id), ([8], None), (prompt[:40], small), ([1, 2], adapter_id)]
        assert torch.equal(decoder.logits(company)[1], alone)
        assert torch.equal(decoder.logits([*company[2:], *company[:2]])[4], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_s_logits_do_not_depend_on_how_it_is_cut(paths, dtype):
    base, adapters = paths
    decoder = AdaptedDecoder(base, dtype)
    adapter_id = decoder.add(adapters[1])
    prompt = list(range(3, 60))
    [whole] = decoder.logits([(prompt, adapter_id)])
    sequences, parts = decoder.sequences(2, len(prompt)), []
    for start, end in ((0, 1), (1, 20), (20, 21), (21, 57)):
        others = [7] * (end % 5)
        runs = [(end - start, adapter_id), *([(len(others), None)] if others else [])]
        tokens = {0: prompt[start:end], **({1: others} if others else {})}
        parts.append(sequences.step(tokens, decoder.state(runs))[0])
    assert torch.equal(torch.cat(parts), whole)
