"""llama.cpp through llama-cpp-python's C interface.

An adapter belongs to the context there, so every batch has one adapter: the groups of a cell are served one after the
other, the largest first. Adapters are float32: at rank 16 its bfloat16 product falls back to scalar code.
"""

import ctypes
import importlib.metadata
import os
import time
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.session import Outcome, Request, Work, by_adapter, main

_LOG_LEVEL_ERROR = 4


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log_errors(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    if level == _LOG_LEVEL_ERROR:
        print(text.decode(errors="replace"), end="", flush=True)


class LlamaCppRunner:
    """A bfloat16 GGUF with one KV stream per sequence and flash attention."""

    def __init__(self, work: Work) -> None:
        self._vocab_size = work.vocab_size
        llama_cpp.llama_log_set(_log_errors, None)
        llama_cpp.llama_backend_init()
        path = work.settings.get("gguf", work.gguf)
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        assert model, f"cannot load {path}"
        params = llama_cpp.llama_context_default_params()
        tokens_per_sequence = -(-work.max_tokens // 256) * 256
        params.n_ctx = work.max_batch * tokens_per_sequence
        params.n_batch = params.n_ctx
        params.n_ubatch = work.settings.get("n_ubatch", 2048)
        params.n_seq_max = work.max_batch
        params.n_threads = params.n_threads_batch = work.settings.get("num_threads", len(os.sched_getaffinity(0)))
        params.flash_attn_type = 1
        params.kv_unified = False
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        assert self._context, "cannot make a context"
        self._adapters = [
            llama_cpp.llama_adapter_lora_init(model, adapter.gguf.encode())
            for adapter in work.adapters[: work.num_loaded]
        ]
        assert all(self._adapters), "cannot load the adapters"
        self._max_rows = params.n_ctx
        self._batch = llama_cpp.llama_batch_init(self._max_rows, 0, 1)
        self._fields = self._map_batch()

    def _map_batch(self) -> dict[str, Any]:
        """Arrays over the batch's memory, so that filling it costs no Python per token."""
        batch, rows = self._batch, (self._max_rows,)
        fields = {
            "token": np.ctypeslib.as_array(batch.token, rows),
            "pos": np.ctypeslib.as_array(batch.pos, rows),
            "logits": np.ctypeslib.as_array(batch.logits, rows),
        }
        np.ctypeslib.as_array(batch.n_seq_id, rows)[:] = 1
        pointers = ctypes.cast(batch.seq_id, ctypes.POINTER(ctypes.c_void_p))
        self._seq_ids = np.zeros(self._max_rows, dtype=np.int32)
        for row in range(self._max_rows):
            pointers[row] = self._seq_ids.ctypes.data + 4 * row
        return fields

    def _use_adapter(self, index: int | None) -> None:
        handle = (
            ctypes.cast(self._adapters[index], llama_cpp.llama_adapter_lora_p_ctypes) if index is not None else None
        )
        count = 0 if handle is None else 1
        handles = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(*([handle] if handle is not None else []))
        scales = (ctypes.c_float * 1)(1.0)
        status = llama_cpp.llama_set_adapters_lora(self._context, handles, count, scales)
        assert status == 0, f"llama_set_adapters_lora: {status}"

    def _decode(self, tokens: Any, positions: Any, seq_ids: Any, is_output: Any) -> Any:
        """One llama_decode; the most likely next token of every output row."""
        count = len(tokens)
        self._fields["token"][:count] = tokens
        self._fields["pos"][:count] = positions
        self._fields["logits"][:count] = is_output
        self._seq_ids[:count] = seq_ids
        self._batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, self._batch)
        assert status == 0, f"llama_decode: {status}"
        num_outputs = int(np.count_nonzero(is_output))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), shape=(num_outputs, self._vocab_size))
        return logits.argmax(axis=1)

    def _serve_group(
        self, prompts: list[list[int]], adapter: int | None, num_output_tokens: int
    ) -> tuple[list[list[int]], float, float]:
        """(tokens of each prompt, time of the first ones, time of the last)."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        self._use_adapter(adapter)
        count, length = len(prompts), len(prompts[0])
        sequences = np.arange(count)
        positions = np.tile(np.arange(length), count)
        last = positions == length - 1
        latest = self._decode(np.concatenate(prompts), positions, np.repeat(sequences, length), last)
        first_s = time.perf_counter()
        outputs = [latest]
        for step in range(num_output_tokens - 1):
            latest = self._decode(latest, np.full(count, length + step), sequences, np.ones(count, dtype=bool))
            outputs.append(latest)
        return np.stack(outputs, axis=1).tolist(), first_s, time.perf_counter()

    def run(self, requests: list[Request], num_output_tokens: int) -> Outcome:
        count = len(requests)
        outcome = Outcome([[]] * count, [0.0] * count, [0.0] * count)
        for adapter, indices in by_adapter(requests):
            prompts = [requests[index].prompt for index in indices]
            tokens, first_s, last_s = self._serve_group(prompts, adapter, num_output_tokens)
            for index, token_ids in zip(indices, tokens, strict=True):
                outcome.token_ids[index] = token_ids
                outcome.first_token_s[index] = first_s
                outcome.finish_s[index] = last_s
        return outcome

    def versions(self) -> dict[str, str]:
        return {
            "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
            "features": llama_cpp.llama_print_system_info().decode().replace(" |", ",").strip(" ,"),
        }


if __name__ == "__main__":
    main(LlamaCppRunner)
