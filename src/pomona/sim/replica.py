"""SimReplica: the real engine on the heap, turned as the real-time loop turns it.

A turn takes in what arrived meanwhile, then steps; outputs are delivered when the step's seconds have passed. What
arrives during a step waits for its end, as it does in driver/loop.py.
"""

from collections.abc import Callable

from pomona.core.adapter import AdapterInfo
from pomona.core.errors import PomonaError
from pomona.core.ids import AdapterId, RequestId
from pomona.core.output import EngineStats, RequestOutput
from pomona.core.request import Request
from pomona.engine.engine import Engine
from pomona.sched.config import SchedulerConfig
from pomona.sim.clock import EventHeap
from pomona.sim.executor import SimExecutor
from pomona.sim.step_work import StepWork

Deliver = Callable[[list[RequestOutput]], None]
"""Takes a turn's outputs, at the time when they are out; not called when there are none."""
Reject = Callable[[Request, PomonaError], None]
"""Takes a request that the engine refused, at the time when it did."""
Observe = Callable[[float, StepWork], None]
"""Takes a step that begins: how long it will last, and what it has to do."""


class SimReplica:
    """One engine in virtual time.

    Args:
        config: limits of its scheduler.
        executor: says how long steps take; of this replica alone.
        heap: the clock.
        deliver: where outputs go.
        reject: where refused requests go.
        overlap_steps: the next step is planned while one is under way, as on a GPU.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        executor: SimExecutor,
        heap: EventHeap,
        deliver: Deliver,
        reject: Reject,
        *,
        overlap_steps: bool = False,
    ) -> None:
        self.config = config
        self.stats = EngineStats(num_kv_blocks=config.num_kv_blocks, num_adapter_pages=config.num_adapter_pages)
        """As of the end of its last turn, which is all that anybody outside could know."""
        self.observe: Observe | None = None
        """Told of every step, if set."""
        self.in_flight: dict[RequestId, Request] = {}
        """Requests that arrived and whose end has not been delivered, oldest first."""
        self._engine = Engine(config, executor, overlap_steps=overlap_steps)
        self._executor = executor
        self._heap = heap
        self._deliver = deliver
        self._reject = reject
        # Requests that arrived and ids of those to abort, in the order in which the news came.
        self._told: list[tuple[Request, AdapterInfo | None] | RequestId] = []
        self._outputs: list[RequestOutput] = []
        self._registered: set[AdapterId] = set()
        # Of all steps that have begun, and the end of the last of them.
        self._steps_s = 0.0
        self._free_s = 0.0
        # A turn is on the heap: about to begin, or under way.
        self._is_turning = False
        self._is_dead = False

    @property
    def is_idle(self) -> bool:
        """True while it has nothing to do."""
        return not self._is_turning

    @property
    def busy_s(self) -> float:
        """Seconds that it has spent on steps until now."""
        return self._steps_s - max(0.0, self._free_s - self._heap.now_s)

    @property
    def executor(self) -> SimExecutor:
        """Says what the latest step had to do, and how long it took."""
        return self._executor

    def submit(self, request: Request, adapter: AdapterInfo | None = None) -> None:
        """Let a request arrive now.

        Args:
            request: what is asked.
            adapter: the adapter it names, which the replica registers when it meets it first.
        """
        assert not self._is_dead, "the dead take no requests"
        self.in_flight[request.request_id] = request
        self._told.append((request, adapter))
        self._wake()

    def abort(self, request_id: RequestId) -> None:
        """Let the news arrive now that a client has gone; its last output follows at the next turn."""
        self._told.append(request_id)
        self._wake()

    def kill(self) -> list[Request]:
        """Lose the replica now, and with it the step under way. Nothing more is delivered.

        Returns:
            The requests it had, oldest first: they end, or begin again elsewhere.
        """
        self._is_dead = True
        lost, self.in_flight = list(self.in_flight.values()), {}
        return lost

    def _wake(self) -> None:
        # Through the heap, so that all that arrives at one time is in one turn.
        if not self._is_turning:
            self._is_turning = True
            self._heap.at(self._heap.now_s, self._begin)

    def _begin(self) -> None:
        if self._is_dead:
            return
        engine = self._engine
        told, self._told = self._told, []
        aborted: list[RequestOutput] = []
        for news in told:
            if isinstance(news, tuple):
                self._add(*news)
            elif (output := engine.abort(news)) is not None:
                aborted.append(output)
        step_s = 0.0
        self._outputs = aborted
        if engine.has_work:
            self._outputs = aborted + engine.step(self._heap.now_s)
            step_s = self._executor.last_step_s
            if self.observe is not None:
                self.observe(step_s, self._executor.last_work)
        self._heap.after(step_s, self._end)
        self._steps_s += step_s
        self._free_s = self._heap.now_s + step_s

    def _end(self) -> None:
        if self._is_dead:
            return
        outputs, self._outputs = self._outputs, []
        for output in outputs:
            if output.finish_reason is not None:
                del self.in_flight[output.request_id]
        self.stats = self._engine.stats()
        if outputs:
            self._deliver(outputs)
        self._is_turning = False
        if self._engine.has_work or self._told:
            self._wake()

    def _add(self, request: Request, adapter: AdapterInfo | None) -> None:
        try:
            if adapter is not None and adapter.adapter_id not in self._registered:
                self._engine.register_adapter(adapter)
                self._registered.add(adapter.adapter_id)
            self._engine.add(request)
        except PomonaError as error:
            self.in_flight.pop(request.request_id, None)  # the replica may have been released since the last one
            self._reject(request, error)
