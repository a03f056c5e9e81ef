"""Bringing an engine to a point and timing its steps there. Real time; the engine's own scheduler makes the batches."""

import random
import statistics
import time
from collections.abc import Iterator, Sequence

from pomona.core.adapter import AdapterInfo
from pomona.core.ids import AdapterId, RequestId
from pomona.core.interfaces import Executor
from pomona.core.plan import StepPlan, StepResult
from pomona.core.request import Request, SamplingParams
from pomona.engine.engine import Engine
from pomona.profiling.fit import Sample
from pomona.profiling.points import NUM_DECODE_STEPS, NUM_FIRST_STEPS, NUM_PROMPT_STEPS, Point
from pomona.sched.config import SchedulerConfig
from pomona.sim.step_work import StepWork, WorkMeter

_IDLE_S = 0.02
"""The engine is idle so long before it begins afresh, as it is between requests when there are few: threads have gone
to sleep, and others have used the caches."""


class MeteredExecutor:
    """Hands plans on, and knows what the latest one had to do."""

    def __init__(self, executor: Executor) -> None:
        self.lora_ranks: dict[AdapterId, int] = {}
        """Of every adapter that will be asked for; the caller fills it."""
        self.with_extras: set[AdapterId] = set()
        """Those that have more than low-rank parts; the caller fills it."""
        self.last_work = StepWork()
        self.last_metering_s = 0.0
        """What finding that out took."""
        self._executor = executor
        self._meter = WorkMeter(self.lora_ranks, self.with_extras)

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry the plan out."""
        start_s = time.perf_counter()
        self.last_work = self._meter.measure(plan)
        self.last_metering_s = time.perf_counter() - start_s
        return self._executor.execute(plan)


class PointMeter:
    """Measures points on an idle engine.

    Args:
        engine: with nothing to do; nobody else uses it.
        executor: the engine's.
        adapters: all registered with the engine.
        vocab_size: prompts are random ids below this.
    """

    def __init__(
        self, engine: Engine, executor: MeteredExecutor, adapters: tuple[AdapterInfo, ...], vocab_size: int
    ) -> None:
        self._engine = engine
        self._executor = executor
        self._adapters = adapters
        self._vocab_size = vocab_size
        self._chance = random.Random(0)
        self._num_requests = 0
        for info in adapters:
            executor.lora_ranks[info.adapter_id] = info.lora_rank
            if info.has_extras:
                executor.with_extras.add(info.adapter_id)

    def measure(self, point: Point, point_index: int) -> list[Sample]:
        """Samples of the point: of reaching it, of its decodes, of going back to them after prompts, with the mix of
        adapters new again, and of the prompts beside them."""
        num_output = point.num_output_tokens(self.config.max_num_batched_tokens)
        time.sleep(_IDLE_S)
        decoding = [
            self._add(point.num_context_tokens - 1, num_output, point.adapter_of(index))
            for index in range(point.num_decodes)
        ]
        samples = list(self._until_all_decode(set(decoding)))
        first: list[list[tuple[StepWork, float]]] = []
        prompts: list[tuple[StepWork, float]] = []
        decode_s = 0.0
        if decoding:
            first.append(self._steps(NUM_FIRST_STEPS))
            samples.append(_mean(self._steps(NUM_DECODE_STEPS)))
            decode_s = samples[-1][1]
        if point.num_prompts:
            for index in range(NUM_PROMPT_STEPS):
                # Each a little different, the last as the point says: what a size costs at its first time is part of
                # what it costs in service, where few come twice.
                share = 1.0 if index == NUM_PROMPT_STEPS - 1 else self._chance.uniform(0.7, 1.0)
                prompts.append(self._prompt_step(point, max(2, round(share * point.num_prompt_tokens))))
                first.extend([self._steps(NUM_FIRST_STEPS)] if decoding else [])
        back = [_all_at_first(steps, decode_s) for steps in first]
        samples += [_mean(some) for some in (back[:1], back[1:]) if some] + prompts
        for request_id in decoding:
            self._engine.abort(request_id)
        self._rest()
        return [Sample(work, seconds, point_index) for work, seconds in samples if work.num_rows]

    @property
    def config(self) -> SchedulerConfig:
        """Limits of the engine."""
        return self._engine.config

    def warm_up(self, points: Sequence[Point], max_seconds: float) -> None:
        """Go through the motions, then compute prompts until all KV memory has been touched, so that nothing that
        counts happens for the first time.

        Args:
            points: what to go through; the last with prompts.
            max_seconds: when to leave it at that.
        """
        start_s = time.monotonic()
        for point in points:
            self.measure(point, 0)
        num_left = self.config.num_kv_blocks * self.config.block_size
        while num_left > 0 and time.monotonic() - start_s < max_seconds:
            self._add(points[-1].num_prompt_tokens, 1, None)
            self._rest()
            num_left -= points[-1].num_prompt_tokens

    def _prompt_step(self, point: Point, num_prompt_tokens: int) -> tuple[StepWork, float]:
        adapters = point.adapters[: point.num_prompts]
        if point.is_cold:
            for info in adapters:
                self._engine.retire_adapter(info.adapter_id)
            self._rest()
            self._engine.take_drained()
            for info in adapters:
                self._engine.register_adapter(info)
        if point.num_decodes == 0:
            self._change_mix(point)
            time.sleep(_IDLE_S)
        for index in range(point.num_prompts):
            self._add(num_prompt_tokens, 1, point.adapter_of(index))
        return self._step()

    def _change_mix(self, point: Point) -> None:
        """Let another adapter have a step, so that the point's adapters meet anew, as they do in service."""
        others = [info for info in self._adapters if info not in point.adapters]
        if point.adapters and others:
            self._add(1, 1, self._chance.choice(others))
            self._rest()

    def _until_all_decode(self, starting: set[RequestId]) -> Iterator[tuple[StepWork, float]]:
        while starting:
            start_s = time.perf_counter()
            outputs = self._engine.step(time.monotonic())
            seconds = time.perf_counter() - start_s - self._executor.last_metering_s
            starting -= {output.request_id for output in outputs if output.new_token_ids}
            yield self._executor.last_work, seconds

    def _step(self) -> tuple[StepWork, float]:
        start_s = time.perf_counter()
        self._engine.step(time.monotonic())
        return self._executor.last_work, time.perf_counter() - start_s - self._executor.last_metering_s

    def _steps(self, count: int) -> list[tuple[StepWork, float]]:
        return [self._step() for _ in range(count)]

    def _rest(self) -> None:
        while self._engine.has_work:
            self._engine.step(time.monotonic())

    def _add(self, num_prompt_tokens: int, num_output_tokens: int, adapter: AdapterInfo | None) -> RequestId:
        self._num_requests += 1
        request_id = RequestId(f"profile-{self._num_requests}")
        prompt = tuple(self._chance.randrange(self._vocab_size) for _ in range(max(num_prompt_tokens, 1)))
        self._engine.add(
            Request(
                request_id,
                prompt,
                SamplingParams(max_tokens=num_output_tokens, temperature=0.0),
                time.monotonic(),
                adapter_id=None if adapter is None else adapter.adapter_id,
            )
        )
        return request_id


def _all_at_first(steps: list[tuple[StepWork, float]], later_s: float) -> tuple[StepWork, float]:
    """The first of some steps, with all that they took longer than those that followed."""
    return steps[0][0], max(later_s + sum(seconds - later_s for _, seconds in steps), 0.5 * later_s)


def _mean(steps: list[tuple[StepWork, float]]) -> tuple[StepWork, float]:
    """The work of the step in the middle, and the mean of the seconds."""
    return steps[len(steps) // 2][0], statistics.fmean(seconds for _, seconds in steps)
