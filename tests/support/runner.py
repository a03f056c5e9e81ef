"""Engines made of the real scheduler and the real tensor runner, on tiny checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pomona.core.ids import AdapterId, RequestId, TenantId
from pomona.core.output import RequestOutput
from pomona.core.request import FinishReason, Request, SamplingParams
from pomona.engine.engine import Engine
from pomona.runner.config import RunnerConfig
from pomona.runner.loading import LoadedRunner, load_runner
from pomona.sched.config import SchedulerConfig

_RUNNER_FIELDS = frozenset(RunnerConfig.__dataclass_fields__)
_LIMITS = frozenset(SchedulerConfig.__dataclass_fields__)


class TinyEngine:
    """An engine that is stepped by the test, with its adapters and the outputs of every request so far.

    Args:
        checkpoint: a base model's folder.
        overlap_steps: see Engine.
        settings: fields of RunnerConfig and SchedulerConfig; ``num_kv_blocks`` makes memory scarce
            and keeps KV from adapter pages.
    """

    def __init__(self, checkpoint: Path, *, overlap_steps: bool = False, **settings: Any) -> None:
        defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": 4, "num_threads": 1}
        memory: dict[str, Any] = {"kv_cache_bytes": 8 * 2**20, "adapter_bytes": 4 * 2**20}
        chosen = {**defaults, **memory, **{name: settings[name] for name in settings if name in _RUNNER_FIELDS}}
        self.loaded: LoadedRunner = load_runner(RunnerConfig(model_path=str(checkpoint), **chosen))
        limits = {name: value for name, value in settings.items() if name in _LIMITS and name != "block_size"}
        capacity = self.loaded.capacity
        self.engine = Engine(
            SchedulerConfig(
                **{
                    "num_kv_blocks": capacity.num_kv_blocks,
                    "num_adapter_pages": capacity.num_adapter_pages,
                    # Where a page stands follows from the number of KV's own blocks.
                    "blocks_per_page": 0 if "num_kv_blocks" in limits else capacity.blocks_per_page,
                    "max_model_len": self.loaded.max_model_len,
                    "vocab_size": self.loaded.spec.vocab_size,
                    "block_size": chosen["block_size"],
                    **limits,
                }
            ),
            self.loaded.runner,
            overlap_steps=overlap_steps,
        )
        self.outputs: dict[RequestId, list[RequestOutput]] = {}
        self._now_s = 0.0

    def load_adapter(self, path: Path) -> AdapterId:
        """Stage and register an adapter."""
        info = self.loaded.adapters.stage(str(path))
        self.engine.register_adapter(info)
        return info.adapter_id

    def add(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams | None = None,
        adapter_id: AdapterId | None = None,
        *,
        salt: bytes = b"",
    ) -> RequestId:
        """Add a request; greedy and 16 tokens unless told otherwise."""
        request_id = RequestId(f"request-{len(self.outputs)}")
        self.engine.add(
            Request(
                request_id=request_id,
                prompt_token_ids=tuple(prompt),
                sampling=sampling or SamplingParams(max_tokens=16, temperature=0.0),
                arrival_s=self._now_s,
                tenant_id=TenantId("tenant"),
                adapter_id=adapter_id,
                cache_salt=salt,
            )
        )
        self.outputs[request_id] = []
        return request_id

    def step(self) -> None:
        """One step."""
        self._now_s += 0.01
        for output in self.engine.step(self._now_s):
            self.outputs[output.request_id].append(output)

    def run(self) -> None:
        """Step until nothing is left to do."""
        for _ in range(10_000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def tokens(self, request_id: RequestId) -> list[int]:
        """Output tokens so far."""
        return [token_id for output in self.outputs[request_id] for token_id in output.new_token_ids]

    def finish_reason(self, request_id: RequestId) -> FinishReason | None:
        """How the request ended; None while it runs."""
        return self.outputs[request_id][-1].finish_reason if self.outputs[request_id] else None

    def generate(
        self, prompt: Sequence[int], sampling: SamplingParams | None = None, adapter_id: AdapterId | None = None
    ) -> list[int]:
        """Run one request alone."""
        request_id = self.add(prompt, sampling, adapter_id)
        self.run()
        return self.tokens(request_id)
