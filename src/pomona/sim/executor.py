"""SimExecutor: an Executor without a model, which says of a plan what tokens came out and how long it took."""

from collections.abc import Callable, Container, Mapping
from zlib import crc32

from pomona.core.ids import AdapterId, RequestId
from pomona.core.plan import StepPlan, StepResult
from pomona.sim.cost_model import CostModel
from pomona.sim.step_work import StepWork, WorkMeter

NextToken = Callable[[RequestId, int], int]
"""(request, position in its sequence) -> the token that stands there."""

_VOCAB_SIZE = 2**20


def hashed_token(request_id: RequestId, position: int) -> int:
    """A token that depends on both arguments and nothing else, so that only equal prefixes look equal."""
    return (crc32(request_id.encode()) + 2654435761 * position) % _VOCAB_SIZE


class SimExecutor:
    """Turns plans into tokens and seconds.

    Args:
        cost_model: how long a step takes.
        lora_ranks: largest rank of every adapter that a plan may name; may grow later.
        next_token: which tokens come out.
        with_extras: adapters that have more than low-rank parts; may grow later.
    """

    def __init__(
        self,
        cost_model: CostModel,
        lora_ranks: Mapping[AdapterId, int],
        next_token: NextToken = hashed_token,
        with_extras: Container[AdapterId] = (),
    ) -> None:
        self.last_work = StepWork()
        """What the latest step that gave its result had to do."""
        self.last_step_s = 0.0
        """How long the device took for it."""
        self._cost_model = cost_model
        self._meter = WorkMeter(lora_ranks, with_extras)
        self._next_token = next_token

    def execute(self, plan: StepPlan) -> StepResult:
        """Say what came out of the plan, and set ``last_work`` and ``last_step_s``."""
        return self.launch(plan).result()

    def launch(self, plan: StepPlan) -> "SimLaunchedStep":
        """See ``LaunchingExecutor``; the device takes up a step when it is done with the one before."""
        work = self._meter.measure(plan)
        next_token = self._next_token
        result = StepResult(
            step_id=plan.step_id,
            sampled={
                seq.request_id: next_token(seq.request_id, seq.num_computed_tokens + seq.num_scheduled_tokens)
                for seq in plan.seqs
                if seq.is_sampled
            },
        )
        return SimLaunchedStep(self, work, self._cost_model.seconds(work), result)


class SimLaunchedStep:
    """A step under way."""

    __slots__ = ("_executor", "_result", "_seconds", "_work")

    def __init__(self, executor: SimExecutor, work: StepWork, seconds: float, result: StepResult) -> None:
        self._executor = executor
        self._work = work
        self._seconds = seconds
        self._result = result

    def result(self) -> StepResult:
        """What came out; the executor's ``last_work`` and ``last_step_s`` are then this step's."""
        self._executor.last_work = self._work
        self._executor.last_step_s = self._seconds
        return self._result
