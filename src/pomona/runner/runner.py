"""ModelRunner: the LaunchingExecutor made of tensors. It carries out plans; it decides nothing."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pomona.core.ids import RequestId
from pomona.core.plan import StepPlan, StepResult, TokenLogprobs
from pomona.kernels.copies import Download
from pomona.kernels.cpu import binding as cpu
from pomona.kernels.cpu.workspace import Activations
from pomona.model.decoder import Decoder
from pomona.model.lora import LoraState
from pomona.runner.adapter_host import StagedAdapters
from pomona.runner.adapter_pool import AdapterPool
from pomona.runner.batch import DeviceBatch, HostBatch, gather, to_device
from pomona.runner.graphs import DecodeGraphs
from pomona.runner.kv_cache import KVCache
from pomona.runner.recorded import RecordedDecodes
from pomona.runner.sampler import PROMPT_LOGITS_ROWS, Choice, choose, token_logprobs
from pomona.runner.sequences import ExpectedTokens, SequenceTable

_IDLE_WAIT_S = 0.002
"""A step with nothing to compute waits this long for adapters on their way."""
_MANY_ROWS = 128
"""Of fewer, no result is worth memory of its own."""
_NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class LaunchedModelStep:
    """A step of which everything has been asked of the device."""

    step_id: int
    table: SequenceTable
    adapter_pool: AdapterPool
    request_ids: list[RequestId] = field(default_factory=list)
    """Of the sampled rows."""
    sampling: tuple[Choice, ExpectedTokens] | None = None
    """None if no row is sampled."""
    computed: Download | None = None
    """Of a step on a GPU without sampled rows: of nothing, but there only when the step has been computed. If nobody
    waited, all chunks of a long prompt would be asked for at once, and who comes meanwhile would wait for all."""
    prompt_logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = field(default_factory=dict)

    @torch.inference_mode()
    def result(self) -> StepResult:
        """Wait for the step's tokens and record them in the table."""
        loading = self.adapter_pool.loading if self.adapter_pool.under_way else _NONE
        failed_loads = self.adapter_pool.take_failed() if self.adapter_pool.failed_loads else _NONE
        if self.sampling is None:
            if self.computed is not None:
                self.computed.arrays()
            return StepResult(
                step_id=self.step_id,
                prompt_logprobs=self.prompt_logprobs,
                loading=loading,
                failed_loads=failed_loads,
            )
        choice, expected = self.sampling
        sampled = choice.sampled()
        self.table.take_in(expected, sampled.token_ids)
        pairs = zip(self.request_ids, sampled.token_ids.tolist(), sampled.is_finite, strict=True)
        return StepResult(
            step_id=self.step_id,
            sampled={request_id: token_id for request_id, token_id, ok in pairs if ok},
            logprobs={self.request_ids[index]: value for index, value in sampled.logprobs.items()},
            prompt_logprobs=self.prompt_logprobs,
            failed={
                self.request_ids[index]: "the model produced logits that are not finite"
                for index in np.flatnonzero(~sampled.is_finite)
            },
            loading=loading,
            failed_loads=failed_loads,
        )


