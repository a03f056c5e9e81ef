"""Decode steps replayed from graphs: one per number of rows, with adapters and without, for any adapters.

What a decode step launches depends on its number of rows alone; everything else stands in tensors that are refilled
before each replay (``graph_inputs``). Steps that differ in kind run as they are: prompts, more rows than the largest
graph, adapters with more than low-rank parts or of larger rank.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from pomona.kernels import attention as attention_ops
from pomona.kernels import lora as lora_ops
from pomona.kernels.attention import AttentionBatch, DecodeShape
from pomona.model.decoder import Decoder
from pomona.model.lora import LoraState
from pomona.runner.adapter_pool import AdapterPool
from pomona.runner.batch import HostBatch
from pomona.runner.captures import Capture, Replay
from pomona.runner.graph_inputs import DecodeInputs, GraphLimits, LoraInputs
from pomona.runner.kv_cache import KVCache


def default_batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Rows of captured steps: fine where padding would weigh most, none above 512."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 513, 32)]
    largest = min(max_num_seqs, sizes[-1])
    return (*(size for size in sizes if size < largest), largest)


@dataclass
class _Bucket:
    """The captured steps of one number of rows."""

    num_rows: int
    attention: AttentionBatch
    lora: LoraState | None
    """None if no adapter can be resident."""
    max_kv_tokens: int
    replays: dict[bool, Replay] = field(default_factory=dict)
    """By whether there are rows with adapters."""


class DecodeGraphs:
    """Decode steps, captured.

    Args:
        decoder: the base model.
        kv_cache: has scrap blocks after its others, see ``GraphLimits``.
        pool: adapters' pages; without any, no step with adapters is captured.
        limits: sizes.
        capture: what captures and replays.
    """

    def __init__(
        self, decoder: Decoder, kv_cache: KVCache, pool: AdapterPool, limits: GraphLimits, capture: Capture
    ) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._limits = limits
        self._capture = capture
        device = decoder.weights.device
        self._inputs = DecodeInputs(limits, device)
        # Of one replay at a time: as results of their own, the graphs' logits would take gigabytes.
        shape = (limits.batch_sizes[-1], decoder.spec.vocab_size)
        self._logits = torch.empty(shape, dtype=torch.float32, device=device)
        self._lora: LoraInputs | None = None
        if pool.num_pages:
            self._lora = LoraInputs(limits, pool, decoder.spec, device, is_frozen=capture.is_frozen)
        self._buckets: dict[int, _Bucket] = {}
        self.num_replays = 0
        """Steps replayed since the start."""

    @torch.inference_mode()
    def capture(self, num_rows: int) -> None:
        """Capture the steps of one of the limits' batch sizes. Larger ones first use the least memory.

        Before the first sequence, because KV is overwritten.
        """
        attention = self._inputs.attention(num_rows)
        spec, max_kv_tokens = self._decoder.spec, self._limits.max_kv_tokens(num_rows)
        for window in dict.fromkeys(spec.sliding_windows):
            dtype = self._kv_cache.layers[0][0].dtype
            shape = DecodeShape(spec.num_heads, spec.num_kv_heads, spec.head_dim, dtype, window)
            attention_ops.reserve(attention, shape, max_kv_tokens)
        lora = None if self._lora is None else self._lora.state()
        if lora is not None:
            lora_ops.reserve(lora.batch, num_rows)
        bucket = self._buckets[num_rows] = _Bucket(num_rows, attention, lora, max_kv_tokens)
        for has_lora in (False, True) if lora is not None else (False,):
            bucket.replays[has_lora] = self._capture.capture(self._function(bucket, has_lora=has_lora))

    def capture_all(self, report_progress: Callable[[str], None] = lambda text: None) -> None:
        """Capture every batch size."""
        sizes = self._limits.batch_sizes
        for index, num_rows in enumerate(reversed(sizes)):
            report_progress(f"capturing decode steps {100 * index // len(sizes)}%")
            self.capture(num_rows)

    def logits(self, batch: HostBatch, latest: Tensor | None) -> Tensor | None:
        """Replay a step.

        Args:
            batch: any step.
            latest: see ``batch.to_device``.

        Returns:
            float32 [num_seqs, vocab_size], to be used before the next replay; None if no graph fits, and then nothing
            was done.
        """
        num_seqs = len(batch.table_rows)
        if not batch.is_decode or num_seqs > self._limits.batch_sizes[-1]:
            return None
        bucket = self._buckets[self._limits.batch_sizes[bisect_left(self._limits.batch_sizes, num_seqs)]]
        if int(batch.context_lens.sum()) + bucket.num_rows - num_seqs > bucket.max_kv_tokens:
            return None
        if batch.adapter_runs:
            assert self._lora is not None
            assert bucket.lora is not None
            if not self._lora.has_room(batch.adapter_runs):
                return None
            bucket.lora = self._lora.fill(batch.adapter_runs, bucket.lora)
        bucket.attention = self._inputs.fill(batch, latest, bucket.attention)
        self.num_replays += 1
        bucket.replays[bool(batch.adapter_runs)]()
        return self._logits[:num_seqs]

    def _function(self, bucket: _Bucket, *, has_lora: bool) -> Callable[[], None]:
        """What is captured."""
        num_rows = bucket.num_rows
        token_ids, positions = self._inputs.token_ids(num_rows), self._inputs.positions(num_rows)
        frozen = (bucket.attention, bucket.lora) if self._capture.is_frozen else None

        def forward() -> None:
            attention, lora = frozen or (bucket.attention, bucket.lora)
            lora = lora if has_lora else None
            hidden = self._decoder.forward(token_ids, positions, self._kv_cache.layers, attention, lora)
            self._logits[:num_rows].copy_(self._decoder.logits(hidden, lora))

        return forward


def measure_graph_bytes(
    make_graphs: Callable[[], DecodeGraphs], batch_sizes: Sequence[int], free_bytes: Callable[[], int]
) -> int:
    """Memory that graphs of all these sizes will take, found by capturing the two largest for trial.

    The first one makes what all share, temporaries of the largest step and libraries' workspaces; each further one
    takes at most what the second does.

    Args:
        make_graphs: makes graphs for trial; their KV cache may be as small as the largest step's rows.
        batch_sizes: ascending.
        free_bytes: free memory of the device now.
    """
    taken = [free_bytes()]
    graphs = make_graphs()
    for num_rows in reversed(batch_sizes[-2:]):
        graphs.capture(num_rows)
        taken.append(free_bytes())
    first, *further = (max(before - after, 0) for before, after in pairwise(taken))
    return first + sum(further) * (len(batch_sizes) - 1)
