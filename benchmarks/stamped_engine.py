"""An engine that notes when each step gave which requests their tokens: the engine's side of what a client sees."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pomona.cli.build import BuildEngine
from pomona.core.interfaces import Executor
from pomona.core.output import RequestOutput
from pomona.core.plan import StepPlan, StepResult
from pomona.driver.loop import EngineParts
from pomona.engine.engine import Engine


class _TimedExecutor:
    """An executor that adds up the CPU time that its caller's thread spends in it."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.cpu_s = 0.0

    def __getattr__(self, name: str) -> Any:
        """Everything else is the executor's own."""
        return getattr(self._executor, name)

    def execute(self, plan: StepPlan) -> StepResult:
        """One step of the model."""
        start_s = time.thread_time()
        result = self._executor.execute(plan)
        self.cpu_s += time.thread_time() - start_s
        return result


class StampedEngine:
    """An engine that remembers when its steps ended, and what its thread spent beside the model.

    Args:
        engine: does the work.
        path: where ``save`` writes.
    """

    def __init__(self, engine: Engine, path: str) -> None:
        self._engine = engine
        self._executor = engine._executor = _TimedExecutor(engine._executor)
        self._path = Path(path)
        self._stamps: list[tuple[float, float, list[str]]] = []

    def __getattr__(self, name: str) -> Any:
        """Everything else is the engine's own."""
        return getattr(self._engine, name)

    def step(self, now_s: float) -> list[RequestOutput]:
        """One step of the engine."""
        outputs = self._engine.step(now_s)
        end_s, host_s = time.monotonic(), time.thread_time() - self._executor.cpu_s
        self._stamps.append((end_s, host_s, [output.request_id for output in outputs if output.new_token_ids]))
        return outputs

    def save(self) -> None:
        """Write the token times of every request and the host's CPU time at every step; the file appears whole."""
        tokens: dict[str, list[float]] = {}
        for end_s, _, request_ids in self._stamps:
            for request_id in request_ids:
                tokens.setdefault(request_id, []).append(end_s)
        found = {"tokens": tokens, "steps": [(end_s, host_s) for end_s, host_s, _ in self._stamps]}
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.rename(self._path)


@dataclass(frozen=True, slots=True)
class StampedBuild(BuildEngine):
    """Builds a stamped engine, in the engine's process."""

    stamps_path: str = ""

    def __call__(self, report_progress: Callable[[str], None] = lambda text: None) -> EngineParts:
        """Build the engine and wrap it."""
        parts = BuildEngine.__call__(self, report_progress)
        stamped = StampedEngine(parts.engine, self.stamps_path)

        def close() -> None:
            stamped.save()
            parts.close()

        return replace(parts, engine=cast(Engine, stamped), close=close)
