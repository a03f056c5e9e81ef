"""H200 by published measurements: time of a step from vLLM's own operators, as measured for aiconfigurator.

Products and attention are looked up and interpolated; what the tables do not have (adapters, copies, norms, sampling)
is the roofline's of ``sim.hardware``, at its shares of the H200's data sheet. Origin and licence are in the file.
"""

import bisect
import functools
import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pomona.core.errors import ConfigError
from pomona.sim.hardware import MACHINES, MODELS, RooflineCost
from pomona.sim.step_work import StepWork

_FILE = "h200-vllm-0.24.json"

Curve = tuple[tuple[float, ...], tuple[float, ...]]
"""Ascending arguments, and a value for each."""


def interpolate(curve: Curve, x: float) -> float:
    """Linear between neighbours; in proportion beyond the last, constant before the first."""
    xs, values = curve
    if x <= xs[0]:
        return values[0]
    if x >= xs[-1]:
        return values[-1] * x / xs[-1]
    right = bisect.bisect_right(xs, x)
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


@dataclass(frozen=True)
class TableCost:
    """A CostModel of one model on so many H200 (tensor parallelism).

    Args:
        layer_products: rows -> seconds of a layer's products.
        head: rows -> seconds of the output layer.
        prefill: pairs of query and key, of one prompt alone -> seconds of a layer's attention.
        decode: batch -> (context -> seconds of a layer's attention).
        all_reduce: numbers (of two bytes) -> seconds; None for one device.
        rest: everything else.
    """

    layer_products: Curve
    head: Curve
    prefill: Curve
    decode: tuple[tuple[float, Curve], ...]
    all_reduce: Curve | None
    rest: RooflineCost

    def seconds(self, work: StepWork) -> float:
        """See ``CostModel``; nothing for a plan that only says what to forget."""
        if not work.num_rows:
            return 0.0
        model = self.rest.model
        layer_s = interpolate(self.layer_products, work.num_rows) + self._attention(work)
        if self.all_reduce is not None:
            layer_s += 2 * interpolate(self.all_reduce, work.num_rows * model.hidden_size)
        total = model.num_layers * layer_s + self.rest.adapters_s(work) + self.rest.machine.step_s
        return total + interpolate(self.head, work.num_sampled) if work.num_sampled else total

    def _attention(self, work: StepWork) -> float:
        seconds = 0.0
        if work.num_decode_rows:
            context = work.num_decode_kv_tokens / work.num_decode_rows
            by_batch = (
                tuple(batch for batch, _ in self.decode),
                tuple(interpolate(c, context) for _, c in self.decode),
            )
            seconds += interpolate(by_batch, work.num_decode_rows)
        if work.num_prefill_pairs:
            seconds += interpolate(self.prefill, work.num_prefill_pairs)
        return seconds


@functools.cache
def _configurations() -> dict[tuple[str, int], dict[str, Any]]:
    content = importlib.resources.files("pomona").joinpath("sim", "data", _FILE).read_text()
    return {(entry["model"], entry["num_devices"]): entry for entry in json.loads(content)["configurations"]}


def h200_cost(model_name: str, num_devices: int, rows_per_page: int = 4) -> TableCost:
    """The tables of a model.

    Raises:
        ConfigError: there are none for it.
    """
    found = _configurations()
    entry = found.get((model_name, num_devices))
    if entry is None:
        known = ", ".join(f"{name} on {count}" for name, count in found)
        raise ConfigError(f"no H200 tables of {model_name} on {num_devices}: there are {known}")
    decode: dict[float, list[tuple[float, float]]] = {}
    for batch, context, seconds in entry["decode_s"]:
        decode.setdefault(batch, []).append((context, seconds))
    rows = tuple(float(count) for count in entry["rows"])
    return TableCost(
        layer_products=(rows, tuple(entry["layer_products_s"])),
        head=(rows, tuple(entry["head_s"])),
        prefill=_curve([(n * (n + 1) / 2, seconds) for batch, n, seconds in entry["prefill_s"] if batch == 1]),
        decode=tuple((batch, _curve(points)) for batch, points in decode.items()),
        all_reduce=_curve(entry["all_reduce_s"]) if entry["all_reduce_s"] else None,
        rest=RooflineCost(replace(MACHINES["H200"]), MODELS[model_name], rows_per_page, num_devices),
    )


def _curve(points: Sequence[Sequence[float]]) -> Curve:
    return tuple(float(x) for x, _ in points), tuple(float(value) for _, value in points)
