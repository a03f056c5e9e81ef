"""Replayed steps compared with the same steps run as they come."""

import torch
from torch import Tensor

from pomona.runner.batch import HostBatch, to_device
from pomona.runner.captures import Recall
from pomona.runner.graphs import DecodeGraphs
from pomona.runner.runner import ModelRunner
from support.runner import TinyEngine


class ComparedGraphs:
    """Runs every step that is replayed a second time, as it comes, and compares. KV is written twice, alike."""

    def __init__(self, runner: ModelRunner, graphs: DecodeGraphs, tolerance: float) -> None:
        self._tolerance = tolerance
        self._runner = runner
        self._graphs = graphs
        self.num_compared = 0

    def logits(self, batch: HostBatch, latest: Tensor | None) -> Tensor | None:
        replayed = self._graphs.logits(batch, latest)
        if replayed is None:
            return None
        runner = self._runner
        inputs = to_device(batch, runner._device, latest)
        lora = runner._adapter_pool.state(batch.adapter_runs)
        hidden = runner._decoder.forward(
            inputs.token_ids, inputs.positions, runner._kv_cache.layers, inputs.attention, lora
        )
        expected = runner._decoder.logits(hidden, lora)
        torch.testing.assert_close(replayed, expected, atol=self._tolerance, rtol=self._tolerance)
        self.num_compared += 1
        return replayed


def compare_every_step(engine: TinyEngine, tolerance: float, *, is_frozen: bool = False) -> ComparedGraphs:
    """Let an engine with graphs compare them; frozen ones are captured anew."""
    runner = engine.loaded.runner
    graphs = runner.graphs
    assert graphs is not None
    if is_frozen:
        limits = graphs._limits
        pool = runner._adapter_pool
        graphs = DecodeGraphs(runner._decoder, runner._kv_cache, pool, limits, Recall(is_frozen=True))
        graphs.capture_all()
    compared = ComparedGraphs(runner, graphs, tolerance)
    runner.graphs = compared  # type: ignore[assignment]
    return compared
