"""SequenceTable: what the runner remembers of each sequence between steps, as arrays with one row per sequence.

The plan names only what changed; everything the step needs is then gathered from these arrays by row index, so the
work per step is a few array operations, whatever the number of sequences.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pomona.core.ids import AdapterId, RequestId
from pomona.core.plan import ScheduledSeq, SeqStart
from pomona.core.request import GREEDY_BELOW, SamplingParams


class SequenceTable:
    """Rows of running sequences. A row is taken when a sequence starts and given back when it is released."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        max_blocks = -(-max_model_len // block_size)
        # A step may release and start sequences at once, and preempted ones restart: rows are reused, never moved.
        self.block_table: NDArray[np.int32] = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self.num_blocks: NDArray[np.int32] = np.zeros(max_num_seqs, dtype=np.int32)
        self.token_ids: NDArray[np.int64] = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int64)
        self.num_tokens: NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        """Prompt and outputs, those included that a step under way samples."""
        self.num_host_tokens: NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        """Those of them whose values have come back, and are in ``token_ids``."""
        self.sampled_index: NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        """Place of the latest token among those that its step sampled."""
        self.tenure: NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        """Sequences that have had the row: tells whether it still belongs to the one it was given to."""
        self.num_prompt_tokens: NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        self.temperature: NDArray[np.float32] = np.zeros(max_num_seqs, dtype=np.float32)
        """0 for greedy rows."""
        self.top_p: NDArray[np.float32] = np.ones(max_num_seqs, dtype=np.float32)
        self.top_k: NDArray[np.int64] = np.zeros(max_num_seqs, dtype=np.int64)
        self.min_p: NDArray[np.float32] = np.zeros(max_num_seqs, dtype=np.float32)
        self.seed: NDArray[np.uint64] = np.zeros(max_num_seqs, dtype=np.uint64)
        self.is_plain: NDArray[np.bool_] = np.ones(max_num_seqs, dtype=np.bool_)
        """False for rows whose logits are edited (penalties, bias, min_tokens) or reported (logprobs)."""
        self.has_prompt_logprobs: NDArray[np.bool_] = np.zeros(max_num_seqs, dtype=np.bool_)
        self.sampling: list[SamplingParams | None] = [None] * max_num_seqs
        self.adapter_ids: list[AdapterId | None] = [None] * max_num_seqs
        self.last_block_id = 0
        """The highest that any sequence ever had."""
        self._rows: dict[RequestId, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._rows)

    def row_of(self, request_id: RequestId) -> int:
        """The sequence's row."""
        return self._rows[request_id]

    def release(self, request_id: RequestId) -> None:
        """Forget a sequence. Ids that are not held are ignored: a step may have been abandoned half way."""
        row = self._rows.pop(request_id, None)
        if row is not None:
            self.sampling[row] = None
            self.adapter_ids[row] = None
            self._free.append(row)

    def update(self, seq: ScheduledSeq) -> int:
        """Take up what the plan says is new of a sequence; returns its row."""
        request_id = seq.request_id
        if seq.start is not None:
            self.release(request_id)
            assert self._free, "more sequences than max_num_seqs"
            row = self._rows[request_id] = self._free.pop()
            self._start(row, seq.start)
        else:
            row = self._rows[request_id]
        if seq.new_block_ids:
            first = self.num_blocks[row]
            last = first + len(seq.new_block_ids)
            self.block_table[row, first:last] = seq.new_block_ids
            self.last_block_id = max(self.last_block_id, *seq.new_block_ids)
            self.num_blocks[row] = last
        return row

    def _start(self, row: int, start: SeqStart) -> None:
        num_tokens = len(start.token_ids)
        sampling = start.sampling
        self.num_blocks[row] = 0
        self.token_ids[row, :num_tokens] = start.token_ids
        self.num_tokens[row] = self.num_host_tokens[row] = num_tokens
        self.tenure[row] += 1
        self.num_prompt_tokens[row] = start.num_prompt_tokens
        self.temperature[row] = 0.0 if sampling.temperature < GREEDY_BELOW else sampling.temperature
        self.top_p[row] = sampling.top_p
        self.top_k[row] = sampling.top_k
        self.min_p[row] = sampling.min_p
        self.seed[row] = sampling.seed
        self.is_plain[row] = (
            not sampling.has_penalties
            and not sampling.logit_bias
            and sampling.min_tokens == 0
            and sampling.logprobs is None
        )
        self.has_prompt_logprobs[row] = sampling.prompt_logprobs is not None
        self.sampling[row] = sampling
        self.adapter_ids[row] = start.adapter_id

    def expect(self, rows: NDArray[np.int64]) -> "ExpectedTokens":
        """Count the tokens that a step samples for these rows, in this order; ``take_in`` is told their values."""
        expected = ExpectedTokens(rows, self.num_tokens[rows], self.tenure[rows])
        self.num_tokens[rows] += 1
        self.sampled_index[rows] = np.arange(len(rows))
        return expected

    def take_in(self, expected: "ExpectedTokens", token_ids: NDArray[np.int64]) -> None:
        """Record the values of expected tokens, except those of sequences that are gone."""
        rows, positions = expected.rows, expected.positions
        is_held = self.tenure[rows] == expected.tenures
        if not is_held.all():
            rows, positions, token_ids = rows[is_held], positions[is_held], token_ids[is_held]
        self.token_ids[rows, positions] = token_ids
        self.num_host_tokens[rows] = positions + 1


@dataclass(frozen=True, slots=True)
class ExpectedTokens:
    """Tokens under way, as arrays over the sampled rows."""

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    tenures: NDArray[np.int64]
