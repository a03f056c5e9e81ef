"""An engine that notes when each step gave which requests their tokens: the engine's side of what a client sees."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from pomona.cli.build import BuildEngine
from pomona.core.output import RequestOutput
from pomona.driver.loop import EngineParts
from pomona.engine.engine import Engine


class StampedEngine:
    """An engine that remembers when its steps ended.

    Args:
        engine: does the work.
        path: where ``save`` writes.
    """

    def __init__(self, engine: Engine, path: str) -> None:
        self._engine = engine
        self._path = Path(path)
        self._stamps: list[tuple[float, list[str]]] = []

    def __getattr__(self, name: str) -> Any:
        """Everything else is the engine's own."""
        return getattr(self._engine, name)

    def step(self, now_s: float) -> list[RequestOutput]:
        """One step of the engine."""
        outputs = self._engine.step(now_s)
        self._stamps.append((time.monotonic(), [output.request_id for output in outputs if output.new_token_ids]))
        return outputs

    def save(self) -> None:
        """Write the token times of every request, seconds on the monotonic clock."""
        times: dict[str, list[float]] = {}
        for moment_s, request_ids in self._stamps:
            for request_id in request_ids:
                times.setdefault(request_id, []).append(moment_s)
        self._path.write_text(json.dumps(list(times.values())))


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
