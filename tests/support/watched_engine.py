"""An engine that tells at its end what it has left, and what the kernel says a process holds."""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pomona.cli.build import BuildEngine
from pomona.core.adapter import AdapterInfo
from pomona.core.ids import AdapterId
from pomona.core.interfaces import AdapterHost
from pomona.driver.loop import EngineParts


@dataclass(slots=True)
class WatchedHost:
    """An AdapterHost that knows the most bytes it ever kept."""

    host: AdapterHost
    sizes: dict[AdapterId, int] = field(default_factory=dict)
    peak_bytes: int = 0

    def stage(self, path: str) -> AdapterInfo:
        """See AdapterHost."""
        info = self.host.stage(path)
        self.sizes[info.adapter_id] = info.num_host_bytes
        self.peak_bytes = max(self.peak_bytes, sum(list(self.sizes.values())))
        return info

    def unstage(self, adapter_id: AdapterId) -> None:
        """See AdapterHost."""
        self.host.unstage(adapter_id)
        del self.sizes[adapter_id]


@dataclass(frozen=True, slots=True)
class WatchedBuild:
    """An EngineBuilder. When its engine is closed, and only then, it writes to ``report`` what it has left, as JSON:
    the fields of EngineStats, ``num_staged`` and ``peak_bytes``."""

    build: BuildEngine
    report: str

    def __call__(self, report_progress: Callable[[str], None]) -> EngineParts:
        """Build the engine."""
        parts = self.build(report_progress)
        host = WatchedHost(parts.adapter_host)

        def close() -> None:
            parts.close()
            left = {"num_staged": len(host.sizes), "peak_bytes": host.peak_bytes, **asdict(parts.engine.stats())}
            Path(self.report).write_text(json.dumps(left))

        return replace(parts, adapter_host=host, close=close)


@dataclass(frozen=True, slots=True)
class Handles:
    """What a process holds."""

    num_files: int
    num_threads: int

    @classmethod
    def of(cls, pid: int) -> "Handles":
        """Count now."""
        return cls(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")))


def open_files() -> set[tuple[str, str]]:
    """Of this process: number, and path or the kernel's own name for what has none."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing itself
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found
