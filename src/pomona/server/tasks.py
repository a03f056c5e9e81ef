"""Tasks: work that goes on when whoever began it has gone away."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from pomona.core.errors import PomonaError

_Result = TypeVar("_Result")
_LOGGER = logging.getLogger(__name__)


class Tasks:
    """Running tasks, kept from being collected.

    Args:
        on_end: called after every task.
    """

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        self._on_end = on_end
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, _Result]) -> "asyncio.Task[_Result]":
        """Begin; whoever awaits the task gets its error, and bugs are logged."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return task

    async def close(self) -> None:
        """Cancel everything and wait."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _end(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        self._on_end()
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, PomonaError):
            _LOGGER.error("A task of the server failed", exc_info=error)
