"""Engine: a scheduler and an executor, stepped. No I/O, clock or thread: the real-time driver and the simulator turn
this very object.
"""

from collections import deque

from pomona.core.adapter import AdapterInfo
from pomona.core.ids import AdapterId, RequestId
from pomona.core.interfaces import Executor, LaunchedStep, LaunchingExecutor
from pomona.core.output import EngineStats, RequestOutput
from pomona.core.plan import StepPlan, StepResult
from pomona.core.request import Request
from pomona.sched.adapter_slots import AdapterStatus
from pomona.sched.config import SchedulerConfig
from pomona.sched.scheduler import Scheduler


class Engine:
    """Turns requests into outputs, one step at a time.

    Args:
        config: limits of the scheduler.
        executor: carries out the plans. It must accept a plan without sequences (there may be something to forget), and
            ignore released ids that it does not hold (after a failure they are sent once more).
        overlap_steps: plan and launch the next step before the result of the one under way is awaited. A sequence that
            turns out to have ended then has one row computed in vain. The executor must be a LaunchingExecutor.
    """

    def __init__(self, config: SchedulerConfig, executor: Executor, *, overlap_steps: bool = False) -> None:
        self._scheduler = Scheduler(config)
        self._executor = executor
        self._launcher: LaunchingExecutor | None = None
        if overlap_steps:
            assert isinstance(executor, LaunchingExecutor), "overlap needs an executor that launches"
            self._launcher = executor
        # Steps whose results have not been taken in, oldest first: at most one between calls of ``step``.
        self._launched: deque[tuple[StepPlan, LaunchedStep]] = deque()
        # Terminal outputs of a step whose execution raised; whoever calls next gets them.
        self._undelivered: list[RequestOutput] = []

    @property
    def config(self) -> SchedulerConfig:
        """Limits of the scheduler."""
        return self._scheduler.config

    @property
    def has_work(self) -> bool:
        """True while ``step`` has something to do or to deliver."""
        return bool(self._undelivered or self._launched) or self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Accept a request; from now on it ends in exactly one terminal output.

        Raises:
            InvalidRequestError: it can never be served; names the field.
            PromptTooLongError: it does not fit the context or the KV cache.
            QueueFullError: too many requests wait already.
        """
        self._scheduler.add(request)

    def abort(self, request_id: RequestId) -> RequestOutput | None:
        """End a request now. Returns its terminal output, or None if no such request is known."""
        return self._scheduler.abort(request_id)

    def step(self, now_s: float) -> list[RequestOutput]:
        """Schedule, execute, update; with overlapped steps, the step scheduled is the one after the one whose result is
        awaited. Does nothing when there is no work.

        Args:
            now_s: seconds on the clock of ``Request.arrival_s``; must not run backwards.

        Returns:
            News of every request that has some.

        Raises:
            Exception: what the executor raised, or what interrupted it. Every request has then ended with FAIL, and
                ``fail_all`` or the next ``step`` returns those outputs. Going on needs an executor that can still
                follow plans, the same or a new one: no sequence, adapter or KV of before is relied on. Exceptions that
                come at any moment, as Ctrl-C does, are to be held back: no books survive being cut short.
        """
        outputs, self._undelivered = self._undelivered, []
        if not self._launched and not self._scheduler.has_work:
            return outputs
        try:
            if self._launcher is not None:
                plan, result = self._overlapped_step(self._launcher, now_s)
            else:
                plan = self._scheduler.schedule(now_s)
                result = self._executor.execute(plan)
            return outputs + self._scheduler.update(plan, result, now_s)
        except BaseException as error:  # Ctrl-C too: the scheduler waits for what the step would have brought
            self._launched.clear()
            self._undelivered = outputs + self._scheduler.fail_all(f"the model failed: {type(error).__name__}")
            raise

    def _overlapped_step(self, executor: LaunchingExecutor, now_s: float) -> tuple[StepPlan, StepResult]:
        """The result of the oldest step under way, once the one after it has been launched as well."""
        if not self._launched:
            plan = self._scheduler.schedule(now_s)
            self._launched.append((plan, executor.launch(plan)))
        if (ahead := self._scheduler.schedule_ahead(now_s)) is not None:
            self._launched.append((ahead, executor.launch(ahead)))
        plan, launched = self._launched.popleft()
        return plan, launched.result()

    def fail_all(self, reason: str) -> list[RequestOutput]:
        """End every request with FAIL, for example because the executor died. Registered adapters stay registered.

        Args:
            reason: fit to show to clients.
        """
        outputs, self._undelivered = self._undelivered, []
        self._launched.clear()
        return outputs + self._scheduler.fail_all(reason)

    def register_adapter(self, info: AdapterInfo) -> None:
        """Let requests name a staged adapter. Registering it again revives it if it was being retired.

        Raises:
            AdapterError: it needs more adapter pages than there are.
        """
        self._scheduler.adapters.register(info)

    def retire_adapter(self, adapter_id: AdapterId) -> None:
        """Take no new requests for an adapter; accepted ones finish. ``take_drained`` tells when nothing is left of it;
        until then its host copy must stay."""
        self._scheduler.adapters.retire(adapter_id)

    def take_drained(self) -> list[AdapterId]:
        """Retired adapters of which nothing is left on the device, each reported once. Ask after every step, and after
        ``retire_adapter`` and ``abort``."""
        return self._scheduler.adapters.take_drained()

    def adapter_statuses(self) -> list[AdapterStatus]:
        """Every registered adapter: resident or not, draining or not, how many requests use it."""
        return self._scheduler.adapters.statuses()

    def stats(self) -> EngineStats:
        """A snapshot: gauges as they are, counters since the engine was made."""
        return self._scheduler.stats()
