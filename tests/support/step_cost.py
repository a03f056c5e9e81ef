"""What a step does, counted rather than timed: calls into the compiled kernels, Triton launches, torch operators, bytes
allocated and copied, Python calls. Counts are the same on every machine and every run.

Counting Python calls and counting operators would disturb each other, so each takes a step of its own; the caller gives
two steps that do the same work.
"""

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pomona.kernels.cpu import binding

_COPIES = ("copy_", "_to_copy", "clone")


@dataclass(frozen=True)
class StepCost:
    """Counted quantities of one step."""

    native_calls: int
    """Calls into the compiled CPU kernels."""
    launches: int
    """Kernels that the Triton backend enqueued."""
    torch_ops: int
    """Operators that torch dispatched, views included."""
    allocations: int
    """Tensors with memory of their own that operators made."""
    allocated_bytes: int
    copied_bytes: int
    """By operators that do nothing but copy."""
    python_calls: int
    """Python functions entered."""
    builtin_calls: int
    """Functions written in C that Python code called."""

    def exceeding(self, most: dict[str, int]) -> list[str]:
        """One line for each bound that is exceeded, with what to do about it."""
        assert set(most) <= {field.name for field in fields(self)}
        return [
            f"{name} grew to {getattr(self, name)}, the bound is {bound}: find out what the step does more than "
            "before; if it is worth it, raise the bound in this test and say why in the commit"
            for name, bound in most.items()
            if getattr(self, name) > bound
        ]


class _Operators(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_ops = Counter[str]()
        self.num_allocations = 0
        self.allocated_bytes = 0
        self.copied_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.num_ops[name] += 1
        known = {_storage(tensor) for tensor in _tensors((args, tuple((kwargs or {}).values())))}
        for tensor in _tensors(result):
            if name in _COPIES:
                self.copied_bytes += tensor.numel() * tensor.element_size()
            if _storage(tensor) not in known:
                self.num_allocations += 1
                self.allocated_bytes += tensor.untyped_storage().nbytes()
        return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


class _CountingLibrary:
    """Stands before the loaded library and counts the calls that go through."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.num_calls = Counter[str]()

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*args: object) -> object:
            self.num_calls[name] += 1
            return function(*args)

        return call


@contextmanager
def counting_native_calls() -> Iterator[Counter[str]]:
    """Count calls by name while the context lasts; nothing if the kernels are not built."""
    library = binding._library
    if library is None:
        yield Counter()
        return
    counting = _CountingLibrary(library)
    binding._library = counting  # type: ignore[assignment]
    try:
        yield counting.num_calls
    finally:
        binding._library = library


@contextmanager
def counting_launches() -> Iterator[Counter[str]]:
    """Count Triton launches by kernel while the context lasts; nothing if Triton is not installed."""
    num_launches = Counter[str]()
    try:
        from pomona.kernels.triton.launch import Launch
    except ImportError:
        yield num_launches
        return
    run = Launch.run

    def count(launch: Launch) -> None:
        if 0 not in launch.grid:
            num_launches[getattr(launch.kernel, "__name__", "kernel")] += 1
        run(launch)

    Launch.run = count  # type: ignore[method-assign,assignment]
    try:
        yield num_launches
    finally:
        Launch.run = run  # type: ignore[method-assign]


def count_calls(run: Callable[[], object]) -> tuple[int, int]:
    """(Python functions entered, built-in functions called) by ``run``, itself not counted."""
    num = Counter[str]()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        num[event] += 1

    before = sys.getprofile()
    gc.collect()
    gc.disable()  # its callbacks would be counted
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return num["call"] - 1, num["c_call"] - 1  # less ``run`` itself, and the call that ends the counting


def count_step(step: Callable[[], object]) -> StepCost:
    """Count two successive steps of the same work.

    Args:
        step: called twice; everything that is made only once was made before.
    """
    with _Operators() as operators, counting_native_calls() as native, counting_launches() as launches:
        step()
    python_calls, builtin_calls = count_calls(step)
    return StepCost(
        native_calls=native.total(),
        launches=launches.total(),
        torch_ops=operators.num_ops.total(),
        allocations=operators.num_allocations,
        allocated_bytes=operators.allocated_bytes,
        copied_bytes=operators.copied_bytes,
        python_calls=python_calls,
        builtin_calls=builtin_calls,
    )
