"""Which implementation of an op runs where: chosen once per device type, overridable in tests.

A backend is a module that defines an op's functions under the op's own names and signatures. An op that a preferred
backend lacks falls through to the next one; ``reference`` (plain torch) has them all and is the specification.
"""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from pomona.kernels.cpu import binding
from pomona.kernels.triton import availability

OPS = ("activation", "attention", "linear", "lora", "norm", "rope", "sample")

_MODULES: dict[str, dict[str, str]] = {
    "reference": {op: f"pomona.kernels.reference.{op}" for op in OPS},
    "cpu": {op: f"pomona.kernels.cpu.{op}" for op in OPS if binding.is_available()},
    "triton": {op: f"pomona.kernels.triton.{op}" for op in OPS if op != "sample" and availability.is_available()},
}

_PREFERENCES: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference"),
}

_override: tuple[str, ...] = ()


@functools.cache
def _choose(op: str, device_type: str, override: tuple[str, ...]) -> ModuleType:
    assert op in OPS, f"no op named {op}"
    for backend in (*override, *_PREFERENCES.get(device_type, ("reference",))):
        if op in _MODULES[backend]:
            return importlib.import_module(_MODULES[backend][op])
    raise AssertionError(f"no backend has {op} for {device_type}")


def backend_for(op: str, device: torch.device) -> ModuleType:
    """The module that implements ``op`` for tensors on ``device``.

    Args:
        op: one of ``OPS``.
        device: where the tensors are; only its type matters.
    """
    return _choose(op, device.type, _override)


def backends_of(op: str) -> tuple[str, ...]:
    """Names of the backends that have ``op``: what parity tests run over."""
    return tuple(name for name, modules in _MODULES.items() if op in modules)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Prefer one backend on every device while the context lasts. For tests and measurements, in one thread.

    Args:
        name: "reference", "cpu" or "triton". Ops that the backend lacks keep their usual one.
    """
    assert name in _MODULES, f"no backend named {name}: there are {', '.join(_MODULES)}"
    global _override
    previous, _override = _override, (name,)
    try:
        yield
    finally:
        _override = previous
