"""How a fixed sequence of launches is recorded once and played many times: the two CUDA calls, and their stand-in.

Everything else about graphs (padding, static tensors, refilled plans) is the same for both, and tested with the latter.
"""

from collections.abc import Callable
from typing import Protocol

import torch

Replay = Callable[[], None]
"""Plays what was captured."""


class Capture(Protocol):
    """Makes replays."""

    @property
    def is_frozen(self) -> bool:
        """True if a replay repeats the launches of the capture: only the contents of its tensors may change since."""
        ...

    def capture(self, function: Callable[[], None]) -> Replay:
        """Record what ``function`` launches. It is called several times; what it writes meanwhile means nothing."""
        ...


class CudaCapture:
    """CUDA graphs that share one pool of memory: no two of them run at once, so they may use the same temporaries."""

    is_frozen = True

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], None]) -> Replay:
        """See ``Capture``. The first calls compile kernels and make workspaces, which must not happen in a capture."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            function()
        replay: Replay = graph.replay
        return replay


class Recall:
    """Calls the function again on the same tensors: what a graph would do, on any device.

    Args:
        is_frozen: hand the function what it had at capture, as a graph does. Only right for kernels whose launches
            depend on tensors alone (Triton's); those for CPUs plan by host numbers.
    """

    def __init__(self, *, is_frozen: bool = False) -> None:
        self.is_frozen = is_frozen

    def capture(self, function: Callable[[], None]) -> Replay:
        """See ``Capture``."""
        function()
        return function
