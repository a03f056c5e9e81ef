"""FetchLanes: blocking work of adapters in threads, a few per place, so that a place which does not answer delays
nobody but its own adapters."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from pomona.core.errors import AdapterUnavailableError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_NUM_THREADS = 4


class FetchLanes:
    """Threads by lane, made when they are first needed."""

    def __init__(self) -> None:
        self._pools: dict[str, ThreadPoolExecutor] = {}

    async def run(
        self,
        lane: str,
        function: Callable[_Arguments, _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> _Result:
        """Call ``function`` in a thread of a lane. If the caller is cancelled, the call goes on.

        Raises:
            AdapterUnavailableError: the system refuses another thread.
        """
        pool = self._pools.get(lane)
        if pool is None:
            pool = self._pools[lane] = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="pomona-fetch")
        loop = asyncio.get_running_loop()
        try:
            call = loop.run_in_executor(pool, lambda: function(*args, **kwargs))
        except RuntimeError as error:
            raise AdapterUnavailableError(f"the adapter cannot be fetched now: {error}") from error
        return await call

    def close(self) -> None:
        """Begin nothing more; what is under way ends by itself."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
