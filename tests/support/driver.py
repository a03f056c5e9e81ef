"""A real engine over an executor without tensors, for tests of the driver: tokens are a function of the request alone.

Builders are picklable, so the same parts run in this process and in a child. Some prompts make the executor misbehave.
"""

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from pomona.core.adapter import AdapterInfo
from pomona.core.engine_info import EngineInfo
from pomona.core.errors import AdapterNotFoundError, PomonaError
from pomona.core.ids import AdapterId, RequestId
from pomona.core.interfaces import EngineClient
from pomona.core.output import RequestOutput
from pomona.core.plan import SeqStart, StepPlan, StepResult
from pomona.core.request import FinishReason, Request, SamplingParams
from pomona.driver.loop import EngineParts
from pomona.engine.engine import Engine
from pomona.sched.config import SchedulerConfig

VOCAB_SIZE = 1000
KILL_TOKEN, HANG_TOKEN, RAISE_TOKEN = 991, 992, 993
"""As the first token of a prompt: the process kills itself, the step never returns, the step raises."""


def make_request(
    name: str, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 8, adapter_id: AdapterId | None = None
) -> Request:
    return Request(
        RequestId(name),
        prompt,
        SamplingParams(max_tokens=max_tokens, temperature=0.0),
        time.monotonic(),
        adapter_id=adapter_id,
    )


def expected_tokens(request: Request) -> list[int]:
    """What FunctionExecutor answers."""
    return [_token(request.prompt_token_ids, request.adapter_id, index) for index in range(request.sampling.max_tokens)]


def _token(prompt: tuple[int, ...], adapter_id: AdapterId | None, index: int) -> int:
    offset = 0 if adapter_id is None else int(adapter_id[:6], 16)
    return (sum(prompt) + offset + 7 * index) % VOCAB_SIZE


@dataclass
class FunctionExecutor:
    """Output token i is a function of prompt, adapter and i. Refuses adapters that were not loaded by the plan."""

    host: "FolderHost"
    step_s: float = 0.0
    starts: dict[RequestId, SeqStart] = field(default_factory=dict)
    resident: set[AdapterId] = field(default_factory=set)

    def execute(self, plan: StepPlan) -> StepResult:
        for request_id in plan.released:
            del self.starts[request_id]
        self.resident.difference_update(plan.adapter_evictions)
        for load in plan.adapter_loads:
            assert load.adapter_id in self.host.staged, f"{load.adapter_id} has no host copy"
            self.resident.add(load.adapter_id)
        sampled: dict[RequestId, int] = {}
        for seq in plan.seqs:
            if seq.start is not None:
                self.starts[seq.request_id] = seq.start
                _misbehave(seq.start.token_ids[0])
            start = self.starts[seq.request_id]
            assert start.adapter_id is None or start.adapter_id in self.resident
            if seq.is_sampled:
                index = seq.num_computed_tokens + seq.num_scheduled_tokens - start.num_prompt_tokens
                prompt = start.token_ids[: start.num_prompt_tokens]
                sampled[seq.request_id] = _token(prompt, start.adapter_id, index)
        if self.step_s:
            time.sleep(self.step_s)
        return StepResult(plan.step_id, sampled)


def _misbehave(token_id: int) -> None:
    if token_id == KILL_TOKEN:
        os.kill(os.getpid(), signal.SIGKILL)
    if token_id == HANG_TOKEN:
        time.sleep(3600.0)
    if token_id == RAISE_TOKEN:
        raise RuntimeError("the device is on fire")


@dataclass
class FolderHost:
    """An AdapterHost: an adapter is a folder with a file "weights", whose digest is the id. "pages" is in the file
    "pages", and "seconds" delays staging."""

    staged: set[AdapterId] = field(default_factory=set)

    def stage(self, path: str) -> AdapterInfo:
        weights = Path(path, "weights")
        seconds = Path(path, "seconds")
        if seconds.exists():
            time.sleep(float(seconds.read_text()))
        if not weights.exists():
            raise AdapterNotFoundError(f"{path} holds no adapter")
        content = weights.read_bytes()
        if content == b"crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if content == b"bug":
            raise ZeroDivisionError("a bug in the host")
        adapter_id = AdapterId(hashlib.sha256(content).hexdigest())
        num_pages = int(Path(path, "pages").read_text()) if Path(path, "pages").exists() else 1
        self.staged.add(adapter_id)
        return AdapterInfo(adapter_id, lora_rank=8, num_pages=num_pages, num_host_bytes=len(content))

    def unstage(self, adapter_id: AdapterId) -> None:
        self.staged.remove(adapter_id)


def make_adapter(directory: Path, content: str = "one", seconds: float = 0.0, num_pages: int = 1) -> str:
    """A folder for FolderHost.stage."""
    directory.mkdir(exist_ok=True)
    (directory / "weights").write_text(content)
    (directory / "pages").write_text(str(num_pages))
    if seconds:
        (directory / "seconds").write_text(str(seconds))
    return str(directory)


@dataclass(frozen=True)
class TinyBuilder:
    """An EngineBuilder. The file ``first_start`` makes starts after the first differ: they use ``later`` instead."""

    step_s: float = 0.0
    max_waiting: int = 1024
    max_num_seqs: int = 256
    start_s: float = 0.0
    progress: tuple[str, ...] = ()
    error: PomonaError | None = None
    kill: bool = False
    marker: str | None = None
    later: "TinyBuilder | None" = None

    def __call__(self, report_progress: Callable[[str], None]) -> EngineParts:
        if self.marker is not None and self.later is not None:
            if Path(self.marker).exists():
                return self.later(report_progress)
            Path(self.marker).touch()
        for progress in self.progress:
            report_progress(progress)
        time.sleep(self.start_s)
        if self.error is not None:
            raise self.error
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.build()

    def build(self) -> EngineParts:
        config = SchedulerConfig(
            num_kv_blocks=4096,
            max_model_len=4096,
            num_adapter_pages=16,
            max_waiting=self.max_waiting,
            max_num_seqs=self.max_num_seqs,
        )
        host = FolderHost()
        engine = Engine(config, FunctionExecutor(host, self.step_s))
        info = EngineInfo(
            max_model_len=config.max_model_len,
            vocab_size=VOCAB_SIZE,
            block_size=config.block_size,
            num_kv_blocks=config.num_kv_blocks,
            num_adapter_pages=config.num_adapter_pages,
            dtype="float32",
            device="none",
        )
        return EngineParts(engine, host, info)


async def read(stream: AsyncIterator[RequestOutput]) -> tuple[list[int], FinishReason | None]:
    """All tokens of a stream and its one finish reason."""
    token_ids: list[int] = []
    reasons: list[FinishReason] = []
    async for output in stream:
        assert not reasons, "nothing follows the terminal output"
        token_ids.extend(output.new_token_ids)
        if output.finish_reason is not None:
            reasons.append(output.finish_reason)
    assert len(reasons) == 1, "a stream that ends has had its terminal output"
    return token_ids, reasons[0]


async def until(is_true: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
    """Wait for a condition that must come true."""
    deadline_s = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"{what} did not happen within {limit_s:g} s"
        await asyncio.sleep(0.005)


def is_idle(client: EngineClient) -> bool:
    """True when the client's last snapshot shows no sequence and no block in use."""
    stats = client.stats()
    return stats.num_running == stats.num_waiting == stats.num_kv_blocks_used == stats.num_pinned_adapters == 0
