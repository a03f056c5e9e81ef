"""The seams: where the simulator, tests and other processes plug in."""

from collections.abc import AsyncIterator
from typing import Protocol, runtime_checkable

from pomona.core.adapter import AdapterInfo
from pomona.core.ids import AdapterId, RequestId
from pomona.core.output import EngineStats, RequestOutput
from pomona.core.plan import StepPlan, StepResult
from pomona.core.request import Request


class Executor(Protocol):
    """Whatever can carry out a plan: the tensor runner, the simulator's cost model, a fake in a test."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out one step. Plans arrive in order of ``step_id``, one at a time."""
        ...


class LaunchedStep(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Wait until the step has been carried out. Called once, in order of ``step_id``."""
        ...


@runtime_checkable
class LaunchingExecutor(Executor, Protocol):
    """An executor whose device works beside the caller, so that the next step can be prepared meanwhile."""

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Begin a step; up to two may be under way. ``execute`` is to launch and to wait.

        Whatever order the device keeps, it must look as if the steps were carried out one after the other: a plan may
        give away blocks and pages that the step before it still uses. A decode's token may be one that the step before
        it samples; the executor holds it, the plan does not name it.
        """
        ...


class AdapterHost(Protocol):
    """Where adapters' weights wait in host memory. The runner's; called beside the step, from any thread."""

    def stage(self, path: str) -> AdapterInfo:
        """Read, verify and convert the adapter in the local folder ``path``.

        Raises:
            AdapterError: with everything as it was before.
        """
        ...

    def unstage(self, adapter_id: AdapterId) -> None:
        """Drop the host copy. The caller has made sure that no sequence needs it."""
        ...


class EngineClient(Protocol):
    """The engine as the server sees it, in this process, another one, or on another machine."""

    @property
    def is_ready(self) -> bool:
        """False while the engine starts, or restarts after its death."""
        ...

    @property
    def state(self) -> str:
        """For people: "starting: loading weights 35%", "ready", "restarting: why", "failed: why", "closed"."""
        ...

    @property
    def num_restarts(self) -> int:
        """Times the engine was started again after its death; each time without any adapter."""
        ...

    def stats(self) -> EngineStats:
        """The latest snapshot received; never blocks."""
        ...

    def submit(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Yield the request's outputs until the one with a finish reason. Closing the iterator early aborts; a read
        that was cancelled can be made again.

        Raises:
            QueueFullError: the queue is full; nothing was admitted.
            RateLimitError, InvalidRequestError: the engine refuses it; nothing was admitted.
            EngineUnavailableError: the engine is not there.
        """
        ...

    async def abort(self, request_id: RequestId) -> None:
        """End a request; unknown ids are ignored."""
        ...

    async def load_adapter(self, path: str) -> AdapterInfo:
        """Stage the adapter in the local folder ``path`` on every engine behind this client, or on none.

        Loading the same bytes again is cheap and returns the same id.

        Raises:
            AdapterError: it cannot be used; nothing changed.
            EngineUnavailableError: the engine is not there.
        """
        ...

    async def unload_adapter(self, adapter_id: AdapterId) -> None:
        """Take no new requests for it, let running ones finish, then free every copy. Returns when all is freed."""
        ...

    async def resident_adapters(self) -> frozenset[AdapterId]:
        """Which adapters are on every device now; for people, not for each request.

        Raises:
            EngineUnavailableError: the engine is not there.
        """
        ...
