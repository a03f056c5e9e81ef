"""Decode steps on a CPU, recorded: what they ask of the kernels depends on their number of rows alone, so each number
is computed once as usual and from then on replayed, with that step's rows and adapters put in place of the recorded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pomona.kernels.cpu.recording import NotRecordableError, Recording, record, refresh_attention
from pomona.kernels.cpu.workspace import Workspace
from pomona.model.decoder import Decoder
from pomona.model.lora import LoraState
from pomona.runner.batch import DeviceBatch
from pomona.runner.kv_cache import KVCache

_MAX_ROWS = 128
"""Larger steps compute for so long that what Python adds is lost in it."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One recorded step, with everything it points to."""

    recording: Recording
    batch: DeviceBatch
    lora: LoraState | None
    hidden: Tensor

    def replay(self, batch: DeviceBatch, lora: LoraState | None) -> Tensor:
        """Compute another step of as many rows."""
        self.batch.token_ids.copy_(batch.token_ids)
        self.batch.positions.copy_(batch.positions)
        refresh_attention(self.batch.attention, batch.attention)
        if self.lora is not None:
            assert lora is not None
            self.recording.refresh_lora(self.lora.batch, lora.batch, list(lora.ranks.values()))
        self.recording.replay()
        return self.hidden


class RecordedDecodes:
    """``Decoder.forward`` for decode steps, without Python in between.

    Args:
        decoder: the base model; the kernels that it gets at the first step are those that replays run.
        kv_cache: what all steps read and write.
    """

    def __init__(self, decoder: Decoder, kv_cache: KVCache) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._workspace = Workspace()
        self._steps: dict[tuple[int, bool, int], _Step] = {}
        self._is_recordable = True

    def forward(self, batch: DeviceBatch, lora: LoraState | None) -> Tensor | None:
        """See ``Decoder.forward``.

        Args:
            batch: one row per sequence.
            lora: the rows' adapters; None if no row has one.

        Returns:
            [num_rows, hidden_size], overwritten by the next call; None if the step must run as it is: it is large, its
            adapters are more than low-rank parts or not on the device yet, or the model needs operators that no
            compiled kernel does.
        """
        num_rows = batch.token_ids.shape[0]
        if not self._is_recordable or num_rows > _MAX_ROWS or (lora is not None and (lora.extras or lora.late)):
            return None
        key = (num_rows, lora is not None, torch.get_num_threads())
        step = self._steps.get(key)
        if step is not None:
            return step.replay(batch, lora)

        def forward() -> Tensor:
            return self._decoder.forward(batch.token_ids, batch.positions, self._kv_cache.layers, batch.attention, lora)

        try:
            recording, hidden = record(forward, self._workspace)
        except NotRecordableError:
            self._is_recordable = False
            return None
        self._steps[key] = _Step(recording, batch, lora, hidden)
        return hidden
