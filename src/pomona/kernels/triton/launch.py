"""One launch of one kernel as a value: run it, or compile it for a GPU that is not there."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """A kernel and everything it is called with.

    Nothing about a launch depends on values in device memory, so what has been captured into a CUDA graph stays right
    when those values change.
    """

    kernel: Any
    """A ``triton.jit`` function."""
    grid: tuple[int, ...]
    """Programs per axis, at most three; 0 anywhere launches nothing."""
    args: tuple[Any, ...]
    """Tensors, numbers and tuples of them, in the kernel's order."""
    constants: dict[str, Any]
    """Compile-time parameters by name."""
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        """How to compile; contraction of a * b + c is stated because Triton's default for it changes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Enqueue the kernel on the current stream of the current device."""
        if 0 not in self.grid:
            self.kernel[self.grid](*self.args, **self.constants, **self.options)

    def compile(self) -> Any:
        """Compile exactly what ``run`` would, without running it; tensors may be on the meta device.

        Returns:
            Triton's compiled kernel, for the active driver's target.
        """
        return self.kernel.warmup(*self.args, **self.constants, **self.options, grid=self.grid)
