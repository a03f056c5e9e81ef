"""Recorded native calls: replays give the function's very results, in memory that recordings share without overlap."""

import pytest
import torch

from pomona.kernels.activation import silu_mul
from pomona.kernels.attention import AttentionBatch, paged_attention
from pomona.kernels.cpu import binding
from pomona.kernels.linear import dense, gather_rows, pack, packed_linear, quantize
from pomona.kernels.lora import lora
from pomona.kernels.norm import rms_norm
from support.kernel_cases import Segment, make_adapters, make_contexts

pytestmark = pytest.mark.skipif(not binding.is_available(), reason=binding.REASON)

if binding.is_available():
    from pomona.kernels.cpu.recording import NotRecordableError, record, refresh_attention
    from pomona.kernels.cpu.workspace import Workspace


def test_a_replay_reads_its_inputs_anew():
    weight = pack(torch.randn(40, 24))
    norm = torch.rand(24)
    x = torch.randn(5, 24)

    def function() -> torch.Tensor:
        return silu_mul(packed_linear(rms_norm(x, norm, 1e-5), weight))

    recording, out = record(function, Workspace())
    first = out.clone()
    torch.testing.assert_close(first, function(), rtol=0, atol=0)
    x.copy_(torch.randn(5, 24))
    recording.replay()
    assert not torch.equal(out, first)
    torch.testing.assert_close(out, function(), rtol=0, atol=0)


def test_a_workspace_that_is_too_small_grows():
    weight = pack(torch.randn(4096, 8))
    x = torch.randn(300, 8)
    workspace = Workspace()
    before = workspace.region.numel()
    recording, out = record(lambda: packed_linear(x, weight), workspace)
    assert workspace.region.numel() > before
    out.zero_()
    recording.replay()
    torch.testing.assert_close(out, packed_linear(x, weight), rtol=0, atol=0)


@pytest.mark.parametrize("work", [lambda x: x + 1, lambda x: x.t().contiguous(), lambda x: x.mul_(2)])
def test_a_function_with_work_of_its_own_is_refused(work):
    x = torch.randn(4, 8)
    with pytest.raises(NotRecordableError, match="aten"):
        record(lambda: work(rms_norm(x, torch.ones(8), 1e-5)), Workspace())
    assert not binding.is_recording()


def test_replays_attend_to_other_sequences():
    contexts = make_contexts([3, 30, 7, 1, 64])
    recorded, query = contexts.batch([(0, 2, 3), (1, 29, 30), (2, 6, 7)])

    def attend(batch: AttentionBatch) -> torch.Tensor:
        return paged_attention(query, contexts.key_cache, contexts.value_cache, batch, scale=0.25)

    recording, out = record(lambda: attend(recorded), Workspace())
    for rows in ([(4, 63, 64), (3, 0, 1), (0, 1, 2)], [(2, 3, 4), (1, 15, 16), (4, 7, 8)]):
        batch, new_query = contexts.batch(rows)
        query.copy_(new_query)
        refresh_attention(recorded, batch)
        recording.replay()
        torch.testing.assert_close(out, attend(batch), rtol=0, atol=0)


def test_replays_serve_other_segments_ranks_and_scalings():
    adapters = make_adapters([[4, 4], [0, 8], [1, 0], [16, 3]], in_features=20, widths=[24, 8])
    x, base = torch.randn(6, 20), torch.randn(6, 32)
    out = base.clone()
    recorded, ranks = adapters.batch([Segment(1, 3, 2)])
    recording, _ = record(lambda: lora(out, x, adapters.slices, ranks, recorded), Workspace())
    for segments in ([Segment(0, 1, 3), Segment(1, 4, 1), Segment(5, 6, 0)], [Segment(0, 6, 2)], [Segment(2, 3, 3)]):
        batch, new_ranks = adapters.batch(segments)
        recording.refresh_lora(recorded, batch, [new_ranks])
        out.copy_(base)
        recording.replay()
        torch.testing.assert_close(out, adapters.apply(x, base, segments), rtol=0, atol=0)


def test_a_site_that_no_adapter_of_the_recorded_step_adapts_is_still_replayed():
    adapters = make_adapters([[0], [4]], in_features=12, widths=[16])
    x, out = torch.randn(2, 12), torch.zeros(2, 16)
    recorded, ranks = adapters.batch([Segment(0, 2, 0)])
    recording, _ = record(lambda: lora(out, x, adapters.slices, ranks, recorded), Workspace())
    assert not out.any()
    batch, new_ranks = adapters.batch([Segment(0, 2, 1)])
    recording.refresh_lora(recorded, batch, [new_ranks])
    recording.replay()
    assert out.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_features", [8, 17])
@pytest.mark.parametrize("layout", ["packed", "dense", "packed int8", "dense int8"])
def test_rows_are_gathered_from_every_layout(dtype, in_features, layout):
    weight = torch.randn(37, in_features).to(dtype)
    given = quantize(weight) if "int8" in layout else weight
    table = pack(given) if layout.startswith("packed") else dense(given)
    row_ids = torch.tensor([36, 0, 16, 15, 36])
    expected = given.dequantize().to(dtype) if "int8" in layout else weight
    torch.testing.assert_close(gather_rows(table, row_ids), expected[row_ids], rtol=0, atol=0)
