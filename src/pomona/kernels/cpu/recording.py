"""Recorded steps: the native calls of a function, noted once, then run again in one call without Python in between.

What CUDA graphs are to a GPU: at small batches, calling the kernels one by one costs more than some of them take. A
replay repeats the very calls on the very addresses, so its results are those of the function, bit for bit. Only calls
of the compiled kernels are repeated; a function that does any other work on tensors is refused.
"""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pomona.kernels.attention import AttentionBatch
from pomona.kernels.cpu import attention, binding, lora
from pomona.kernels.cpu.workspace import RegionFullError, Workspace
from pomona.kernels.lora import LoraBatch, LoraRanks

_Result = TypeVar("_Result")


class NotRecordableError(RuntimeError):
    """The function did work on tensors that is not a call of a compiled kernel."""


class _OnlyKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses torch's own operators, views excepted."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be wrapped for torch.compile: that would import the compiler in the middle of a step."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aliases = [result.alias_info for result in func._schema.returns]
        if not aliases or any(alias is None or alias.is_write for alias in aliases):
            raise NotRecordableError(f"{func} is no compiled kernel")
        return func(*args, **(kwargs or {}))


class Recording:
    """The native calls of one function, in order. Made by ``record``."""

    def __init__(self, handle: int, region: Tensor) -> None:
        self._handle = handle
        self._region = region
        weakref.finalize(self, binding.library().pomona_free_recording, handle)

    def replay(self) -> None:
        """Run the calls again. They read and write the same memory as when they were recorded."""
        binding.library().pomona_replay(self._handle)

    def refresh_lora(self, recorded: LoraBatch, batch: LoraBatch, ranks: Sequence[LoraRanks]) -> None:
        """Let the calls that were recorded with ``recorded`` use other segments from now on.

        Args:
            recorded: of the recorded function.
            batch: of the next replay; the caller keeps it while it replays.
            ranks: for each recorded LoRA call, in order; kept by the caller too.
        """
        lora.refresh(recorded, batch)
        addresses = (ctypes.c_void_p * (2 * len(ranks)))(*lora.addresses(ranks))
        binding.library().pomona_set_ranks(self._handle, addresses)


def refresh_attention(recorded: AttentionBatch, batch: AttentionBatch) -> None:
    """Let calls that were recorded with ``recorded`` attend to other sequences from now on.

    Args:
        recorded: of the recorded function; its slot mapping is overwritten.
        batch: as many rows; the caller keeps it while it replays.
    """
    attention.refresh(recorded, batch)
    recorded.slot_mapping.copy_(batch.slot_mapping)


def record(function: Callable[[], _Result], workspace: Workspace) -> tuple[Recording, _Result]:
    """Run a function and record its native calls.

    Args:
        function: calls kernels on memory that outlives the recording. It may be run several times.
        workspace: where the kernels' results go, those that the function returns too.

    Raises:
        NotRecordableError: it did anything else to tensors.
    """
    while True:
        handle = binding.library().pomona_begin_recording()
        recording = Recording(handle, workspace.region)
        try:
            with binding.record_with(workspace.empty), _OnlyKernels():  # type: ignore[no-untyped-call]
                return recording, function()
        except RegionFullError:
            workspace.grow()
        finally:
            binding.library().pomona_end_recording()