class ModelRunner:
    """Executes step plans on one device.

    Args:
        decoder: the base model.
        kv_cache: as many blocks as the scheduler was told.
        adapter_pool: as many pages as the scheduler was told.
        staged: host copies of adapters, filled beside the step.
        table: one row per running sequence.
        block_size: token positions per KV block.
        device: where the decoder lives.
        graphs: of the decoder, captured; None to run every step as it comes.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        adapter_pool: AdapterPool,
        staged: StagedAdapters,
        table: SequenceTable,
        *,
        block_size: int,
        device: torch.device,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._adapter_pool = adapter_pool
        self._staged = staged
        self._table = table
        self._block_size = block_size
        self._device = device
        self.graphs = graphs
        has_cpu_kernels = device.type == "cpu" and cpu.is_available()
        self._recorded = RecordedDecodes(decoder, kv_cache) if has_cpu_kernels else None
        self._activations = Activations() if has_cpu_kernels else None
        # Tokens that the latest step sampled; those whose values the host lacks are read from here.
        self._latest: Tensor | None = None

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out one step: release, evict, load, forward, sample."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> "LaunchedModelStep":
        """Begin a step: everything but to wait for its tokens. On a CPU all of it is done here.

        Log-probabilities of prompt tokens are waited for.
        """
        if self._device.type == "cuda":
            # Each thread has a current GPU, which Triton's launches and events go to.
            torch.cuda.set_device(self._device)
        for request_id in plan.released:
            self._table.release(request_id)
        if not plan.seqs:
            self._adapter_pool.apply(plan.adapter_evictions, plan.adapter_loads, self._staged.staged)
            self._adapter_pool.wait(_IDLE_WAIT_S)
            return LaunchedModelStep(plan.step_id, self._table, self._adapter_pool)
        host = gather(plan, self._table, self._block_size)
        used = [run.adapter_id for run in host.adapter_runs] if plan.adapter_loads else ()
        self._adapter_pool.apply(plan.adapter_evictions, plan.adapter_loads, self._staged.staged, used)
        self._kv_cache.use(self._table.last_block_id)
        logits = None if self.graphs is None else self.graphs.logits(host, self._latest)
        prompt_logprobs: dict[RequestId, tuple[TokenLogprobs, ...]] = {}
        if logits is None:
            batch = to_device(host, self._device, self._latest)
            lora = self._adapter_pool.state(host.adapter_runs)
            hidden = self._forward(host, batch, lora)
            if self._adapter_pool.deferred:
                self._adapter_pool.begin_deferred()
            prompt_logprobs = self._prompt_logprobs(plan, host, hidden, lora)
            if not host.sampled_seqs.size:
                return LaunchedModelStep(
                    plan.step_id,
                    self._table,
                    self._adapter_pool,
                    prompt_logprobs=prompt_logprobs,
                    computed=Download.of(batch.token_ids[:0]) if self._device.type == "cuda" else None,
                )
            logits = self._decoder.logits(hidden if host.is_decode else hidden[batch.sampled_rows], lora)
        rows = host.table_rows[host.sampled_seqs]
        choice = choose(logits, rows, self._table)
        self._latest = choice.token_ids
        return LaunchedModelStep(
            plan.step_id,
            self._table,
            self._adapter_pool,
            request_ids=[plan.seqs[index].request_id for index in host.sampled_seqs],
            sampling=(choice, self._table.expect(rows)),
            prompt_logprobs=prompt_logprobs,
        )

    def _forward(self, host: HostBatch, batch: DeviceBatch, lora: LoraState | None) -> Tensor:
        if self._recorded is not None and host.is_decode:
            hidden = self._recorded.forward(batch, lora)
            if hidden is not None:
                return hidden
        arguments = (batch.token_ids, batch.positions, self._kv_cache.layers, batch.attention, lora)
        if self._activations is None or batch.token_ids.shape[0] < _MANY_ROWS:
            return self._decoder.forward(*arguments)
        with self._activations.in_use():
            return self._decoder.forward(*arguments)

    def _prompt_logprobs(
        self, plan: StepPlan, batch: HostBatch, hidden: Tensor, lora: LoraState | None
    ) -> dict[RequestId, tuple[TokenLogprobs, ...]]:
        """For sequences that asked: log-probabilities of the prompt tokens that this step's rows predict."""
        found: dict[RequestId, tuple[TokenLogprobs, ...]] = {}
        for index in np.flatnonzero(self._table.has_prompt_logprobs[batch.table_rows]):
            row, seq = batch.table_rows[index], plan.seqs[index]
            params = self._table.sampling[row]
            assert params is not None
            assert params.prompt_logprobs is not None
            first = seq.num_computed_tokens + 1
            last = min(first + seq.num_scheduled_tokens, int(self._table.num_prompt_tokens[row]))
            if first >= last:
                continue
            start = int(batch.query_starts[index])
            rows = hidden[start : start + last - first]
            token_ids = self._table.token_ids[row, first:last]
            entries: list[TokenLogprobs] = []
            for logits in self._logits_of_run(rows, start, lora):
                told = token_ids[len(entries) : len(entries) + len(logits)]
                entries += token_logprobs(logits, told, params.prompt_logprobs)
            found[seq.request_id] = tuple(entries)
        return found

    def _logits_of_run(self, hidden: Tensor, start: int, lora: LoraState | None) -> Iterator[Tensor]:
        """Yield logits [some rows, vocab_size] of consecutive rows of one adapter; the first is row ``start`` of the
        batch."""
        extras = () if lora is None else tuple(extra for first, end, extra in lora.extras if first <= start < end)
        for part in torch.split(hidden, PROMPT_LOGITS_ROWS):
            logit_extras = tuple((0, part.shape[0], extra) for extra in extras)
            yield self._decoder.logits(part, lora and replace(lora, logit_extras=logit_extras))
