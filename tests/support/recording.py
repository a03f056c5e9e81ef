"""What a live engine was told and when, kept so that the simulator can be told the same."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from pomona.core.ids import RequestId
from pomona.core.interfaces import Executor, LaunchedStep, LaunchingExecutor
from pomona.core.output import RequestOutput
from pomona.core.plan import StepPlan, StepResult
from pomona.core.request import Request
from pomona.engine.engine import Engine
from pomona.sim.executor import SimExecutor, SimLaunchedStep
from pomona.sim.step_work import StepWork

_TICKS_PER_S = 2.0**20
"""Times are cut to binary fractions, so that sums and differences of them are exact."""


@dataclass
class RecordingExecutor:
    """Hands plans on and keeps them, with the tokens that came out."""

    executor: Executor
    plans: list[StepPlan] = field(default_factory=list)
    tokens: dict[tuple[RequestId, int], int] = field(default_factory=dict)
    """(request, position in its sequence) -> token."""

    def execute(self, plan: StepPlan) -> StepResult:
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> "RecordingStep":
        assert isinstance(self.executor, LaunchingExecutor)
        self.plans.append(plan)
        return RecordingStep(self, plan, self.executor.launch(plan))

    def next_token(self, request_id: RequestId, position: int) -> int:
        return self.tokens[request_id, position]


@dataclass
class RecordingStep:
    """A launched step whose tokens are kept when they are there."""

    keeper: RecordingExecutor
    plan: StepPlan
    step: LaunchedStep

    def result(self) -> StepResult:
        result = self.step.result()
        for seq in self.plan.seqs:
            if seq.is_sampled:
                position = seq.num_computed_tokens + seq.num_scheduled_tokens
                self.keeper.tokens[seq.request_id, position] = result.sampled[seq.request_id]
        return result


class RecordingSimExecutor(SimExecutor):
    """A simulator's executor that keeps the plans."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan) -> SimLaunchedStep:
        self.plans.append(plan)
        return super().launch(plan)


class RecordingEngine:
    """An engine that notes what was added and aborted before each step, and when the steps began."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._added: list[Request] = []
        self._aborted: list[RequestId] = []
        self.turns: list[tuple[float, list[Request], list[RequestId]]] = []
        """(the step's time, requests added before it, requests aborted before it)."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def add(self, request: Request) -> None:
        self._engine.add(request)
        self._added.append(request)

    def abort(self, request_id: RequestId) -> RequestOutput | None:
        self._aborted.append(request_id)
        return self._engine.abort(request_id)

    def step(self, now_s: float) -> list[RequestOutput]:
        now_s = math.floor(now_s * _TICKS_PER_S) / _TICKS_PER_S
        self.turns.append((now_s, self._added, self._aborted))
        self._added, self._aborted = [], []
        return self._engine.step(now_s)

    def gaps_s(self) -> list[float]:
        """Seconds from each step's beginning to the next one's."""
        times = [now_s for now_s, _, _ in self.turns]
        return [after - before for before, after in itertools.pairwise(times)]


@dataclass
class RecordedCost:
    """A cost model that says of the k-th step what the k-th step took."""

    seconds_left: list[float]
    """The next step's last."""

    def seconds(self, work: StepWork) -> float:
        del work
        return self.seconds_left.pop() if self.seconds_left else 0.0
